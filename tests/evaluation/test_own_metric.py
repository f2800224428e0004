"""A metric from outside the package: one file and one config."""

import csv

import numpy as np
import pytest

from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import Metric, score_case
from mambaseg.evaluation.volumetric_similarity import VolumetricSimilarity
from runs import UNET, trained

FILE = '''
from mambaseg.evaluation.metrics import Metric


class Overreach(Metric):
    """Voxels that are predicted and not there, per voxel of the reference."""

    def __init__(self):
        super().__init__("overreach", "overreach", higher_is_better=False, empty="distance")

    def measure(self, prediction, reference, spacing):
        there = int(reference.sum())
        return None if there == 0 else int((prediction & ~reference).sum()) / there
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "overreach_metric.py").write_text(FILE)
    (folder / "conf/metric").mkdir(parents=True)
    (folder / "conf/metric/overreach.yaml").write_text(
        "overreach: {_target_: overreach_metric.Overreach}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def test_a_metric_of_a_foreign_file_reaches_every_table(own, small_run, tmp_path, capsys):
    chosen = "metric=[overreach,volumetric_similarity]"
    run = trained(*UNET, *small_run, "data.steps=2", chosen, configs=own / "conf")
    with (run.folder.path / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"overreach", "volumetric_similarity"} <= rows[0].keys()
    for row in rows:
        if row["outcome"] == "scored":
            wrong = int(row["voxels"]) - float(row["precision"]) * int(row["voxels"])
            expected = wrong / int(row["reference_voxels"])
            assert float(row["overreach"]) == pytest.approx(expected, abs=1e-9)
        else:  # as a distance, under the policy strict
            assert row["overreach"] == ""
    assert any(row["outcome"] == "scored" for row in rows)
    summary = run.folder.summary
    names = [metric["name"] for metric in summary["metrics"]]
    assert names[-2:] == ["overreach", "volumetric_similarity"]
    assert summary["foreground"]["overreach"]["count"] <= 3 * summary["cases"]
    with (run.folder.path / "metrics.csv").open() as file:
        logged = [name for row in csv.reader(file) for name in row]
    assert "val/overreach" in logged


def test_it_may_choose_the_best_state(own, small_run, tmp_path):
    monitor = "callbacks.checkpoint.monitor=val/overreach"
    words = [*small_run, "data.steps=2", "metric=overreach", monitor]
    run = trained(*UNET, *words, configs=own / "conf")
    assert "val_overreach" in run.folder.record
    assert run.config["callbacks"]["checkpoint"]["mode"] == "min"  # as the metric says


def test_volumetric_similarity_by_hand():
    measure = VolumetricSimilarity().measure
    one, three = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    one[0, 0], three[1, :3] = True, True
    assert measure(one, three, None) == pytest.approx(0.5)  # 1 - 2 / 4, no voxel in common
    assert measure(one, one, None) == 1
    assert measure(one & ~one, three, None) == 0
    assert measure(one & ~one, one & ~one, None) is None


class Border(Metric):
    """The highest row of the prediction, which an empty mask does not have."""

    def measure(self, prediction, reference, spacing):
        return float(np.nonzero(prediction)[1].min())


@pytest.mark.parametrize("unit", ["", "mm"])
def test_an_empty_mask_is_scored_by_the_policy_and_not_measured(unit):
    there = np.zeros((1, 6, 6), np.uint8)
    there[0, 2:4] = 1
    more = [Border("border", "border", empty="distance", unit=unit)]
    rows = score_case(there * 0, there, num_classes=2, policy="penalty", more=more)
    assert rows[1]["border"] == (None if unit else pytest.approx(50**0.5))
    assert score_case(there, there, num_classes=2, more=more)[1]["border"] == 2


def test_a_number_in_ml_counts_as_an_overlap_where_the_spacing_is_known_and_never_as_a_distance():
    there = np.zeros((1, 6, 6), np.uint8)
    there[0, 2:4] = 1
    more = [Border("border", "border", unit="ml")]
    for spacing, expected in (((1, 1, 1), 0), (None, None)):
        rows = score_case(there * 0, there, num_classes=2, spacing=spacing, more=more)
        assert rows[1]["border"] == expected
    with pytest.raises(UserError, match="metric border: no distance is in ml"):
        Border("border", "border", unit="ml", empty="distance")


class Ill(Metric):
    """Divides by zero as NumPy does."""

    def measure(self, prediction, reference, spacing):
        return np.float64(np.nan if reference.sum() > 20 else np.inf)


def test_what_is_no_number_is_undefined():
    labels = np.zeros((1, 6, 6), np.uint8)
    labels[0, :2] = 1
    rows = score_case(labels, labels, num_classes=2, more=[Ill("ill", "ill")])
    assert [row["ill"] for row in rows] == [None, None]
    assert [row["dice"] for row in rows] == [1, 1]
