"""A trained network for other programs: ONNX or torch.export, compared with the network itself."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.errors import UserError
from mambaseg.storage.files import whole_file, write_whole

SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}


@dataclass(frozen=True)
class Parity:
    """How an exported network compares with its original on one batch."""

    difference: float  # largest absolute one of a logit
    labels_equal: float  # share of pixels with the same label, in [0, 1]

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.difference:.1e}, "
            f"labels are equal on {self.labels_equal:.3%} of the pixels"
        )


def export_network(
    network: nn.Module,
    image: Tensor,
    path: Path,
    *,
    format: str,
    about: Mapping[str, Any],
    tolerance: float = 1e-4,
) -> Parity:
    """Write a network for images of one shape, and beside it `<path>.json` that describes it.

    The file is read back and run (ONNX: by onnxruntime on the CPU) before it gets its name.

    Args:
        network: on the CPU; scans with the backend `torch`.
        image: (B, C, H, W), float32 in [0, 1]: the shape to export for, and what is compared.
        path: of the file.
        format: `onnx` or `torch`.
        about: plain data for the description.
        tolerance: largest accepted difference of a logit.

    Raises:
        UserError: a package is missing, or the exported network does not do the same.
    """
    if format not in SUFFIX:
        raise UserError(f"format={format}: choose one of {', '.join(SUFFIX)}")
    if path.suffix != SUFFIX[format]:
        raise UserError(f"output={path}: a file of format={format} ends in {SUFFIX[format]}")
    description = path.with_name(path.name + ".json")
    with whole_file(path, otherwise="choose another file with output=...") as temporary:
        with torch.no_grad(), _quiet():
            run = {"onnx": _onnx, "torch": _program}[format](network.eval(), image, temporary)
            expected, logits = network(image), run(image)
        same = (expected.argmax(1) == logits.argmax(1)).float().mean()
        parity = Parity(float((expected - logits).abs().max()), float(same))
        if not parity.difference <= tolerance:  # a NaN is no success
            raise UserError(
                f"{path} is not written: its logits would differ by up to {parity.difference:.1e}, "
                f"more than tolerance={tolerance}"
            )
        facts = {
            "input": {"name": "image", "shape": list(image.shape), "dtype": "float32"},
            "output": {"name": "logits", "classes": list(about.get("classes", []))},
            **asdict(parity),
            **about,
        }
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        write_whole(description, text, otherwise="choose another file with output=...")
    return parity


def _program(network: nn.Module, image: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(torch.export.export(network, (image,), strict=False), path)
    return torch.export.load(path).module()


def _onnx(network: nn.Module, image: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it and says so less clearly
    except ImportError as error:
        raise UserError(f"format=onnx: {error}; pip install 'mambaseg[export]'") from error
    program = torch.export.export(network, (image,), strict=False)
    # Unoptimised: onnxruntime does that itself when it loads the file, in a fraction of the time.
    exported = torch.onnx.export(
        program,
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=["image"],
        output_names=["logits"],
    )
    assert exported is not None
    exported.save(path, external_data=False)  # one file, whatever the name it will get
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of constants that it cannot fold
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters say about their own parts (absent torchvision, deprecations)."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
