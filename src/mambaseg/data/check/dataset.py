"""What is wrong with a data set: all problems of all files, not the first.

Errors are what training or scoring would stumble over; warnings are what the reader of the scores
has to know; information is the rest.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from mambaseg.data.case import Case
from mambaseg.data.check.layouts import Layout, find_layout
from mambaseg.data.classes import IGNORED
from mambaseg.data.fingerprint import THREADS
from mambaseg.data.labelling import Labels, checked_ignore, with_labels
from mambaseg.data.patients import Alike, facts_of, find_alike, parts_of
from mambaseg.data.readers.reader import Level, Problem
from mambaseg.data.splits import listed
from mambaseg.data.validation import (
    DataError,
    checked_label_map,
    collected_warnings,
    find_problems,
    label_problems,
    require_classes,
)
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError, counted
from mambaseg.storage.untrusted import readable

T = TypeVar("T")
NARROW = 0.13  # of a window: an image with less of it is almost black, as 12 bits in 16 are
ANY = 256  # classes, where nobody names them: labels are bytes
LOOK = "Look at the file; correct it or get it again if it is wrong."


@dataclass(frozen=True)
class Examined:
    """What is kept of a case after reading it."""

    case: Case
    errors: tuple[DataError, ...] = ()
    digest: str | None = None  # None when it cannot be used
    shape: tuple[int, ...] = ()  # (Z, C, H, W) of the image
    spacing: tuple[float, float, float] | None = None  # as of a `Volume`, like the next one
    orientation: str | None = None
    label_counts: tuple[int, ...] = ()  # voxels with each value 0..255, after the label map
    remarks: tuple[str, ...] = ()
    narrow: bool = False  # whether it fills little of `data.window`
    grey: bool = False  # whether it is a single slice whose channels are equal


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found."""

    root: Path
    cases: int
    problems: tuple[Problem, ...]
    patients: int | None = None  # None where nothing tells, like the next one
    layout: Layout | None = None
    examined: tuple[Examined, ...] = ()
    class_names: tuple[str, ...] | None = None  # None where nothing names them
    alike: Alike | None = None
    labels: Labels = "dense"  # that were read

    def of(self, level: Level) -> list[Problem]:
        """The problems of one level."""
        return [problem for problem in self.problems if problem.level == level]

    @property
    def ok(self) -> bool:
        """True without errors; warnings do not count."""
        return not self.of("error")

    @property
    def summary(self) -> str:
        """One line: how much was looked at, and how many problems there are."""
        found = [counted(len(self.of(level)), level) for level in ("error", "warning")]
        whose = "" if self.patients is None else f" of {counted(self.patients, 'patient')}"
        return f"{counted(self.cases, 'case')}{whose} in {self.root}: {', '.join(found)}"

    @property
    def supervision(self) -> str:
        """Sentences on labels that leave voxels open, and on scribbles; empty where there are none.

        Whether an h5 file holds a scribble is not known before that is read.
        """
        sentences = []
        partial = [one.label_counts for one in self.examined if one.case.ignore is not None]
        left = [counts[IGNORED] / sum(counts) for counts in partial if counts and counts[IGNORED]]
        if left:
            sentences.append(
                f"{len(left)} of {counted(self.cases, 'case')} are labelled in part: "
                f"{sum(left) / len(left):.1%} of their voxels have no label."
            )
        cases = [one.case for one in self.examined]
        beside = sum(bool(one.scribble and one.scribble.path != one.image_path) for one in cases)
        if beside and self.labels == "dense":
            sentences.append(
                f"{beside} of {counted(self.cases, 'case')} have a scribble (data.labels=scribble; "
                "--labels scribble checks them)."
            )
        return " ".join(sentences)


def check_dataset(
    root: Path | str,
    num_classes: int | None = None,
    *,
    layout: Layout | None = None,
    ignore_label: int | None = None,
    labels: Labels = "dense",
    config_dirs: Iterable[Path] = (),
) -> Report:
    """Read every case below `root` and report what is wrong with it (docs/data.md lists it).

    `num_classes` includes the background. Without it, `ignore_label` or a layout, the folder itself
    is asked; `labels` are those that are read, `config_dirs` those of `known_layouts`.
    """
    root = Path(root).expanduser()
    try:
        layout = layout or find_layout(root, config_dirs)
        if ignore_label is not None:
            layout = layout.ignoring(ignore_label)
        found, errors, remarks = layout.reader.survey(root, **layout.options)
    except DataError as error:
        return Report(root, 0, (_line(error, root, str(root)),))
    names = channels = None
    try:
        names = layout.class_names(root)
        ignore_label = layout.ignore_label(root)
        channels = layout.reader.channels and layout.reader.channels(root)
    except DataError as error:  # the images are worth a look all the same
        errors.insert(0, error)
    cases = list(_as_configured(found, layout, names, ignore_label, labels, errors))
    classes = num_classes or (len(names) if names else ANY)
    window = layout.config.get("window")
    how = (classes, channels, window, layout.reader.remarks)
    with ThreadPoolExecutor(THREADS) as pool:  # unpacking releases the interpreter lock
        examined = list(pool.map(lambda case: _examine(case, *how), cases))
    alike = find_alike(cases)
    voxels = [one.label_counts for one in examined if one.digest is not None]
    errors += _of_the_whole(root, cases, voxels, names if labels == "dense" else None)
    problems = [_line(error, root) for error in errors]
    problems += [_line(error, root, e.case.id) for e in examined for error in e.errors]
    problems += [*_duplicates(examined), *remarks]
    problems += [Problem("warning", e.case.id, what, LOOK) for e in examined for what in e.remarks]
    problems += [*_narrow(examined, window), *_differing(examined), *_unknown_spacing(examined)]
    if alike:
        problems.append(Problem("warning", root.absolute().name, alike.problem, alike.remedy))
    unknown = any(case.patient_assumed for case in cases)
    patients = None if unknown else len({case.patient for case in cases})
    lines = tuple(dict.fromkeys(problems))  # two parts of the check may find the same
    return Report(root, len(found), lines, patients, layout, tuple(examined), names, alike, labels)


def _of_the_whole(
    root: Path,
    cases: Sequence[Case],
    voxels: Sequence[Sequence[int]],
    names: Sequence[str] | None,
) -> Iterator[DataError]:
    """What any training would refuse in all cases together; `voxels` are of those in order."""
    every = names is not None and len(voxels) == len(cases)

    def require_foreground() -> None:
        if voxels:
            classes = names or [str(value) for value in range(ANY)]
            require_classes(voxels, classes, "the data set", root, every=every)

    for require in (partial(parts_of, cases), partial(facts_of, cases, root), require_foreground):
        try:
            require()
        except DataError as error:
            yield error


def _as_configured(
    found: Sequence[Case],
    layout: Layout,
    names: Sequence[str] | None,
    ignore: int | None,
    labels: Labels,
    errors: list[DataError],
) -> Iterator[Case]:
    """The cases as a training would read them; those that lack such a label are `errors`."""
    mapping = checked_label_map(layout.config.get("label_map"), ANY)
    checked_ignore(ignore, len(names or ()), layout.config.get("label_map"))
    slicing = str(layout.config.get("slicing", "stored"))
    for one in found:
        case = replace(one, slicing=slicing, label_map=mapping, ignore=ignore)
        try:
            yield with_labels(case, labels)
        except DataError as error:
            errors.append(error)


def _line(error: DataError, root: Path, where: str | None = None) -> Problem:
    """An error as a line of the report; files are named relative to the data set."""
    path, problem = error.path, error.problem
    if path is None or path == root:
        return Problem("error", where or str(root), problem, error.remedy)
    shown = readable(str(path.relative_to(root) if path.is_relative_to(root) else path))
    return Problem("error", where or readable(path.name), f"{shown}: {problem}", error.remedy)


def _examine(
    case: Case,
    num_classes: int,
    channels: int | None,
    window: Sequence[float] | None,
    further: Callable[[Volume], Iterable[str]],
) -> Examined:
    """Read a case completely, whatever comes of it; without `channels` it may have any number."""
    try:
        with collected_warnings() as said:
            volume = case.load()
        partial = case.ignore is not None
        files = (case.image_path, case.label_path)
        errors = tuple(find_problems(volume, *files, num_classes, channels, partial))
        if errors or volume.label is None:
            return Examined(case, errors)
        content = hashlib.sha256(str(volume.image.shape).encode())
        content.update(np.ascontiguousarray(volume.image).data)
        return Examined(
            case,
            (),
            content.hexdigest(),
            volume.image.shape,
            volume.spacing,
            volume.orientation,
            tuple(map(int, np.bincount(volume.label.ravel(), minlength=ANY))),
            (*said, *_suspicious(volume.image, volume.label, partial=partial), *further(volume)),
            _is_narrow(volume.image, window),
            len(volume.image) == 1 and bool((volume.image == volume.image[:, :1]).all()),
        )
    except DataError as error:
        return Examined(case, (error, *_label_errors(case, error, num_classes)))
    except UserError:  # such as a missing library, of every case alike
        raise
    except Exception as error:  # the other cases are still to be looked at
        problem = f"it could not be examined ({type(error).__name__}: {error})"
        remedy = "Leave the case out, and report this as a bug if the file is sound."
        return Examined(case, (DataError(problem, case.image_path, remedy),))


def _label_errors(case: Case, error: DataError, num_classes: int) -> Iterator[DataError]:
    """An unreadable image hides its label: read that file in its place."""
    path = case.label_path
    if path in (None, case.image_path) or error.path not in (case.image_path, *case.more_images):
        return
    assert path is not None
    try:
        label = replace(case, image_path=path, more_images=()).load().label
    except DataError as second:
        yield second
    else:
        assert label is not None
        yield from label_problems(label, path, num_classes, case.ignore is not None)


def _suspicious(image: np.ndarray, label: np.ndarray, *, partial: bool) -> Iterator[str]:
    if image.min() == image.max():
        yield f"the image is constant ({image.flat[0]:g} everywhere)"
    elif ((image == image.min()) | (image == image.max())).all():
        yield f"the image holds two values only ({image.min():g} and {image.max():g})"
    if not (label % IGNORED if partial else label).any():
        yield "the label is background everywhere"


def _is_narrow(image: np.ndarray, window: Sequence[float] | None) -> bool:
    """Whether an image is almost flat in the window of intensities that it is read in."""
    if window is None or image.min() == image.max():
        return False
    low, high = window
    darkest, brightest = np.clip((float(image.min()), float(image.max())), low, high)
    return bool(brightest - darkest < NARROW * (high - low))


def _narrow(examined: Sequence[Examined], window: Sequence[float] | None) -> Iterator[Problem]:
    narrow = [one.case.id for one in examined if one.narrow]
    if narrow and window is not None:
        where = "all" if len(narrow) == len(examined) else listed(narrow)
        whose = counted(len(narrow), "image")
        problem = f"{whose} with less than {NARROW:.0%} of data.window={list(window)}"
        remedy = "data.window=null takes each image's own range, as 12 bits in 16 need it."
        yield Problem("warning", where, problem, remedy)


def _duplicates(examined: Iterable[Examined]) -> Iterator[Problem]:
    """Identical images, one line for the same group of patients."""
    by_content: dict[str, list[Case]] = defaultdict(list)
    for one in examined:
        if one.digest is not None:
            by_content[one.digest].append(one.case)
    phases: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for cases in by_content.values():
        if len(cases) > 1:
            patients = tuple(sorted({case.patient for case in cases}))
            phases[patients] |= {case.phase or case.id for case in cases}
    for patients, which in sorted(phases.items()):
        problem = f"identical images ({', '.join(sorted(which))})"
        remedy = (
            "data.split=random keeps them in one part; a published split that does not says so "
            "with its scores."
        )
        if len(patients) == 1:
            problem = f"{' and '.join(sorted(which))} are the same image"
            remedy = "Get the patient again."
        yield Problem("warning", ", ".join(patients), problem, remedy)


def _differing(examined: Sequence[Examined]) -> Iterator[Problem]:
    """Cases whose axes or channels are not those of most cases."""
    axes = {one.case.id: one.orientation for one in examined if one.orientation}
    for usual, other, where in _minorities(axes):
        remedy = "Arrays are used as stored: bring all files to the same axes."
        if examined[0].case.slicing == "spacing":
            remedy = "They are seen turned or flipped, or were scanned in another plane."
        yield Problem("warning", where, f"axes {other} where most cases have {usual}", remedy)
    channels = {one.case.id: one.shape[1] for one in examined if one.digest}
    for most, count, where in _minorities(channels):
        problem = f"{counted(count, 'channel')} where most cases have {most}"
        yield Problem("error", where, problem, "Give every case the same channels.")


def _minorities(values: Mapping[str, T]) -> Iterator[tuple[T, T, str]]:
    """The most frequent value, and each other one with the cases that have it."""
    ordered = [value for value, _ in Counter(values.values()).most_common()]
    for other in ordered[1:]:
        yield ordered[0], other, listed(case for case, value in values.items() if value == other)


def _unknown_spacing(examined: Sequence[Examined]) -> Iterator[Problem]:
    """Without a voxel size there are no mm."""
    usable = [one for one in examined if one.digest is not None]
    unknown = [one.case.id for one in usable if one.spacing is None]
    if unknown:
        where = "all" if len(unknown) == len(usable) else listed(unknown)
        problem = f"voxel size unknown in {len(unknown)} of {len(usable)} cases"
        remedy = "Distances are scored in voxels only."
        yield Problem("info", where, problem, remedy)
