"""Where numbers stopped being finite: a step's forward pass again, module by module.

Networks of other packages may drop by torch's generator: their pass can differ in that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # plain nesting; Lightning uses it too

_PLACES = ("weights", "image", "module", "term", "backward")  # the first is nearest to the cause


class Finding(NamedTuple):
    """Where it began, on one device."""

    place: str  # of _PLACES
    name: str = ""  # of the parameter or module, as in the checkpoint, or of the term
    kind: str = ""  # class of the module
    samples: tuple[str, ...] = ()  # those not finite there, as "<case> slice <number>"

    @property
    def order(self) -> int:
        """Smaller is nearer to the cause."""
        return _PLACES.index(self.place)

    def sentence(self, norms: Sequence[Mapping[str, Any]]) -> str:
        """The finding in words; `norms` as from `gradient_norms`."""
        where = f" in {', '.join(self.samples[:4])}" if self.samples else ""
        where += f" and {len(self.samples) - 4} more" if len(self.samples) > 4 else ""
        worst = ", ".join(f"{norm['parameter']} ({norm['norm']})" for norm in norms[:3])
        return {
            "weights": f"The weights were not finite before: {self.name} is the first. The file "
            "that they were loaded from is damaged, or from a training that had failed.",
            "image": f"The augmented image is not finite{where}.",
            "module": f"The first module whose output is not finite is {self.name} ({self.kind})"
            f"{where}.",
            "term": f"The output of every module is finite, but the term {self.name} of the "
            "method's loss is not.",
            "backward": "The output of every module is finite, so it began in the backward pass. "
            f"Largest gradient norms: {worst}.",
        }[self.place]


def names_of_samples(batch: Mapping[str, Any]) -> list[str]:
    """The samples of a training batch in words."""
    if "slice" not in batch:
        return list(batch["case"])
    return [f"{c} slice {z}" for c, z in zip(batch["case"], batch["slice"], strict=True)]


def step_arrays(batches: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The micro-batches of a step as arrays: `step` (), each other key of a batch joined (N, ...).

    `image` (N, C, S, S) and its truth are augmented.
    """
    arrays = {"step": np.array(batches[0]["step"])}
    for key, value in batches[0].items():
        if isinstance(value, Tensor):
            arrays[key] = torch.cat([batch[key] for batch in batches]).cpu().numpy()
        elif isinstance(value, list):
            arrays[key] = np.array([one for batch in batches for one in batch[key]])
    return arrays


def diagnose(task: Any, batches: Sequence[Mapping[str, Any]]) -> Finding:
    """Runs a step's micro-batches again and says where the first number is not finite.

    Runs all of them, because losses may add up over devices. Changes running statistics.
    """
    findings = [_in_batch(task, batch) for batch in batches]
    for name, parameter in task.named_parameters():
        if not parameter.isfinite().all():
            return Finding("weights", name)
    return min(findings, key=lambda finding: finding.order)


def _in_batch(task: Any, batch: Mapping[str, Any]) -> Finding:
    names = names_of_samples(batch)
    bad: list[Finding] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = (t for t in tree_leaves(output) if isinstance(t, Tensor))
            wrong = () if bad else [tensor for tensor in tensors if not tensor.isfinite().all()]
            if wrong:
                kind = type(module).__name__
                bad.append(Finding("module", name, kind, _samples(wrong[0], names)))

        return look

    with torch.no_grad(), ExitStack() as hooks:  # called in the order in which modules end
        for part in ("network", "method", "loss"):
            for name, module in getattr(task, part).named_modules(prefix=part):
                hooks.enter_context(module.register_forward_hook(hook(name)))
        task.training_loss(batch)
    image = batch["image"]
    if not image.isfinite().all():
        return Finding("image", samples=_samples(image, names))
    terms = (name for name, term in task._terms.items() if not term.isfinite().all())
    bad += [Finding("term", name) for name in terms]
    return bad[0] if bad else Finding("backward")


def _samples(tensor: Tensor, names: Sequence[str]) -> tuple[str, ...]:
    """Which samples, each with its windows or patches, are not finite; all if nothing tells."""
    if not tensor.ndim or not len(tensor) or len(tensor) % len(names):
        return tuple(names)
    finite = tensor.reshape(len(names), -1).isfinite().all(1).tolist()
    return tuple(name for name, good in zip(names, finite, strict=True) if not good)


def gradient_norms(task: Any) -> list[dict[str, Any]]:
    """Euclidean norms of the gradients (as text), the worst first: not finite, then the largest."""
    rows = []
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.detach().cpu().double()
            rows.append((int((~gradient.isfinite()).sum()), float(gradient.norm()), name))
    rows.sort(key=lambda row: (row[0] == 0, -row[1] if row[0] == 0 else 0))
    return [
        {"parameter": name, "norm": f"{norm:.4g}", "nonfinite": bad} for bad, norm, name in rows
    ]
