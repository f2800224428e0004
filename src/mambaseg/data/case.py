"""One case: where its files are, how they are read, and what makes it fit for use.

Images are `(Z, C, H, W)` = (z, channel, y, x), a batch of slices; labels are `(Z, H, W)`. Nothing
is reoriented or resampled here, as in the published ACDC pipelines: rows and columns are the
file's own.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mambaseg.data.classes import IGNORED
from mambaseg.data.validation import DataError, find_problems, mapped
from mambaseg.data.volume import Volume, slice_axis


class Scribble(NamedTuple):
    """A label of some pixels of a case; the others have the value `ignore`."""

    path: Path  #: the case's `label_path`, where it is read with it
    ignore: int
    reader: Callable[[Case], Volume]


@dataclass(frozen=True)
class Case:
    """One annotated phase of one patient; holds paths, no arrays."""

    id: str  #: such as `patient001_ED`
    patient: str  #: such as `patient001`; splits go by it
    phase: str | None  #: "ED" (end-diastole), "ES" (end-systole), or None
    group: str | None  #: pathology (NOR, MINF, DCM, HCM, RV), or None
    image_path: Path  #: the image, or the first of its files
    #: The same as `image_path` for h5. None: there is none, or it must not be read.
    label_path: Path | None
    #: A function of a module, or a `functools.partial` of one with plain keywords, so that a case
    #: can be pickled and described.
    reader: Callable[[Case], Volume]
    more_images: tuple[Path, ...] = ()  #: further files (channels, slices, parts)
    more_labels: tuple[Path, ...] = ()
    part: str | None = None  #: `train`, `val` or `test` of the data set's own split
    label_map: tuple[tuple[int, int], ...] | None = None  #: (value in the file, class)
    ignore: int | None = None  #: the value in the file that says nothing: IGNORED when read
    labelled: bool = True  #: False: its label is not read, all of it is IGNORED
    scribble: Scribble | None = None
    value_names: tuple[tuple[int, str], ...] = ()  #: (value, name) where the data set names them
    slicing: str = "stored"  #: a rule of `slice_axis`
    fold: int | None = None  #: of the data set's own cross-validation, for `part`
    patient_assumed: bool = False  #: no file names the patient, so the case counts as one
    facts: tuple[tuple[str, str], ...] = ()  #: (what, value) of the patient: vendor, centre
    name: str = ""  #: as its files are called, where `id` has part or folder before it; else empty

    def load(self) -> Volume:
        """Read the case, slice it and map its labels; what it holds is not validated."""
        volume = self.reader(self)
        volume = volume.sliced(slice_axis(volume.spacing, self.slicing, volume.grid))
        if not self.labelled:
            depth, _, height, width = volume.image.shape
            nothing = np.full((depth, height, width), IGNORED, np.uint8)
            return replace(volume, label=nothing)
        if volume.label is None or (self.label_map is None and self.ignore is None):
            return volume
        path = self.label_path or self.image_path
        return replace(volume, label=self._mapped(volume.label, path))

    def _mapped(self, label: np.ndarray, path: Path) -> np.ndarray:
        """The classes of a label, and IGNORED where it has the value `ignore`."""
        if self.ignore is None:
            return mapped(label, dict(self.label_map or ()), path)
        unknown = label == self.ignore
        known = label[~unknown]
        if self.label_map is not None:
            known = mapped(known, dict(self.label_map), path)
        elif (known == IGNORED).any():
            problem = f"the label holds value {IGNORED} beside data.ignore_label={self.ignore}"
            raise DataError(problem, path, "Name every value of the files in data.label_map.")
        classes = np.full_like(label, IGNORED)
        classes[~unknown] = known
        return classes

    def read(self, num_classes: int | None = None, channels: int | None = None) -> Volume:
        """Load the case; `UserError` for the first of `validation.find_problems`."""
        try:
            volume = self.load()
            image, label = self.image_path, self.label_path
            partial = not self.labelled or self.ignore is not None
            for found in find_problems(volume, image, label, num_classes, channels, partial):
                raise found
        except MemoryError as error:
            problem, remedy = f"{self.id} does not fit into memory", "Free some, or leave it out."
            raise DataError(problem, self.image_path, remedy) from error
        return volume

    def sources(self) -> tuple[Path, ...]:
        """The files the arrays come from, each once."""
        paths = (self.image_path, *self.more_images, self.label_path, *self.more_labels)
        return tuple(dict.fromkeys(path for path in paths if path is not None))

    @property
    def recipe(self) -> str:
        """How its arrays come from its files (reader and keywords, label map, slicing).

        A reader of somebody's own is known by its module's file too: when that is mended, what it
        read before is read again.
        """
        reader: Any = self.reader
        keywords = []
        if isinstance(reader, functools.partial):
            keywords, reader = sorted(reader.keywords.items()), reader.func
        made = f"{reader.__module__}.{reader.__qualname__} {keywords} {self.label_map}"
        source = "" if reader.__module__.startswith("mambaseg.") else _source_of(reader)
        return f"{made} {self.ignore} {self.labelled} {self.slicing} {source}".rstrip()


@functools.cache  # by function: the code that reads here is that of the file as it was then
def _source_of(reader: Callable[[Case], Volume]) -> str:
    """A digest of the file of a function's module; empty where it has none, as in a notebook."""
    file = getattr(sys.modules.get(reader.__module__), "__file__", None)
    try:
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest() if file else ""
    except OSError:  # such as of a module in a zip file
        return ""
