"""Against SciPy, published examples and numbers worked out by hand."""

import math
from functools import partial
from itertools import combinations, product
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.paired import (
    MOST,
    Paired,
    Scored,
    _bootstrap_interval,
    _holm,
    _signed_ranks,
    compare,
    compared,
    digits,
    pairs,
    scored,
    tables,
    verdict,
)
from mambaseg.reporting.runs import RunData
from mambaseg.reporting.scores import mean_sd
from mambaseg.reporting.variation import Components, p_and_share, spread


def test_mean_and_sample_sd():
    assert mean_sd([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean_sd([0.5]) == (0.5, None)
    assert mean_sd([]) == (None, None)


def test_wilcoxon_counts_sign_patterns():
    differences = [0.3, -0.1, 0.4, 0.6, 0.2, 0.5]  # ranks 3 1 4 6 2 5: the smaller sum is 1
    sums = [sum(r for r, s in zip((1, 2, 3, 4, 5, 6), signs, strict=True) if s)
            for signs in product((0, 1), repeat=6)]  # fmt: skip
    exact = 2 * sum(total <= 1 for total in sums) / len(sums)
    assert _signed_ranks(differences)[0] == pytest.approx(exact) == pytest.approx(4 / 64)


def test_wilcoxon_drops_zeros_and_is_one_without_any_difference():
    differences = [0.3, -0.1, 0.4, 0.6, 0.0, 0.2, 0.5]
    assert _signed_ranks(differences)[0] == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert _signed_ranks([0.0, 0.0, 0.0]) == (1.0, 0.0)
    # five differences have 32 patterns of signs, however many zeros there are beside them
    assert _signed_ranks([0.0] * 15 + [0.1, 0.2, 0.3, 0.4, 0.5])[0] == pytest.approx(2 / 32)


@pytest.mark.parametrize("count", [5, 9, 12])
def test_wilcoxon_counts_the_signs_of_ties_too(count):
    differences = np.random.default_rng(count).integers(-3, 6, count).astype(float)
    differences[differences == 0] = 1
    ranks = stats.rankdata(np.abs(differences))
    sums = np.array([ranks @ signs for signs in product((0, 1), repeat=count)])
    found = ranks[differences > 0].sum()
    exact = 2 * min((sums <= found).mean(), (sums >= found).mean())
    assert _signed_ranks(differences)[0] == pytest.approx(min(1, exact))


def test_wilcoxon_of_many_patients_is_scipys():
    draw = np.random.default_rng(0)
    for count in (49, 50, 51, 80):
        differences = draw.normal(0.2, 1, count)
        assert _signed_ranks(differences)[0] == pytest.approx(stats.wilcoxon(differences).pvalue)


def test_patients_that_differ_are_not_told_as_seeds_that_vary():
    values = [0.5 + one for one in (0.010, 0.011, 0.012, 0.009, 0.013, 0.2, 0.008)]
    a, b = entry("a", values, values), entry("b", [0.5] * 7, [0.5] * 7)
    found = compare(scored(a, DICE), scored(b, DICE), DICE)
    assert found.p < 0.05 < found.p_seeds and found.seeds_share == pytest.approx(0, abs=1e-9)
    assert verdict(found).endswith("who differ so much that others might not show it")


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, never below the one before
    assert _holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert _holm([0.6, 0.5]) == [1.0, 1.0]
    assert _holm([]) == []
    # two of six hypotheses were tested: the smallest counts six times, the next five times
    assert _holm([0.01, 0.005], 6) == pytest.approx([0.05, 0.03])


@pytest.mark.parametrize(
    ("differences", "share"),
    [
        ([0.3, -0.1, 0.4], (2 - 1 + 3) / 6),
        ([0.2, -0.2, 0.0], 0.0),  # a tie of ranks, a zero that counts nothing
        ([1.0, -2.0, 2.0, 3.0], (1 - 2.5 + 2.5 + 4) / 10),
    ],
)
def test_rank_biserial_by_hand(differences, share):
    assert _signed_ranks(differences)[1] == pytest.approx(share)


def test_the_bootstrap_interval_is_repeatable_and_that_of_a_mean(monkeypatch):
    values = np.random.default_rng(1).normal(0.02, 0.05, 60)
    low, high = _bootstrap_interval(values)
    assert (low, high) == _bootstrap_interval(values)
    error = values.std(ddof=1) / math.sqrt(60)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    all_at_once = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile",
                                  rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    monkeypatch.setattr("mambaseg.reporting.paired._AT_ONCE", 60 * 999)  # 10 parts and a rest
    assert _bootstrap_interval(values) == (low, high) == tuple(all_at_once)
    assert _bootstrap_interval([0.25] * 4) == (0.25, 0.25)
    assert _bootstrap_interval([0.25]) == (None, None)


def test_one_test_counts_how_seeds_and_patients_vary():
    """Against the formulas of an analysis of variance by hand, two and three seeds."""
    draw = np.random.default_rng(5)
    hearts, favour = draw.normal(0.8, 0.1, 12), draw.normal(0, 0.02, 12)
    first = hearts + favour + draw.normal(0, 0.02, (2, 1)) + draw.normal(0, 0.01, (2, 12))
    second = hearts + draw.normal(0, 0.02, (3, 1)) + draw.normal(0, 0.01, (3, 12))
    difference = first.mean(0) - second.mean(0)
    terms = [(difference.var(ddof=1) / 12, 11)]
    variance = terms[0][0]
    for scores in (first, second):
        count = len(scores)
        left = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
        rest = (left**2).sum() / (11 * (count - 1)) / 12 / count
        means = scores.mean(1).var(ddof=1) / count
        terms += [(means, count - 1), (rest, 11 * (count - 1))]
        variance += means - rest
    free = variance**2 / sum(value**2 / degrees for value, degrees in terms)
    p = 2 * stats.t.sf(abs(difference.mean()) / math.sqrt(variance), free)
    assert p_and_share(first, second)[0] == pytest.approx(p)
    assert 0.01 < p < 0.9
    assert p_and_share(first, first)[0] == 1.0
    assert p_and_share(np.full((2, 6), 0.8), np.full((2, 6), 0.7))[0] == 0.0


@pytest.mark.parametrize(("count", "seeds", "patients"), [(2, 3, 20), (5, 3, 20), (10, 3, 50)])
def test_of_equal_networks_few_reports_find_a_pair_that_differs(count, seeds, patients):
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        networks = [
            draw.normal(0, 0.014, patients) + draw.normal(0, 0.006, (seeds, 1))
            + draw.normal(0, 0.02, (seeds, patients)) for _ in range(count)
        ]  # fmt: skip
        p = [p_and_share(a, b)[0] for a, b in combinations(networks, 2)]
        wrong += min(_holm(p)) < 0.05
    assert wrong <= 0.06 * 200


def test_the_verdict_is_that_of_the_corrected_p():
    """Of three networks and of two: the same pair, whose p is between 0.05 / 3 and 0.05."""
    draw = np.random.default_rng(4)
    hearts = draw.normal(0.8, 0.05, 20)

    def trained(mean):
        return [(hearts + mean + shift + draw.normal(0, 0.001, 20)).tolist()
                for shift in (-0.01, 0, 0.01)]  # fmt: skip

    one, other, third = (entry(str(k), *trained(mean)) for k, mean in enumerate((0.03, 0, 0.012)))
    (alone,) = pairs(Comparison({}, (one, other)), DICE)
    among = pairs(Comparison({}, (one, other, third)), DICE)[0]
    assert 0.05 / 3 < alone.p_seeds < 0.05 < among.p_seeds == pytest.approx(3 * alone.p_seeds)
    assert verdict(alone).endswith("by more than patients and seeds vary")
    assert verdict(among).endswith("this could be seed-to-seed variation")


def test_a_seed_without_some_patients_changes_no_verdict():
    """Two seeds that differ by much; one lacks the difficult patients, as without its last fold."""
    draw = np.random.default_rng(1)
    hearts = np.concatenate([draw.normal(0.9, 0.005, 8), draw.normal(0.6, 0.005, 4)])
    first = [(hearts + shift + draw.normal(0, 0.001, 12)).tolist() for shift in (0.03, 0.07)]
    second = [(hearts + draw.normal(0, 0.001, 12)).tolist() for _ in range(2)]
    part = [*second[1][:8], *[None] * 4]
    for lacking in (part, part[:8]):  # without a score, without a row
        (found,) = pairs(Comparison({}, (entry("a", *first), entry("b", second[0], lacking))), DICE)
        assert (found.patients, found.left_out, found.undefined) == (8, 4, 4)
        assert found.difference == pytest.approx(0.05, abs=0.002)
        assert "could be seed-to-seed variation" in verdict(found)


def test_rows_of_folds_that_share_their_patients_are_averaged_first():
    rows = [
        {"patient": "p", "case": "p", "class": 1, "dice": value, "outcome": "scored"}
        for value in (0.7, 0.8, 0.3)
    ]
    runs = [RunData(Path(), {}, {"seed": 0}, {}, tuple(rows[:2])),
            RunData(Path(), {}, {"seed": 1}, {}, tuple(rows[2:]))]  # fmt: skip
    assert scored(Entry("n", tuple(runs)), DICE).structures == {
        ("p", "p", 1): [pytest.approx(0.75), 0.3]
    }


DICE = Metric("dice", "Dice")
DISTANCE = Metric(
    "hd95_mm", "HD95", unit="mm", higher_is_better=False, decimals=2, empty="distance"
)


def entry(name, *seeds, **outcomes):
    """A network with the given scores, a case and a class per patient: a list per seed.

    `outcomes` are of all seeds, by patient: `p3="both_empty"`.
    """
    runs = []
    for seed, values in enumerate(seeds):
        rows = [{"patient": f"p{i}", "case": f"p{i}_ED", "class": 1, "dice": value,
                 "hd95_mm": value, "outcome": outcomes.get(f"p{i}", "scored")}
                for i, value in enumerate(values)]  # fmt: skip
        runs.append(RunData(Path(), {}, {"seed": seed}, {}, tuple(rows)))
    return Entry(name, tuple(runs))


def test_a_comparison_uses_patients_that_both_have():
    a = entry("a", [0.9, 0.8, None, 0.7])
    b = entry("b", [0.8, 0.9, 0.5, 0.7, 0.1], [0.8, 0.9, 0.5, 0.7, 0.1])
    pair = compare(scored(a, DICE), scored(b, DICE), DICE)
    assert (pair.patients, pair.left_out, pair.undefined) == (3, 2, 2)
    assert (pair.wins, pair.losses) == (1, 1)
    assert pair.difference == pytest.approx(fmean([0.1, -0.1, 0.0]))
    assert (pair.first_seeds, pair.second_seeds) == (1, 2) and pair.p_seeds is None
    nothing = scored(entry("a", [None]), DICE)
    assert compare(nothing, scored(entry("b", [0.5]), DICE), DICE) is None


def test_of_many_networks_the_best_is_compared_with_each_other_one():
    few = [entry(f"n{i}", [i / 100]) for i in range(MOST)]
    assert len(compared(few)) == MOST * (MOST - 1) / 2
    best = entry("best", [0.9])
    many = [*few, best, entry("one more", [0.1])]
    assert [(a.label, b.label) for a, b in compared(many)] == [
        ("best", one.label) for one in many if one is not best
    ]


def test_of_many_networks_the_best_was_chosen_from_all_pairs(monkeypatch):
    monkeypatch.setattr("mambaseg.reporting.paired.MOST", 3)
    values = np.random.default_rng(0).uniform(0.5, 0.6, (4, 20))
    values[1] += 0.2
    networks = [entry(f"n{i}", own.tolist()) for i, own in enumerate(values)]
    comparison = Comparison({}, tuple(networks))
    found = pairs(comparison, DICE)
    smallest = min(found, key=lambda pair: pair.p)
    assert len(found) == 3 and smallest.p_holm == pytest.approx(6 * smallest.p)
    assert smallest.p_least == pytest.approx(6 * 2.0**-19)


def test_a_structure_that_one_misses_does_not_count_for_the_other():
    found = {("p", "p_ED", 1): [40.0], ("p", "p_ED", 2): [2.0], ("p", "p_ES", 2): [4.0]}
    missed = {("p", "p_ED", 1): None, ("p", "p_ED", 2): [3.0], ("p", "p_ES", 2): [4.0]}
    of = partial(Scored, "", 1, absent=frozenset(), failed=frozenset())
    assert tables(of(found), of(missed)) == ([([3.0], [3.5])], 0, 1)


def test_what_one_network_invents_counts_against_it():
    """Of tumours in half of the patients, one network invents those of the other half."""
    healthy = {f"p{i}": "both_empty" for i in range(10, 20)}
    invents = dict.fromkeys(healthy, "false_positive")
    there = np.random.default_rng(0).uniform(0.8, 0.9, 10).tolist()
    sober = entry("sober", [*there, *[None] * 10], [*there, *[None] * 10], **healthy)
    eager = [value + 0.01 for value in there] + [0.0] * 10
    eager = entry("eager", eager, eager, **invents)
    found = compare(scored(sober, DICE), scored(eager, DICE), DICE)
    assert found.patients == 20 and found.undefined == 0
    assert found.difference == pytest.approx(0.5 - 0.005)
    assert (found.wins, found.losses) == (10, 10)
    both = compare(scored(sober, DICE), scored(sober, DICE), DICE)
    assert both.patients == 10 and both.undefined == 10  # nothing that either could be better at
    distances = compare(scored(sober, DISTANCE), scored(eager, DISTANCE), DISTANCE)
    assert (distances.first_failed, distances.second_failed) == (0, 0)  # a value by this policy
    for run in eager.runs:
        for row in run.rows:
            row["hd95_mm"] = None if row["outcome"] == "false_positive" else 0.5
    distances = compare(scored(sober, DISTANCE), scored(eager, DISTANCE), DISTANCE)
    assert distances.patients == 10 and distances.second_failed == 10
    told = verdict(distances, higher_is_better=False)
    assert "eager scores better on what both have found" in told and "alone missed or in" in told


def test_a_missed_structure_is_no_short_distance_under_legacy():
    """It scores 0, the best distance: of a network that misses all but one no mean is good."""
    missing = {f"p{i}": "missed" for i in range(1, 12)}
    sober = entry("sober", *[[3.0 + i / 10 for i in range(12)]] * 2)
    blind = entry("blind", *[[4.0, *[0.0] * 11]] * 2, **missing)
    for run in (*sober.runs, *blind.runs):
        for row in run.rows:
            row["policy"] = "legacy"
    found = compare(scored(sober, DISTANCE), scored(blind, DISTANCE), DISTANCE)
    assert (found.patients, found.left_out, found.second_failed) == (1, 11, 11)
    assert found.difference == pytest.approx(-1)


def test_ranks_do_not_see_the_last_digits_of_equal_means():
    a, b = entry("a", [0.1], [0.2]), entry("b", [0.05], [0.25])
    one, other = (scored(network, DICE) for network in (a, b))
    assert np.mean(one.structures["p0", "p0_ED", 1]) != np.mean(other.structures["p0", "p0_ED", 1])
    found = compare(one, other, DICE)
    assert (found.wins, found.losses, found.effect) == (0, 0, 0.0)
    assert (found.low, found.high) == (None, None)


def test_smaller_distances_win():
    a, b = entry("a", [2.0, 3.0, 1.0]), entry("b", [4.0, 1.0, 4.0])
    pair = compare(scored(a, DISTANCE), scored(b, DISTANCE), DISTANCE)
    assert (pair.wins, pair.losses) == (2, 1)


def pair(**changes):
    numbers = {"patients": 20, "left_out": 0, "undefined": 0, "difference": 0.02,
               "low": 0.01, "high": 0.03, "p": 0.001, "p_holm": 0.003, "p_least": 1e-5,
               "effect": 0.8, "wins": 18, "losses": 2, "first_seeds": 2,
               "second_seeds": 3, "p_seeds": 0.01, "seeds_share": 0.6}  # fmt: skip
    return Paired("a", "b", **{**numbers, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "a scores better, by more than"),
        (
            {"difference": -0.02, "low": -0.03, "high": -0.01, "effect": -0.8},
            "b scores better, by more than",
        ),
        ({"p_holm": 0.2}, "within noise"),
        ({"low": -0.001}, "within noise"),
        ({"patients": 5, "p_least": 1 / 16}, "too few patients (5)"),
        ({"p_seeds": None, "first_seeds": 1, "second_seeds": 1}, "with a single seed per network"),
        ({"p_seeds": None, "second_seeds": 1}, "with a single seed of b seed-to-seed"),
        ({"p_seeds": 0.06, "seeds_share": 0.1}, "who differ so much that others might not show it"),
        ({"effect": -0.35}, "no verdict: a is better on average, b by the ranks"),
        ({"first_failed": 3, "second_failed": 1}, "it alone missed or invented 3 structures, b"),
        ({"first_failed": 1, "second_failed": 3}, "a scores better, by more than"),
        (
            {"p_seeds": 0.06},
            "as few as two seeds per network this could be seed-to-seed variation",
        ),
    ],
)
def test_verdicts(changes, said):
    told = verdict(pair(**changes))
    assert said in told


def test_a_small_difference_has_as_many_decimals_as_its_interval_needs():
    assert digits(pair(), 3) == 3
    assert digits(pair(difference=0.0004, low=0.0003, high=0.0005), 3) == 4
    assert digits(pair(difference=-4e-9, low=-5e-9, high=-3e-9), 3) == 7
    assert digits(pair(low=None, high=None), 2) == digits(pair(low=0.0), 2) == 2


def test_of_a_distance_the_smaller_is_better():
    assert verdict(pair(), higher_is_better=False).startswith("b scores better")


def test_six_patients_can_reach_significance_and_five_cannot():
    assert _signed_ranks([1, 2, 3, 4, 5, 6])[0] < 0.05 < _signed_ranks([1, 2, 3, 4, 5])[0]


def test_pairs_without_seeds_count_in_the_correction_of_the_others():
    draw = np.random.default_rng(0)
    a, b = (
        entry(name, *draw.normal(mean, 0.02, (2, 12)).tolist())
        for name, mean in (("a", 0.8), ("b", 0.7))
    )
    c = entry("c", draw.normal(0.8, 0.05, 12).tolist())  # a single seed
    (alone,) = pairs(Comparison({}, (a, b)), DICE)
    found = pairs(Comparison({}, (a, b, c)), DICE)
    assert [pair.p_seeds is None for pair in found] == [False, True, True]
    assert alone.p_seeds < 1 / 3 and found[0].p_seeds == pytest.approx(3 * alone.p_seeds)


def test_few_patients_and_seeds_leave_half_a_degree_of_freedom():
    # of two patients and seeds all five mean squares are of one degree: 1/2 once, 1/4 four times
    alone = Components(0.0, (0.0, 0.0), (1.0, 1.0))
    assert spread(alone, (2, 2), 2) == pytest.approx((0.5, 0.25 / (0.25 + 4 / 16)))
