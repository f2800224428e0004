"""Images without labels, from which learning methods learn beside a data set's own."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.images import Source, find_images, group_channels, pictures_apart
from mambaseg.data.formats.pictures import reduced
from mambaseg.data.splits import Split
from mambaseg.data.validation import DataError, as_float32
from mambaseg.data.volume import Volume, slice_axis
from mambaseg.errors import UserError


def find_unlabelled(
    place: str | Path | None, *, channels: int, longest_side: int | None
) -> list[Case]:
    """The images that `mambaseg predict` would find under a path, each of a patient of its own.

    None: none. `channels` and `longest_side` are those of the data set. `UserError` where there is
    no image.
    """
    if place is None:
        return []
    try:
        found = find_images(str(place), outside=Path(place) / "nothing is left out")
    except UserError as error:
        raise UserError(f"data.unlabelled_images: {str(error).removeprefix('input: ')}") from error
    cases = []
    grouped = group_channels(found, channels)
    # a data set that reduces pictures has one file per image
    for source in pictures_apart(grouped) if longest_side else grouped:
        read = functools.partial(
            _read_frames, name=source.name, series=bool(source.series),
            channels=channels, longest_side=longest_side,
        )  # fmt: skip
        first, *further = source.series or (source.path, *source.further)
        name = f"unlabelled/{source.name}"
        cases.append(Case(
            id=name, patient=name, phase=None, group=None, image_path=first, label_path=None,
            reader=read, more_images=tuple(further), labelled=False,
        ))  # fmt: skip
    return cases


def _read_frames(
    case: Case, *, name: str, series: bool, channels: int, longest_side: int | None
) -> Volume:
    """The image; the frames of a cine follow each other.

    Caches are named after this function: another way of reading needs another name.
    """
    files = case.image_path, *case.more_images
    source = (
        Source(name, files[0].parent, files) if series else Source(name, files[0], (), files[1:])
    )
    volume = source.read(channels)
    axis = slice_axis(volume.spacing, case.slicing, volume.grid)  # frame by frame
    volume = volume.sliced(axis)
    frames, depth, *shape = volume.image.shape
    if shape[0] != channels:
        remedy = f"The training takes images with {channels} (data.in_channels)."
        raise DataError(f"has {shape[0]} channel(s)", case.image_path, remedy)
    pixels = volume.image.reshape(frames * depth, *shape)
    if source.is_picture:
        pixels = reduced(pixels, longest_side)
    return replace(volume, image=as_float32(case.image_path, pixels), frames=frames)


def of_labelled(
    groups: Iterable[tuple[str, ...]], unlabelled: Collection[str]
) -> list[tuple[str, ...]]:
    """Groups of patients of whom an image is the same, without those of unlabelled images."""
    found = (tuple(one for one in group if one not in unlabelled) for group in groups)
    return [group for group in found if len(group) > 1]


def require_unseen(
    groups: Iterable[tuple[str, ...]], unlabelled: Collection[str], split: Split
) -> None:
    """Raise `UserError` where an unlabelled image shows a patient whose images are to be scored."""
    for group in groups:
        strangers = [patient for patient in group if patient in unlabelled]
        shown = [patient for patient in group if patient in (*split.val, *split.test)]
        if strangers and shown:
            raise UserError(
                f"data.unlabelled_images: {strangers[0].removeprefix('unlabelled/')} shows the "
                f"same as {shown[0]}, who is in the validation or test set: take it out, so that "
                "nobody is scored whose images trained"
            )
