import pytest

from mambaseg.callbacks import RunRecorder
from mambaseg.runs import RunFolder


@pytest.fixture
def recorder(tmp_path):
    recorder = RunRecorder(RunFolder(tmp_path), title="synthetic", header={})
    recorder._cases = {name: {} for name in "abcde"}
    return recorder


def rows(**dice):
    """Rows of two foreground classes and a perfect background per case."""
    return [
        {"case": case, "class": label, "dice": value}
        for case, values in dice.items()
        for label, value in enumerate((1.0, *values))
    ]


def test_worst_median_and_best_case_are_shown_by_mean_foreground_dice(recorder):
    results = {"rows": rows(a=(0.1, 0.9), b=(0.9, 0.9), c=(0.2, 0.3), d=(0.8, 0.7), e=(0.4, 0.3))}
    assert recorder._shown(results) == {"worst": "c", "median": "a", "best": "b"}


def test_undefined_scores_and_cases_of_other_ranks_are_left_out(recorder):
    results = {"rows": rows(a=(None, 0.5), b=(None, None), elsewhere=(0.0, 0.0))}
    assert recorder._shown(results) == {"worst": "a", "median": "a", "best": "a"}


def test_no_scored_case_shows_nothing(recorder):
    assert recorder._shown({"rows": rows(a=(None, None))}) == {}
