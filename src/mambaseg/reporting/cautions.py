"""What a reader must know before believing a comparison; each a sentence on top of its section."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from mambaseg.reporting.collect import Comparison
from mambaseg.reporting.costs import conditions
from mambaseg.reporting.runs import UNKNOWN, RunData, ended_early
from mambaseg.reporting.scores import outcomes
from mambaseg.reporting.tables import seen_note


def cautions(comparison: Comparison) -> list[str]:
    """All sentences about one comparison, the gravest first."""
    parts = (_data, _labels, _patients, _repeats, _missed, _differences)
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
            yield f'Split "{split}": {note}'
    hashes: dict[str, set[str]] = defaultdict(set)
    for run in comparison.runs:
        hashes[run.split["name"]].add(str(run.split["hash"]))
    for name, several in hashes.items():
        if len(several) > 1:
            yield (
                f"Split {name} does not have the same patients in all runs "
                f"({', '.join(sorted(several))}): their scores are not comparable."
            )


def _labels(comparison: Comparison) -> Iterator[str]:
    told: dict[str, list[str]] = defaultdict(list)
    for entry in comparison.entries:
        for labels in {run.supervision: None for run in entry.runs if run.supervision != UNKNOWN}:
            told[labels].append(entry.label)
    if len(told) > 1:
        parts = "; ".join(f"{labels}: {', '.join(entries)}" for labels, entries in told.items())
        yield (
            f"The entries learnt from different labels ({parts}), so a difference is not the "
            "method's alone."
        )
    for entry in comparison.entries:
        counts = Counter(run.chosen for run in entry.runs)
        if len(counts) > 1:
            own = ", ".join(f"{name}: {count}" for name, count in counts.most_common())
            yield (
                f"{entry.label}: the network that is the result was chosen in validation, and is "
                f"not the same in all runs ({own})."
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
            if repeated := {case for (case, _), count in counts.items() if count > 1}:
                yield (
                    f"{entry.label}, seed {seed}: {len(repeated)} cases are in the test set of "
                    "more than one fold and count more than once."
                )


def _repeats(comparison: Comparison) -> Iterator[str]:
    trained = [entry for entry in comparison.entries if not entry.runs[0].rescored]
    seeds = {entry.label: len(entry.by_seed) for entry in trained}
    if single := [label for label, count in seeds.items() if count == 1]:
        yield (
            f"Only one seed was trained for {', '.join(single)}, so seed-to-seed variation is "
            "unknown."
        )
    if len(set(seeds.values())) > 1:
        counts = ", ".join(f"{label}: {count}" for label, count in seeds.items())
        yield f"The numbers of seeds differ ({counts})."
    for entry in comparison.entries:
        folds: dict[int, list[int | None]] = defaultdict(list)
        for run in entry.runs:
            folds[run.seed].append(run.fold)
        if len(set(map(tuple, folds.values()))) > 1:
            own = ", ".join(f"seed {seed}: {numbers}" for seed, numbers in folds.items())
            yield f"{entry.label}: the seeds have different folds ({own})."


def _missed(comparison: Comparison) -> Iterator[str]:
    policy = comparison.protocol["policy"]
    consequence = "The policy decides which distance they count with"
    if policy == "strict":
        consequence = "These have no surface distance and are left out of HD95 and ASSD"
    for entry in comparison.entries:
        counts = outcomes(entry)
        there, absent = (
            counts[name] + counts[other]
            for name, other in (("missed", "scored"), ("false_positive", "both_empty"))
        )
        told = []
        if missed := counts["missed"]:
            told.append(f"found nothing for {missed} of {there} structures")
        if invented := counts["false_positive"]:
            told.append(f"invented {invented} of {absent} that are not there")
        if told:
            yield f'{entry.label} {" and ".join(told)}. {consequence} (policy "{policy}").'


def _keeps_largest(run: RunData) -> bool:
    """Whether any largest component was kept; of `auto` validation has decided."""
    chosen = run.summary.get("keep_largest")
    given = (run.config.get("evaluation") or {}).get("keep_largest")
    return bool(given if chosen is None else chosen)


def _differences(comparison: Comparison) -> Iterator[str]:
    settings = ("preprocessing", "size", "intensity", "window", "spacing", "ct")
    own = [entry.runs[0].config["data"] for entry in comparison.entries]
    if keys := [key for key in settings if len({str(data.get(key)) for data in own}) > 1]:
        side = comparison.protocol.get("longest side")
        scale = f"on images of at most {side} pixels a side" if side else "at native resolution"
        yield (
            f"The entries differ in {', '.join(f'data.{key}' for key in keys)}, so the networks "
            f"saw other images. All scores are {scale} all the same."
        )
    runs = comparison.runs
    shared: dict[str, list[Any]] = {
        "Only some entries keep the largest component before scoring.": [
            _keeps_largest(run) for run in runs
        ],
        "Only some entries start from pretrained weights, or from different ones.": [
            run.setting.get("model.pretrained") or run.setting.get("init_from") or "none"
            for run in runs
        ],
        "The runs were made by different versions of the code (Runs lists the commits).": [
            (run.record.get("code") or {}).get("digest") for run in runs
        ],
        "The runs had different conditions, so times differ: {}.": list(map(conditions, runs)),
        "The runs used different versions of torch: {}.": [
            (run.record.get("versions") or {}).get("torch") for run in runs
        ],
    }
    for sentence, values in shared.items():
        distinct = {str(value) for value in values} - {"None"}
        if len(distinct) > 1:
            yield sentence.format(", ".join(sorted(distinct)))
    if last := [run.path.name for run in runs if run.summary.get("checkpoint") == "last"]:
        yield f"There was no best checkpoint, so the last one was scored: {', '.join(last)}."
    if short := [f"{run.path.name} (step {n})" for run in runs if (n := ended_early(run))]:
        yield f"A callback or trainer.max_time ended trainings early: {', '.join(short)}."
    if skipped := [run.path.name for run in runs if run.record.get("skipped")]:
        yield f"Training skipped steps that were not finite: {', '.join(skipped)}."
