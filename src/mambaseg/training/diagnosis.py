"""Where numbers stopped being finite: a training step's forward pass once more, module by module.

What is augmented and dropped is a function of seed, step and position, so the pass is the same.
Networks of other packages may drop by torch's generator: theirs can differ in that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Finding:
    """Where it began, on one device.

    Attributes:
        place: `weights` (not finite before the step), `image` (the augmented image), `module`, or
            `backward` (the forward pass is finite).
        name: of the parameter or module, as in the checkpoint; empty otherwise.
        kind: class of the module; empty otherwise.
        samples: those that are not finite there, as "<case> slice <number>".
    """

    place: str
    name: str = ""
    kind: str = ""
    samples: tuple[str, ...] = ()

    @property
    def order(self) -> int:
        """Smaller is nearer to the cause."""
        return ("weights", "image", "module", "backward").index(self.place)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def sentence(self, norms: Sequence[Mapping[str, Any]]) -> str:
        """The finding in words; `norms` as from `gradient_norms`."""
        where = f" in {', '.join(self.samples[:4])}" if self.samples else ""
        more = f" and {len(self.samples) - 4} more" if len(self.samples) > 4 else ""
        if self.place == "weights":
            return (
                f"The weights were not finite before: {self.name} is the first. The file that they "
                "were loaded from is damaged, or holds a training that had failed."
            )
        if self.place == "image":
            return f"The augmented image is not finite{where}{more}."
        if self.place == "module":
            return (
                f"The first module whose output is not finite is {self.name} ({self.kind})"
                f"{where}{more}."
            )
        worst = ", ".join(f"{norm['parameter']} ({norm['norm']})" for norm in norms[:3])
        return (
            "The output of every module is finite, so it began in the backward pass. "
            f"Largest gradient norms: {worst}."
        )


def names_of_samples(batch: Mapping[str, Any]) -> list[str]:
    """The samples of a training batch in words."""
    if "slice" not in batch:
        return list(batch["case"])
    return [f"{c} slice {z}" for c, z in zip(batch["case"], batch["slice"], strict=True)]


def step_arrays(batches: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The micro-batches of a step one after the other, as arrays without objects.

    Returns:
        `image` (N, C, S, S) float32 and what is true of it (`label` (N, S, S) int64, or `clear`
        like the image), augmented; `case` (N,) text, `slice` (N,) where there are slices,
        `position` (N,) in the global batch, `step` ().
    """
    arrays = {"step": np.array(batches[0]["step"])}
    for key, value in batches[0].items():
        if isinstance(value, Tensor):
            arrays[key] = torch.cat([batch[key] for batch in batches]).cpu().numpy()
        elif key != "step":
            arrays[key] = np.array([one for batch in batches for one in batch[key]])
    return arrays


def diagnose(task: Any, batches: Sequence[Mapping[str, Any]]) -> Finding:
    """Runs a step's micro-batches again and says where the first number is not finite.

    Every micro-batch is run whatever is found: losses may add up over devices.

    Args:
        task: a `Task` in training mode; its running statistics change.
        batches: on its device.
    """
    findings = [_in_batch(task, batch) for batch in batches]
    for name, parameter in task.network.named_parameters(prefix="network"):
        if not parameter.isfinite().all():
            return Finding("weights", name, "")
    return min(findings, key=lambda finding: finding.order)


def _in_batch(task: Any, batch: Mapping[str, Any]) -> Finding:
    names = names_of_samples(batch)
    bad: list[Finding] = []
    modules = {
        **dict(task.network.named_modules(prefix="network")),
        **dict(task.loss.named_modules(prefix="loss")),
    }

    def look(module: str, kind: str, output: Any) -> None:
        if not bad and not all(tensor.isfinite().all() for tensor in _tensors(output)):
            samples = _samples(output, names)
            bad.append(Finding("module", module, kind, samples))

    with torch.no_grad(), _watched(modules, look):
        task.training_loss(batch)
    image = batch["image"]
    if not image.isfinite().all():
        return Finding("image", samples=_samples(image, names))
    return bad[0] if bad else Finding("backward")


@contextmanager
def _watched(modules: Mapping[str, nn.Module], look: Any) -> Iterator[None]:
    """Calls `look(name, kind, output)` after each module, in the order in which they end."""

    def hook(name: str) -> Any:
        return lambda module, inputs, output: look(name, type(module).__name__, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of what a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, Iterable) and not isinstance(output, str):
        for part in output:
            yield from _tensors(part)


def _samples(output: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Which samples are not finite; all of them where the first dimension is not the batch's.

    Windows or patches of a sample that follow one another in the first dimension are its own.
    """
    for tensor in _tensors(output):
        if not tensor.isfinite().all():
            if tensor.ndim and tensor.shape[0] and tensor.shape[0] % len(names) == 0:
                finite = tensor.reshape(len(names), -1).isfinite().all(1).tolist()
                return tuple(name for name, good in zip(names, finite, strict=True) if not good)
            break
    return tuple(names)


def gradient_norms(task: Any) -> list[dict[str, Any]]:
    """Euclidean norms of the gradients, the worst first: not finite ones, then the largest.

    Returns:
        `parameter` (as in the checkpoint), `norm` (number, or text where it is not finite) and
        `nonfinite` (how many elements are not) for each parameter that has a gradient.
    """
    rows = []
    for name, parameter in task.network.named_parameters(prefix="network"):
        if parameter.grad is not None:
            gradient = parameter.grad.detach().cpu().double()
            bad = int((~gradient.isfinite()).sum())
            norm = float(gradient.norm())
            rows.append({"parameter": name, "norm": f"{norm:.4g}", "nonfinite": bad, "_": norm})
    rows.sort(key=lambda row: (row["nonfinite"] == 0, -row["_"] if row["nonfinite"] == 0 else 0))
    return [{key: value for key, value in row.items() if key != "_"} for row in rows]
