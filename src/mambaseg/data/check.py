"""Is this folder fit for training? Reads every file once and lists all problems, not the first.

`python -m mambaseg.data.check ROOT` prints a table and exits with 1 when there are errors.
Errors are what training or scoring would stumble over; warnings are what the reader of the scores
has to know; information is the rest.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.check_report import Report
from mambaseg.data.examined import Examined, examine
from mambaseg.data.fingerprint import THREADS
from mambaseg.data.layouts import LAYOUTS, Layout, find_layout, layout_named
from mambaseg.data.patients import Alike, find_alike
from mambaseg.data.problems import Level, Problem, counted, whose
from mambaseg.data.proposal import propose
from mambaseg.data.splits import known_duplicates, listed
from mambaseg.data.validation import DataError
from mambaseg.errors import UserError
from mambaseg.storage.files import print_any_name, whole_file

STYLES: dict[Level, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
ONE_PATIENT = "Get the patient again."
LOOK = "Look at the file; correct it or get it again if it is wrong."
MAX_CLASSES = 256  # labels are bytes


def check_dataset(
    root: Path | str, num_classes: int | None = None, *, layout: Layout | None = None
) -> Report:
    """Read every case below `root` and report what is wrong with it.

    Errors: no cases, missing, truncated, damaged or unreadable files, image and label of
    different shape or axes, more or less than three dimensions, NaN, labels outside
    0..num_classes-1, names spelt otherwise. Warnings: identical images, axes unlike the other
    cases', constant images, empty labels. Information: unknown voxel size. A layout adds its own.

    Args:
        root: folder of the data set.
        num_classes: with background; None for what the layout tells, any where it does not.
        layout: None to recognise it.
    """
    root = Path(root).expanduser()
    try:
        layout = layout or find_layout(root)
        found, unusable = layout.survey(root)
    except DataError as error:
        return Report(root, 0, 0, (Problem.from_error(str(root), error, root),))
    names, unnamed = None, []
    try:
        names = layout.class_names(root)
    except DataError as error:  # the images are worth a look all the same
        unnamed = [Problem.from_error(str(root), error, root)]
    cases = [replace(case, slicing=layout.slicing) for case in found]
    classes = num_classes or (len(names) if names else MAX_CLASSES)
    with ThreadPoolExecutor(THREADS) as pool:  # unpacking releases the interpreter lock
        files = [*cases, *layout.further_cases(root, cases)]
        examined = list(pool.map(lambda case: examine(case, classes, layout.remarks), files))
    problems = unnamed
    problems += [Problem.from_error(whose(error), error, root) for error in unusable]
    problems += [Problem.from_error(e.case.id, error, root) for e in examined for error in e.errors]
    problems += _duplicates(examined)
    problems += layout.problems(root, cases)
    problems += [Problem("warning", e.case.id, what, LOOK) for e in examined for what in e.remarks]
    problems += _other_axes(examined)
    problems += _other_channels(examined)
    problems += _unknown_spacing(examined)
    alike = find_alike(cases)
    problems += _alike(root, alike)
    known = not any(case.patient_assumed for case in cases)
    patients = len(layout.patients(root, cases)) if known else None
    problems = list(dict.fromkeys(problems))  # two parts of the check may find the same
    return Report(
        root, patients, len(cases), tuple(problems), layout, tuple(examined), names,
        alike.pattern if alike else None,
    )  # fmt: skip


# ---- the folder as a whole


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
        where = ", ".join(patients)
        problem = f"identical images ({', '.join(sorted(which))})"
        remedy = "In different parts of a split they leak: leave all but one out."
        if patients in known_duplicates(patients):
            remedy = (
                "So it is in ACDC itself. data.split=random keeps them in one part; a published "
                "split that does not says so with its scores."
            )
        elif len(patients) == 1:
            problem, remedy = f"{' and '.join(sorted(which))} are the same image", ONE_PATIENT
        yield Problem("warning", where, problem, remedy)


def _alike(root: Path, alike: Alike | None) -> Iterator[Problem]:
    """Names such as patient001_frame01 and patient001_frame12: parts may share the patient."""
    if alike:
        names = ", ".join(alike.examples)
        problem = f"names begin or end alike ({names}); each case counts as a patient"
        remedy = (
            "If a patient has several cases, tell us how to find the patient ID in the name: "
            f"{alike.override} (the proposed config does)."
        )
        yield Problem("warning", root.absolute().name, problem, remedy)


def _other_axes(examined: Sequence[Examined]) -> Iterator[Problem]:
    """Nothing is reoriented: a case with other axes is shown to the network turned or flipped."""
    known = [one for one in examined if one.orientation is not None]
    if not known:
        return
    usual, _ = Counter(one.orientation for one in known).most_common(1)[0]
    others = [one for one in known if one.orientation != usual]
    for axes in sorted({str(one.orientation) for one in others}):
        where = listed(one.case.id for one in others if one.orientation == axes)
        remedy = "Arrays are used as stored: bring all files to the same axes."
        if others[0].case.slicing == "spacing":
            remedy = "They are seen turned or flipped, or were scanned in another plane."
        yield Problem("warning", where, f"axes {axes} where most cases have {usual}", remedy)


def _other_channels(examined: Sequence[Examined]) -> Iterator[Problem]:
    """A network takes one number of channels."""
    channels = Counter(one.shape[1] for one in examined if one.digest is not None)
    for count, _ in channels.most_common()[1:]:
        usual = channels.most_common(1)[0][0]
        where = listed(one.case.id for one in examined if one.shape[1:2] == (count,))
        problem = f"{counted(count, 'channel')} where most cases have {usual}"
        yield Problem("error", where, problem, "Give every case the same channels.")


def _unknown_spacing(examined: Sequence[Examined]) -> Iterator[Problem]:
    """Without a voxel size there are no mm."""
    readable = [one for one in examined if one.digest is not None]
    unknown = [one.case.id for one in readable if one.spacing is None]
    if unknown:
        where = "all" if len(unknown) == len(readable) else listed(unknown)
        problem = f"voxel size unknown in {len(unknown)} of {len(readable)} cases"
        remedy = "Distances are scored in voxels only; the challenge's own files have it."
        yield Problem("info", where, problem, remedy)


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 when there are errors, else 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    parser = argparse.ArgumentParser(prog="python -m mambaseg.data.check", description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the data set (as data.root)")
    names = [layout.name for layout in LAYOUTS]
    parser.add_argument("--layout", choices=names, help="(default: recognised by the names)")
    parser.add_argument(
        "--num-classes", type=int, help="with background (default: what the layout tells)"
    )
    parser.add_argument(
        "--write", type=Path, metavar="conf/data/NAME.yaml", help="save the proposed leaf there"
    )
    options = parser.parse_args(arguments)
    print_any_name()
    layout = layout_named(options.layout) if options.layout else None
    report = check_dataset(options.root, options.num_classes, layout=layout)
    console = Console()
    if report.problems:
        table = Table(show_lines=True)
        for heading in ("level", "case", "problem", "remedy"):
            table.add_column(heading, overflow="fold")
        for one in report.problems:  # Text: square brackets in a path are no markup
            style = STYLES[one.level]
            table.add_row(Text(one.level, style), *map(Text, (one.where, one.problem, one.remedy)))
        console.print(table)
    console.print(Text(report.summary, "green" if report.ok else "red"), soft_wrap=True)
    try:
        said = _proposed(report, options.write)
    except UserError as error:
        console.print(Text(str(error), "red"), soft_wrap=True)
        return 1
    console.print(Text(said), soft_wrap=True)
    return 0 if report.ok else 1


def _proposed(report: Report, path: Path | None) -> str:
    """What to say about the proposed leaf; it is written where a path is given.

    Raises:
        UserError: it cannot be written.
    """
    if path is not None and not re.fullmatch(r"[A-Za-z]\w*\.yaml", path.name):
        raise DataError("name it like conf/data/hearts.yaml: letters, digits and _", path)
    if path is not None and path.exists():
        raise DataError("is there already", path, "Choose another name, or move it away.")
    leaf = propose(report, path.stem if path else "mine")
    if leaf is None:
        return "No case can be used: no configuration is proposed."
    if path is None:
        return f"\nProposed as conf/data/mine.yaml (--write saves it):\n\n{leaf}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, otherwise="choose another place with --write") as temporary:
        temporary.write_text(leaf, encoding="utf-8")
    return f"\n{leaf}\nWritten to {path}. To train with it: python src/train.py data={path.stem}"


if __name__ == "__main__":
    sys.exit(main())
