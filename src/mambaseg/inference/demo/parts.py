"""The page's parts as HTML: everything that is foreign passes `escape`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mambaseg.inference.demo.study import Index, Segmented, Volume
from mambaseg.inference.predictor import Predictor
from mambaseg.reporting.figures import CLASS_COLOURS, overlay
from mambaseg.reporting.page import escape

CAUTION = (
    '<p class="caution"><strong>Not a medical device.</strong> For research only: never for a '
    "diagnosis, a treatment or any other decision about a person.</p>"
)
EMPTY = '<div class="empty">Slices appear here as soon as an image is there.</div>'
_TYPES = {".png": "image/png", ".gz": "application/gzip"}


def head(predictor: Predictor) -> str:
    """Which networks these are, and what they were trained on."""
    data = ", ".join(predictor.trained_on) or "unknown data"
    options = predictor.options
    views = list(dict.fromkeys(m.views for m in predictor.members if m.views != "none"))
    how = [
        word
        for word, on in (
            (f"views averaged (tta): {', '.join(views)}", views),
            ("largest component of each class kept", options.keep_largest),
        )
        if on
    ]
    return (
        f"<h1>{escape(predictor.title)}</h1>"
        f'<p class="lead">Trained on <strong>{escape(data)}</strong>. '
        f"Classes: {escape(', '.join(predictor.class_names[1:]))}."
        f"{escape(' ' + '; '.join(how).capitalize() + '.') if how else ''}</p>{CAUTION}"
    )


def drops(max_mib: int) -> tuple[str, str]:
    """What stands above the two places for files."""
    return (
        f'<p class="drop"><strong>Image</strong> NIfTI (3-D or cine), .mha, DICOM file, PNG, '
        f"TIFF or JPEG, up to {max_mib} MiB</p>",
        '<p class="drop"><strong>End-systole</strong> optional, where the image above is '
        "end-diastole</p>",
    )


def message(problem: str = "") -> str:
    """What is wrong, for a reader and a screen reader; nothing where nothing is."""
    return f'<div class="problem" role="alert">{escape(problem)}</div>' if problem else ""


def facts(*files: Segmented | None) -> str:
    """Size of each image, and its label map to take along."""
    return "".join(_facts(file) for file in files if file is not None)


def _facts(file: Segmented) -> str:
    frames, depth, height, width = file.labels.shape
    size = f"{width} × {height} pixels" + ("" if file.image.flat else f", {depth} slices")
    if frames > 1:
        size += f", {frames} frames"
    spacing = file.image.spacing
    place = (
        "voxel size unknown" if spacing is None else
        f"voxel size {spacing[2]:.3g} × {spacing[1]:.3g} × {spacing[0]:.3g} mm"
    )  # fmt: skip
    name = escape(file.label_map_name)
    kind = next(kind for ending, kind in _TYPES.items() if name.endswith(ending))
    content = base64.b64encode(file.label_map).decode()
    return (
        f'<div class="file"><p><strong>{escape(file.name)}</strong><br>{size}, {place}</p>'
        f'<a class="download" download="{name}" href="data:{kind};base64,{content}">'
        "Download the label map</a></div>"
    )


def pictures(volume: Volume, z: int) -> str:
    """One slice beside itself with its labels."""
    low, high = volume.window
    grey = np.clip((volume.image[z] - low) / max(high - low, 1e-9), 0, 1)
    labels = volume.labels[z]
    shown = {"Image": np.zeros_like(labels), "With labels": labels}
    height, width = labels.shape
    ratio = width / height
    if volume.spacing is not None:
        ratio *= volume.spacing[2] / volume.spacing[1]
    where = f"{volume.caption}, " if volume.caption else ""
    figures = "".join(
        f'<figure><img alt="{name}, {escape(where)}slice {z + 1} of {len(volume.labels)}" '
        f'style="aspect-ratio:{ratio:.4f}" '
        f'src="data:image/png;base64,{_png(overlay(grey, chosen, CLASS_COLOURS))}">'
        f"<figcaption>{name}</figcaption></figure>"
        for name, chosen in shown.items()
    )
    return f'<div class="pictures">{figures}</div>'


def _png(pixels: npt.NDArray[np.float64]) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray((255 * pixels).round().astype(np.uint8)).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def sizes(volume: Volume, class_names: Sequence[str]) -> str:
    """The legend, with the size of each class in the whole volume."""
    known = volume.voxel_ml is not None
    rows = ""
    for label, (name, count) in enumerate(
        zip(class_names, volume.voxels(len(class_names)), strict=True)
    ):
        if label == 0:
            continue
        colour = CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]
        ml = f"<td>{count * volume.voxel_ml:.1f}</td>" if volume.voxel_ml is not None else ""
        rows += (
            f'<tr><th scope="row"><i style="background:{colour}"></i>{escape(name)}</th>'
            f"{ml}<td>{count:,}</td></tr>"
        )
    caption = f"Volumes, {volume.caption}" if volume.caption else "Volumes"
    note = "" if known else "<p>The voxel size is unknown: there are no volumes in mL.</p>"
    heads = ("<th>mL</th>" if known else "") + "<th>voxels</th>"
    return (
        f'<div class="numbers"><h2>{escape(caption)}</h2><table><tr><th>class</th>{heads}</tr>'
        f"{rows}</table>{note}</div>"
    )


def heart(indices: Sequence[Index], captions: tuple[str, str], *, proposed: bool) -> str:
    """The heart's indices of an end-diastole and an end-systole."""
    rows = "".join(
        f'<tr><th scope="row">{escape(index.name)}</th><td>'
        + ("undefined" if index.value is None else f"{index.value:.1f} {index.unit}")
        + "</td></tr>"
        for index in indices
    )
    notes = ""
    if proposed:
        notes += "<p>Frames proposed: those with the largest and the smallest LV.</p>"
    if not any(index.unit == "mL" for index in indices):
        notes += "<p>A voxel size is unknown: from voxel counts, without volumes.</p>"
    return (
        f'<div class="numbers"><h2>Ejection fraction</h2><p>{escape(" → ".join(captions))}</p>'
        f"<table>{rows}</table>{notes}</div>"
    )


def remark(text: str) -> str:
    """A sentence instead of numbers."""
    return f'<div class="numbers"><p>{escape(text[:1].upper() + text[1:])}</p></div>'
