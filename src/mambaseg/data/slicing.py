"""Along which axis of a stored volume the slices are cut that the network sees.

| rule      | axis |
|-----------|------|
| `stored`  | the file's last one (z), as ACDC and most scans are stored |
| `spacing` | the one with the largest voxel size, where one is clearly the largest; else z |

Scans of thick slices have their detail within the slices; some are stored with another axis last.
"Clearly" is 1.5 times each of the others: of a nearly isotropic scan the largest voxel size says
nothing about how it was made, and cases of one set would be cut in different directions. The rule
looks at the case alone, so prediction cuts a volume as training would have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mambaseg.errors import UserError

RULES = ("stored", "spacing")
CLEARLY = 1.5  # times the voxel size along each other axis


def check_rule(rule: str) -> str:
    """The rule itself.

    Raises:
        UserError: there is none of that name.
    """
    if rule not in RULES:
        raise UserError(f"unknown data.slicing={rule!r}: choose one of {', '.join(RULES)}")
    return rule


def slice_axis(spacing: Sequence[float] | None, rule: str) -> int:
    """Which of the axes (z, y, x) the slices are stacked along.

    Args:
        spacing: mm as (z, y, x); None when unknown.
        rule: see the table at the top of this file.
    """
    if rule == "stored" or spacing is None:
        return 0
    axis = int(np.argmax(spacing))
    others = [side for index, side in enumerate(spacing) if index != axis]
    return axis if spacing[axis] >= CLEARLY * max(others) else 0
