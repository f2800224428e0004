"""The calibration error against torchmetrics, the temperature against a root in float64."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torchmetrics.functional.classification import multiclass_calibration_error

from mambaseg.evaluation.calibration import BINS, COLDEST, Reliability, fit_temperature


def drawn(count=4000, classes=4, sharpness=2.5):
    """Logits that are `sharpness` times as large as those the classes were drawn from."""
    generator = torch.Generator().manual_seed(3)
    true = 2 * torch.randn(count, classes, generator=generator)
    truth = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    return sharpness * true, truth


def test_the_error_is_that_of_torchmetrics_however_the_voxels_come():
    logits, truth = drawn()
    found = Reliability()
    for start in range(0, len(truth), 999):
        found.update(logits[start : start + 999], truth[start : start + 999])
    expected = multiclass_calibration_error(
        logits.double().softmax(1), truth, num_classes=4, n_bins=BINS, norm="l1"
    )
    plain = found.plain()
    assert plain["ece"] == pytest.approx(float(expected), abs=2e-6)  # it sums in float32
    assert plain["ece"] > 0.1  # far too sure
    loss = torch.nn.functional.cross_entropy(logits.double(), truth)
    assert plain["nll"] == pytest.approx(float(loss), rel=1e-12)
    assert np.sum(plain["bins"], axis=0)[0] == len(truth)


def test_the_error_by_hand_and_of_no_voxel():
    # confidences 0.75 (right), 0.75 (wrong) in one bin, 0.95 (right) in another
    shares = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.05, 0.95]]).log()
    found = Reliability()
    assert found.plain()["ece"] is None
    found.update(shares, torch.tensor([0, 1, 1]))
    assert found.plain()["ece"] == pytest.approx((abs(1 - 1.5) + abs(1 - 0.95)) / 3)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_is_where_the_slope_of_the_loss_is_zero(sharpness):
    logits, truth = drawn(sharpness=sharpness)
    own, rows = logits.double().numpy(), np.arange(len(truth))

    def slope(inverse):  # of the mean loss in 1 / T: expected minus observed logit
        shares = np.exp(inverse * own - (inverse * own).max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        return ((shares * own).sum(1) - own[rows, truth.numpy()]).mean()

    expected = 1 / brentq(slope, 0.05, 20, xtol=1e-14)
    assert fit_temperature(logits, truth) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(sharpness, rel=0.1)  # as they were drawn


def test_a_network_that_is_always_right_gets_the_lowest_temperature():
    truth = torch.arange(4).repeat(5)
    logits = torch.nn.functional.one_hot(truth).float()
    assert fit_temperature(logits, truth) == pytest.approx(COLDEST, rel=1e-3)
