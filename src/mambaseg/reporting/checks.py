"""What a reader must know before believing a comparison; each a sentence on top of its section."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.other_tables import device
from mambaseg.reporting.scores import outcomes
from mambaseg.reporting.tables import seen_note


def cautions(comparison: Comparison) -> list[str]:
    """All sentences about one comparison, the gravest first."""
    return [
        *_data(comparison),
        *_patients(comparison.entries),
        *_repeats(comparison.entries),
        *_settings(comparison.entries),
        *_outcomes(comparison.entries),
        *_origins(comparison.entries),
    ]


def _data(comparison: Comparison) -> Iterator[str]:
    runs = [run for entry in comparison.entries for run in entry.runs]
    if any(run.config["data"].get("synthetic") for run in runs):
        yield (
            f"{comparison.protocol['data']}: these numbers say that the code runs, nothing about "
            "patients."
        )
    yield from dict.fromkeys(f"{run.path.name}: {seen_note(run.summary)}"
                             for run in runs if run.saw_cases)  # fmt: skip
    notes = dict.fromkeys(str(run.split["note"]) for run in runs if run.split.get("note"))
    for note in notes:
        yield f"Split {comparison.protocol['split']}: {note}"
    hashes: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        hashes[run.split["name"]].add(str(run.split["hash"]))
    for name, several in hashes.items():
        if len(several) > 1:
            yield (
                f"Split {name} does not have the same patients in all runs "
                f"({', '.join(sorted(several))}): their scores are not comparable."
            )


def _patients(entries: Sequence[Entry]) -> Iterator[str]:
    everyone = set().union(*(entry.patients for entry in entries))
    for entry in entries:
        if absent := everyone - entry.patients:
            yield (
                f"{entry.label} was not tested on {len(absent)} of {len(everyone)} patients: its "
                "means are of other patients; paired comparisons use the common ones."
            )
        for seed, rows in entry.by_seed.items():
            counts = Counter((row["case"], row["class"]) for row in rows)
            repeated = {case for (case, _), count in counts.items() if count > 1}
            if repeated:
                yield (
                    f"{entry.label}, seed {seed}: {len(repeated)} cases are in the test part of "
                    "more than one fold and count more than once."
                )


def _repeats(entries: Sequence[Entry]) -> Iterator[str]:
    single = [entry.label for entry in entries if len(entry.by_seed) == 1]
    if single:
        yield (
            f"A single seed: {', '.join(single)}. How far another seed would be away is not known."
        )
    if len({len(entry.by_seed) for entry in entries}) > 1:
        counts = ", ".join(f"{entry.label}: {len(entry.by_seed)}" for entry in entries)
        yield f"The numbers of seeds differ ({counts})."
    for entry in entries:
        folds: dict[int, set[int]] = defaultdict(set)
        for run in entry.runs:
            if run.fold is not None:
                folds[run.seed].add(run.fold)
        if len({frozenset(own) for own in folds.values()}) > 1:
            said = ", ".join(f"seed {seed}: {sorted(own)}" for seed, own in sorted(folds.items()))
            yield f"{entry.label}: the seeds have different folds ({said})."


def _settings(entries: Sequence[Entry]) -> Iterator[str]:
    def values(key: str, part: str) -> set[str]:
        return {str((entry.runs[0].config.get(part) or {}).get(key)) for entry in entries}

    settings = ("preprocessing", "size", "intensity", "window", "spacing")
    different = [key for key in settings if len(values(key, "data")) > 1]
    if different:
        yield (
            f"The entries differ in data.{', data.'.join(different)}: the networks saw other "
            "images. Scores are at native resolution all the same."
        )
    if len(values("keep_largest", "evaluation")) > 1:
        yield "Only some entries keep the largest component before scoring."
    if len({str(entry.runs[0].setting.get("model.pretrained")) for entry in entries}) > 1:
        yield "Only some entries start from pretrained weights, or from different ones."


def _outcomes(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        counts = outcomes(entry)
        if counts["missed"]:
            total = sum(counts.values())
            yield (
                f"{entry.label} missed {counts['missed']} of {total} structures; their distances "
                "follow the policy for empty masks, strict leaves them out."
            )


def _origins(entries: Sequence[Entry]) -> Iterator[str]:
    def distinct(part: str, key: str) -> set[Any]:
        runs = [run for entry in entries for run in entry.runs]
        return {(run.record.get(part) or {}).get(key) for run in runs} - {None}

    if len(distinct("code", "digest")) > 1:
        yield "The runs were made by different states of the code (Runs names the commits)."
    devices = {device(run.record) for entry in entries for run in entry.runs}
    if len(devices) > 1:
        yield f"Times are of different hardware: {', '.join(sorted(devices))}."
    if len(distinct("versions", "torch")) > 1:
        yield f"Different versions of torch: {', '.join(sorted(distinct('versions', 'torch')))}."
    last = [
        run.path.name
        for entry in entries
        for run in entry.runs
        if run.summary.get("checkpoint") == "last"
    ]
    if last:
        yield f"Scored with the last checkpoint, for want of a best one: {', '.join(last)}."
    skipped = [
        run.path.name for entry in entries for run in entry.runs if run.record.get("skipped")
    ]
    if skipped:
        yield f"Steps that were not finite were skipped in the training of {', '.join(skipped)}."
