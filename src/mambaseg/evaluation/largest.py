"""Post-processing: the largest component of a structure is kept, the rest becomes background."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

    from mambaseg.data.classes import Structures

Labels = TypeVar("Labels", "Tensor", npt.NDArray[np.uint8])
WHOLE = "foreground"
"""Name of all classes as one."""


def keep_largest(labels: Labels, parts: Structures) -> Labels:
    """Each of some structures reduced to its largest connected component in 3-D, in their order.

    Voxels are connected through their six faces. Of equally large components the first in raster
    order stays. The voxels of the others become background (0). Holes are not filled.

    Labels are (Z, H, W) uint8, an array or a tensor on any device, and left unchanged; the new
    volume is of the same kind, shape, dtype and device.
    """
    if not isinstance(labels, np.ndarray):
        import torch

        kept = keep_largest(labels.cpu().numpy(), parts)
        return torch.from_numpy(kept).to(labels.device)

    from scipy.ndimage import label as connected_components

    result = labels.copy()
    for own in parts.values():
        components, count = connected_components(np.isin(result, own))
        if count > 1:
            sizes = np.bincount(components.ravel())[1:]  # without what is not this structure
            result[(components > 0) & (components != 1 + int(sizes.argmax()))] = 0
    return result


def parts_of(wanted: Any, structures: Structures) -> Structures:
    """Of which structures a `keep_largest` keeps the largest component.

    It is false (none), true (all that are scored), `auto` (none, where nothing was chosen) or what
    was chosen, name -> labels.
    """
    if isinstance(wanted, Mapping):
        return {str(name): tuple(labels) for name, labels in wanted.items()}
    return dict(structures) if wanted is True else {}


def candidates(class_names: Sequence[str], structures: Structures) -> Structures:
    """What a choice tries, in this order: all classes as one, then each structure."""
    whole = f"{WHOLE} (all classes)" if WHOLE in structures else WHOLE
    found = {tuple(range(1, len(class_names))): whole}
    found |= {labels: name for name, labels in structures.items()}  # of equal ones this name
    return {name: labels for labels, name in found.items()}


def voted(choices: Sequence[Structures]) -> Structures:
    """What more than half of the networks have chosen, in the order in which it is to be done.

    That of their choice where it is the same, such as of a single network; else large ones first.
    """
    if len({tuple(choice.items()) for choice in choices}) == 1:
        return dict(choices[0])
    votes = Counter(part for choice in choices for part in choice.items())
    found = [part for part, count in votes.items() if 2 * count > len(choices)]
    return dict(sorted(found, key=lambda part: -len(part[1])))
