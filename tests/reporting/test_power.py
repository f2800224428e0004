"""How many seeds and patients a difference needs: against experiments that are drawn and tested."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from fake_runs import write_run
from scipy import stats

from mambaseg.app.commands import report
from mambaseg.errors import UserError
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.power import (
    NEVER,
    Components,
    _doubt,
    components,
    least,
    patient_scores,
    power,
    power_grids,
    smallest_difference,
)
from mambaseg.reporting.runs import RunData

ABSENT = "both_empty"

TRUE = Components(0.03**2, (0.006**2, 0.012**2), (0.02**2, 0.03**2))


FEW_VARY = Components(0.0, (0.02**2, 0.02**2), (0.005**2, 0.005**2))


def experiments(count, seeds, patients, difference, true=TRUE):
    """Scores of both networks, each (count, seeds, patients), as the model says that they vary."""
    draw = np.random.default_rng(0).normal
    favour = draw(0, true.patients**0.5, (count, 1, patients)) / 2
    hearts = draw(0.8, 0.1, (count, 1, patients))  # how difficult each is, for both
    return [
        hearts + sign * (favour + difference / 2)
        + draw(0, true.seeds[k] ** 0.5, (count, seeds, 1))
        + draw(0, true.rest[k] ** 0.5, (count, seeds, patients))
        for k, sign in enumerate((1, -1))
    ]  # fmt: skip


def found(first, second):
    """Share of the experiments in which a t test finds the first network better.

    Mean squares are sums of squares over degrees of freedom, as textbooks have them.
    """
    _, seeds, patients = first.shape
    paired = (first - second).mean(1)
    scale = seeds * patients
    terms, variance, of_rest = [], 0.0, 0.0
    for scores in (first, second):
        total = scores - scores.mean((1, 2), keepdims=True)
        of_seeds = total.mean(2, keepdims=True)
        of_patients = total.mean(1, keepdims=True)
        left = ((total - of_seeds - of_patients) ** 2).sum((1, 2))
        rest = left / ((seeds - 1) * (patients - 1))
        own = np.maximum(patients * (of_seeds**2).sum((1, 2)) / (seeds - 1), rest)
        terms += [(own / scale, seeds - 1), (rest / scale, (seeds - 1) * (patients - 1))]
        variance = variance + own / scale
        of_rest = of_rest + rest / scale
    favour = np.maximum(paired.var(1, ddof=1) / patients, of_rest)  # no component is below 0
    terms.append((favour, patients - 1))
    variance = np.maximum(variance + favour - of_rest, 1e-12)
    free = variance**2 / sum(value**2 / degrees for value, degrees in terms)
    t = paired.mean(1) / np.sqrt(variance)
    return (stats.t.sf(t, np.maximum(free, 1)) < 0.025).mean()


@pytest.mark.parametrize("true", [TRUE, FEW_VARY])
@pytest.mark.parametrize(("seeds", "patients"), [(2, 10), (3, 20), (8, 100), (20, 40)])
def test_the_power_is_how_often_drawn_experiments_find_a_difference(seeds, patients, true):
    difference = smallest_difference(true, seeds, patients, 0.8)
    assert power(true, seeds, patients, difference) == pytest.approx(0.8, abs=1e-3)
    drawn = found(*experiments(3000, seeds, patients, difference, true))
    assert drawn == pytest.approx(0.8, abs=0.022)  # three standard errors
    half = power(true, seeds, patients, difference / 2)
    drawn = found(*experiments(3000, seeds, patients, difference / 2, true))
    assert drawn == pytest.approx(half, abs=0.028)
    assert found(*experiments(3000, seeds, patients, 0.0, true)) < 0.025 + 0.012


def test_the_components_are_those_that_scores_were_drawn_with():
    drawn = [
        components(a, b)
        for a, b in zip(*experiments(1000, 6, 50, 0.01), strict=True)
    ]  # fmt: skip
    assert np.mean([difference for difference, _ in drawn]) == pytest.approx(0.01, abs=0.002)
    for own, true in zip(zip(*(parts for _, parts in drawn), strict=True), TRUE, strict=True):
        assert np.mean(own, 0) == pytest.approx(true, rel=0.1)


def test_with_few_patients_no_number_of_seeds_is_enough_and_the_other_way_round():
    def enough(seeds, patients):
        return power(TRUE, seeds, patients, 0.01) >= 0.8

    assert least(lambda seeds: enough(seeds, 20)) is None
    assert least(lambda patients: enough(3, patients)) is None
    seeds = least(lambda seeds: enough(seeds, 200))
    assert enough(seeds, 200) and not enough(seeds - 1, 200)
    # without a test to pay for: (1.96 + 0.84)² V = difference², the formula of sample sizes
    alone = Components(0.03**2, (0.0, 0.0), (0.0, 0.0))
    patients = least(lambda patients: power(alone, 2, patients, 0.003) >= 0.8)
    assert patients == pytest.approx((2.8016 * 0.03 / 0.003) ** 2, rel=0.01)


def entry(label, *seeds):
    """A network by its Dice, {(patient, class): value} of each seed; None: missed, or ABSENT."""
    runs = []
    for seed, scores in enumerate(seeds):
        rows = tuple(
            {"patient": patient, "case": f"{patient}_ED", "class": index,
             "dice": None if value == ABSENT else value,
             "outcome": ABSENT if value == ABSENT else "missed" if value is None else "scored"}
            for (patient, index), value in scores.items()
        )  # fmt: skip
        runs.append(RunData(Path(), {}, {"seed": seed, "model": {"name": label}}, {}, rows))
    return Entry(label, tuple(runs))


def test_numbers_are_the_smallest_that_are_enough_for_every_pair(monkeypatch):
    draw, patients, difference = np.random.default_rng(1).normal, 20, 0.008

    def drawn(label, seeds):
        scores = 0.8 + draw(0, 0.02, patients) + draw(0, 0.001, (seeds, 1))
        scores = scores + draw(0, 0.01, (seeds, patients))
        return entry(label, *({(f"p{j:02}", 1): own[j] for j in range(patients)} for own in scores))

    def first_enough(powers):  # of 2, 3, ...
        return next((str(n) for n, found in enumerate(powers, 2) if found >= 0.8), NEVER)

    entries = drawn("a", 3), drawn("b", 3), drawn("c", 2)
    about = dict.fromkeys(("data", "split", "split hash", "policy"), "")
    monkeypatch.setattr(
        "mambaseg.reporting.power.collect", lambda _: ([Comparison(about, entries)], [], [])
    )
    _, needs = power_grids("", difference=difference)
    assert needs.header[1:] == ["20 patients", "100 patients", "1,000 patients", "3 seeds"]
    for pair, row in zip(combinations(entries, 2), needs.rows, strict=True):
        _, parts = components(*patient_scores(*pair))
        expected = [
            first_enough(power(parts, seeds, size, difference) for seeds in range(2, 100))
            for size in (20, 100, 1000)
        ]
        expected.append(first_enough(power(parts, 3, size, difference) for size in range(2, 300)))
        assert row[1:] == expected


def test_only_structures_that_all_runs_have_scored_count_and_none_that_both_left_out_rightly():
    one = {("p", 1): 0.8, ("p", 2): ABSENT, ("q", 1): 0.6, ("q", 2): 0.9, ("q", 3): ABSENT,
           ("q", 4): 0.5, ("r", 1): ABSENT}  # fmt: skip
    other = {**one, ("q", 1): 0.4, ("q", 3): 0.0}  # invents 3 in q
    without = {key: value for key, value in one.items() if key != ("q", 4)}
    first, second = patient_scores(
        entry("a", one, {**one, ("q", 2): None}), entry("b", other, {**without, ("q", 3): 0.0})
    )
    # of p structure 1; of q 1 and 3, which is right in a and wrong in b; of r nothing
    assert first == pytest.approx(np.array([[0.8, 0.8], [0.8, 0.8]]))
    assert second == pytest.approx(np.array([[0.8, 0.2], [0.8, 0.3]]))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "hearts"
    for seed in (1, 2):
        write_run(folder, "unet", seed=seed, patients=range(1, 5), size=16)
        write_run(folder, "mamba_unet", seed=seed, error=0.8, patients=range(1, 5), size=16)
    write_run(folder, "swin_unet", patients=range(1, 5), size=16)  # a single seed
    return folder


def test_no_difference_above_one_is_called_findable():
    wild = Components(patients=0.01, seeds=(0.1, 0.1), rest=(0.01, 0.01))
    assert smallest_difference(wild, 2, 20, 0.8) is None


def test_the_table_has_the_pairs_with_two_seeds_each(experiment):
    variation, needs = power_grids(experiment, difference=0.5)
    assert [grid.rows[0][0] for grid in (variation, needs)] == ["unet − mamba_unet"] * 2
    assert float(variation.rows[0][1]) > 0 and len(needs.rows) == 1
    assert needs.header[1:] == ["4 patients", "100 patients", "1,000 patients", "2 seeds"]
    assert max(map(int, needs.rows[0][1:])) < 6  # half of all Dice is found by anybody
    _, needs = power_grids(experiment, difference=1e-9)
    assert needs.rows[0][1:] == [NEVER] * 4
    assert needs.notes[-1] == (
        "Left out: 2 pairs with a single seed of a network, or fewer than two patients that all "
        "runs have scored."
    )
    _, needs = power_grids(experiment, networks=["unet", "mamba_unet"])
    assert len(needs.rows) == 1 and "Left out" not in needs.notes[-1]


def test_each_pair_is_told_with_its_own_numbers(experiment, tmp_path):
    for path in experiment.iterdir():
        shutil.copytree(path, tmp_path / path.name)
    for seed in (2, 3):
        write_run(tmp_path, "swin_unet", seed=seed, patients=range(1, 5), size=16)
    write_run(tmp_path, "unet", seed=3, patients=range(1, 5), size=16)
    variation, _ = power_grids(tmp_path)
    for label in (row[0] for row in variation.rows):
        seeds = [2 if name == "mamba_unet" else 3 for name in label.split(" − ")]
        told = " and ".join(map(str, dict.fromkeys(seeds)))
        assert f"{label}: 4 patients, {told} seeds" in variation.notes[0]
    assert "of unequal numbers of seeds, with the smaller one" in variation.notes[1]
    assert "unequal" not in power_grids(experiment)[0].notes[1]
    assert variation.notes[-1] == power_grids(experiment)[0].notes[-1]  # of the fewest seeds


def test_a_section_without_numbers_is_named(experiment, tmp_path):
    shutil.copytree(experiment, tmp_path, dirs_exist_ok=True)
    for seed in (1, 2):
        write_run(tmp_path, "unet", seed=seed, patients=(1, 2), size=16, policy="legacy",
                  name="alone")  # fmt: skip
    _, needs = power_grids(tmp_path)
    assert needs.notes[-1].startswith("No two networks with two seeds each: ")
    assert "empty masks: legacy" in needs.notes[-1]
    assert not any("No two networks" in note for note in power_grids(experiment)[1].notes)


def test_the_command_prints_it_and_refuses_what_says_nothing(experiment, tmp_path, capsys):
    report.main(["power", "--difference", "0.01", str(experiment)])
    printed = capsys.readouterr().out
    assert "a difference of 0.01 Dice" in printed and "80 of 100 repetitions" in printed
    assert max(map(len, printed.splitlines())) <= 80 and "unet − mamba_unet" in printed
    write_run(tmp_path / "one", "unet", patients=(1, 2), size=16)
    write_run(tmp_path / "one", "mamba_unet", patients=(1, 2), size=16)
    with pytest.raises(UserError, match="two seeds of each network"):
        report.main(["power", str(tmp_path / "one")])
    with pytest.raises(UserError, match="at least two networks"):
        report.main(["power", str(experiment), "--networks", "unet"])
    with pytest.raises(
        UserError, match="--networks: no mamba here, but mamba_unet, swin_unet, unet"
    ):
        report.main(["power", str(experiment), "--networks", "unet,mamba"])
    with pytest.raises(UserError, match="statis: no such folder; did you mean status"):
        report.main(["statis", str(experiment)])
    report.main(["power", "--networks", "unet,mamba_unet", str(experiment)])
    with pytest.raises(UserError, match="--difference is between 0 and 1"):
        report.main(["power", "--difference", "-1", str(experiment)])


def test_the_doubt_is_the_interval_of_a_pooled_deviation():
    # 4 degrees of freedom: sqrt(4 / 11.143) and sqrt(4 / 0.4844), of tables of chi squared
    assert "0.6 to 2.9 times" in _doubt(3)
