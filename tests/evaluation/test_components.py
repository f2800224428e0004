"""Components against torchmetrics' panoptic quality, and by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.detection import panoptic_quality

from mambaseg.app.settle import metrics_of
from mambaseg.evaluation.components import ComponentScore, match_components
from mambaseg.evaluation.metrics import score_case
from runs import composed

SCORES = ("precision", "recall", "f1", "panoptic_quality")


def instances(mask):
    """Numbers of the objects by a flood from voxel to voxel, without SciPy's labelling."""
    numbers, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if numbers[start]:
            continue
        count += 1
        waiting = [start]
        while waiting:
            place = waiting.pop()
            if min(place) < 0 or any(np.greater_equal(place, mask.shape)):
                continue
            if not mask[place] or numbers[place]:
                continue
            numbers[place] = count
            for step in np.ndindex(3, 3, 3):
                waiting.append(tuple(int(p + s - 1) for p, s in zip(place, step, strict=True)))
    return numbers


def drawn(shape, seed):
    """Boxes, and a prediction that moves, loses and invents some."""
    rng = np.random.default_rng(seed)
    truth, found = np.zeros(shape, bool), np.zeros(shape, bool)
    for _ in range(7):
        low = [int(rng.integers(0, max(1, side - 4))) for side in shape]
        size = rng.integers(2, 6, 3)
        shift = (0, *rng.integers(0, 2, 2))
        box = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
        moved = tuple(slice(a + s, a + s + n) for a, s, n in zip(low, shift, size, strict=True))
        kind = rng.random()
        truth[box] |= kind < 0.8
        found[moved] |= kind > 0.2
    return found, truth


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(6, 24, 20), (1, 40, 30)], ids=str)
def test_the_scores_are_those_of_torchmetrics(shape, seed):
    found, truth = drawn(shape, seed)
    pair = [
        torch.from_numpy(np.stack([mask.astype(int), instances(mask)], axis=-1))[None]
        for mask in (found, truth)
    ]
    quality, _, recognition = panoptic_quality(
        *pair, things={1}, stuffs={0}, return_sq_and_rq=True, return_per_class=True
    )[0]
    own = {score: ComponentScore(score).measure(found, truth, None) for score in SCORES}
    assert own["panoptic_quality"] == pytest.approx(float(quality), abs=1e-6)
    assert own["f1"] == pytest.approx(float(recognition), abs=1e-6)
    predicted, there, _ = match_components(found, truth)
    assert (predicted, there) == (instances(found).max(), instances(truth).max())
    harmonic = 2 / (1 / own["precision"] + 1 / own["recall"]) if own["f1"] else 0
    assert own["f1"] == pytest.approx(harmonic)


def test_by_hand():
    truth, found = np.zeros((1, 9, 9), bool), np.zeros((1, 9, 9), bool)
    truth[0, 0:2, 0:4] = True  # 8 voxels, of which 6 are found: IoU 0.75
    found[0, 0:2, 0:3] = True
    truth[0, 5, 0:4] = True  # 4 voxels, of which 2 are found: 0.5 does not exceed 0.5
    found[0, 5, 0:2] = True
    truth[0, 8, 8] = True  # missed
    found[0, 3, 7] = found[0, 4, 8] = True  # one object by its corner, invented
    own = {score: ComponentScore(score).measure(found, truth, None) for score in SCORES}
    assert own == {
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 3),
        "panoptic_quality": pytest.approx(0.75 / 3),
    }


def test_empty_masks_follow_the_policy():
    metrics = metrics_of(composed("metric=components", "data=phantom"))
    names = [metric.name for metric in metrics]
    assert names == ["component_precision", "component_recall", "component_f1", "panoptic_quality"]
    nothing = np.zeros((2, 6, 6), np.uint8)
    there = nothing.copy()
    there[0, 1:3, 1:3] = 1
    for policy, both in (("strict", None), ("penalty", 1.0), ("legacy", 0.0)):
        for prediction, truth, expected in (
            (nothing, there, 0.0), (there, nothing, 0.0), (nothing, nothing, both),
            (there, there, 1.0),
        ):  # fmt: skip
            row = score_case(prediction, truth, num_classes=2, policy=policy, more=metrics)[1]
            assert [row[name] for name in names] == [expected] * 4


def test_voxels_of_two_slices_that_touch_by_a_corner_are_one_object():
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 1, 1] = mask[1, 2, 2] = True
    assert match_components(mask, mask)[:2] == (1, 1)
