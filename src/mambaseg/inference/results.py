"""Where the results of an image have their place, each kind in a file of its own."""

from collections.abc import Collection, Mapping
from pathlib import Path

from mambaseg.data.formats.images import DICOM_SEG, OVERLAY, PROBABILITIES, UNCERTAINTY, Source
from mambaseg.errors import UserError

BESIDE = ("probabilities", "uncertainty", "overlay", "dicom_seg")
"""What may lie beside a label map and its .json, as the options are called."""


def require_folder(output: Path) -> None:
    """Raises UserError where there cannot be such a folder because it, or one above it, is a file.

    To be called before networks are loaded and images predicted.
    """
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"output={output}: {there} is a file. Name a folder for the results")


def result_files(source: Source, output: Path) -> dict[str, Path]:
    """The place of each kind: `labels`, `about` (the .json) and those of `BESIDE`."""
    place, picture = output / source.name, source.is_picture
    endings = {
        "labels": ".png" if picture else ".nii.gz",
        "about": ".json",
        "probabilities": PROBABILITIES,
        "uncertainty": UNCERTAINTY[picture],
        "overlay": OVERLAY,
        "dicom_seg": DICOM_SEG,
    }
    return {kind: place.with_name(place.name + ending) for kind, ending in endings.items()}


def require_own_names(beside: Mapping[Source, Collection[str]], output: Path) -> None:
    """Raises UserError where results of two images would have one name.

    `beside` says which of `BESIDE` are written for each.
    """
    owners: dict[Path, Source] = {}
    for source, kinds in beside.items():
        files = result_files(source, output)
        for kind in ("labels", "about", *kinds):
            if (other := owners.setdefault(files[kind], source)) is not source:
                raise UserError(
                    f"input: {other.path} and {source.path} would both give {files[kind]}: predict "
                    "them into two folders"
                )
