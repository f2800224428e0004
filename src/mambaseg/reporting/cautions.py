"""What a reader must know before believing a comparison; each a sentence on top of its section."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from mambaseg.reporting.collect import Comparison
from mambaseg.reporting.scores import outcomes
from mambaseg.reporting.tables import device, seen_note


def cautions(comparison: Comparison) -> list[str]:
    """All sentences about one comparison, the gravest first."""
    parts = (_data, _patients, _repeats, _settings, _outcomes, _origins)
    return [sentence for part in parts for sentence in part(comparison)]


def _data(comparison: Comparison) -> Iterator[str]:
    if any(run.config["data"].get("synthetic") for run in comparison.runs):
        yield (
            f"{comparison.protocol['data']}: these numbers show that the code runs; they say "
            "nothing about patients."
        )
    for run in comparison.runs:
        if run.saw_cases:
            yield f"{run.path.name}: {seen_note(run.summary)}"
    split = comparison.protocol["split"]
    for note in dict.fromkeys(str(run.split.get("note") or "") for run in comparison.runs):
        if note:
            yield f"Split {split}: {note}"
    hashes: dict[str, set[str]] = defaultdict(set)
    for run in comparison.runs:
        hashes[run.split["name"]].add(str(run.split["hash"]))
    for name, several in hashes.items():
        if len(several) > 1:
            yield (
                f"Split {name} does not have the same patients in all runs "
                f"({', '.join(sorted(several))}): their scores are not comparable."
            )


def _patients(comparison: Comparison) -> Iterator[str]:
    everyone = set().union(*(entry.patients for entry in comparison.entries))
    for entry in comparison.entries:
        if absent := everyone - entry.patients:
            yield (
                f"{entry.label} was not tested on {len(absent)} of {len(everyone)} patients, so "
                "its means are over other patients; paired comparisons use the common ones."
            )
        for seed, rows in entry.by_seed.items():
            counts = Counter((row["case"], row["class"]) for row in rows)
            repeated = {case for (case, _), count in counts.items() if count > 1}
            if repeated:
                yield (
                    f"{entry.label}, seed {seed}: {len(repeated)} cases are in the test set of "
                    "more than one fold and count more than once."
                )


def _repeats(comparison: Comparison) -> Iterator[str]:
    seeds = {entry.label: len(entry.by_seed) for entry in comparison.entries}
    if single := [label for label, count in seeds.items() if count == 1]:
        yield (
            f"Only one seed was trained for {', '.join(single)}, so seed-to-seed variation is "
            "unknown."
        )
    if len(set(seeds.values())) > 1:
        counts = ", ".join(f"{label}: {count}" for label, count in seeds.items())
        yield f"The numbers of seeds differ ({counts})."
    for entry in comparison.entries:
        folds: dict[int, set[int]] = defaultdict(set)
        for run in entry.runs:
            folds[run.seed] |= set() if run.fold is None else {run.fold}
        if len({frozenset(own) for own in folds.values()}) > 1:
            own = ", ".join(f"seed {seed}: {sorted(f)}" for seed, f in sorted(folds.items()))
            yield f"{entry.label}: the seeds have different folds ({own})."


def _settings(comparison: Comparison) -> Iterator[str]:
    def differ(part: str, key: str) -> bool:
        values = (entry.runs[0].config.get(part) or {} for entry in comparison.entries)
        return len({str(value.get(key)) for value in values}) > 1

    settings = ("preprocessing", "size", "intensity", "window", "spacing")
    if different := [f"data.{key}" for key in settings if differ("data", key)]:
        yield (
            f"The entries differ in {', '.join(different)}, so the networks saw other images. "
            "All scores are at native resolution all the same."
        )
    if differ("evaluation", "keep_largest"):
        yield "Only some entries keep the largest component before scoring."
    if len({str(e.runs[0].setting.get("model.pretrained")) for e in comparison.entries}) > 1:
        yield "Only some entries start from pretrained weights, or from different ones."


def _outcomes(comparison: Comparison) -> Iterator[str]:
    policy = comparison.protocol["empty masks"]
    for entry in comparison.entries:
        counts = outcomes(entry)
        if counts["missed"]:
            left_out = (
                "These have no surface distance and are left out of HD95 and ASSD"
                if policy == "strict"
                else "What their distances count as depends on the policy"
            )
            yield (
                f"{entry.label} found nothing for {counts['missed']} of {sum(counts.values())} "
                f'structures. {left_out} (policy "{policy}").'
            )


def _origins(comparison: Comparison) -> Iterator[str]:
    def distinct(part: str, key: str) -> list[Any]:
        return sorted({(r.record.get(part) or {}).get(key) for r in comparison.runs} - {None})

    if len(distinct("code", "digest")) > 1:
        yield "The runs were made by different versions of the code (Runs lists the commits)."
    devices = sorted({device(run.record) for run in comparison.runs})
    if len(devices) > 1:
        yield f"The runs used different hardware, so times differ: {', '.join(devices)}."
    versions = distinct("versions", "torch")
    if len(versions) > 1:
        yield f"The runs used different versions of torch: {', '.join(versions)}."
    last = [run.path.name for run in comparison.runs if run.summary.get("checkpoint") == "last"]
    if last:
        yield f"There was no best checkpoint, so the last one was scored: {', '.join(last)}."
    if skipped := [run.path.name for run in comparison.runs if run.record.get("skipped")]:
        yield f"Training skipped steps that were not finite in {', '.join(skipped)}."
