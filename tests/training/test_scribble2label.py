"""Scribble2Label's running means: when they are taken, what they reach, how they are kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mambaseg.data.classes import IGNORED
from mambaseg.errors import UserError
from mambaseg.training.methods import scribble2label
from mambaseg.training.methods.scribble2label import Scribble2Label


@pytest.fixture
def predicting(monkeypatch):
    """A method with one training case, of which the network predicts what the test says."""

    def made(shown, **options):
        method = Scribble2Label([nn.Conv2d(1, 2, 1)], **options)
        probabilities = torch.as_tensor(shown, dtype=torch.uint8)
        monkeypatch.setattr(scribble2label, "Member", lambda *_: None)
        found = SimpleNamespace(probabilities=probabilities)
        monkeypatch.setattr(scribble2label, "segment", lambda *_, **__: found)
        size = (len(probabilities), 1, *probabilities.shape[-2:])
        method._data = SimpleNamespace(
            preprocessing=None,
            num_classes=2,
            cases={"train": [SimpleNamespace(id="a", labelled=True)]},
            cache=SimpleNamespace(
                position=lambda case: 0,
                image=lambda number: np.zeros(size, np.float32),
                entries=[SimpleNamespace(spacing=(1, 1, 1))],
            ),
        )
        return method

    return made


def sure(method):
    """What is shown of a case without scribbles."""
    nothing = torch.full((1, *method.means["a"].shape[-2:]), IGNORED, dtype=torch.uint8)
    return method.relabelled(nothing, ["a"], [0])[0]


def test_cases_are_predicted_every_so_many_steps(predicting):
    method = predicting([[[[255]], [[0]]]], every=4, momentum=0.5)
    for step in range(8):
        method.after(step)
        assert (method.means == {}) == (step < 3)
        if step >= 3:
            share = scribble2label.shares_of(method.means["a"])[0, 0].item()
            assert share == pytest.approx(0.5 if step < 7 else 0.75, abs=1e-4)


def test_running_means_reach_what_is_predicted_all_the_time(predicting):
    """In 8 bits they stopped at 0.796 of 0.804 with the default momentum, below the threshold."""
    method = predicting([[[[205, 203]], [[50, 52]]]], every=1)
    for step in range(100):
        method.after(step)
    assert sure(method).tolist() == [[128, IGNORED]]
    method = predicting([[[[255]], [[0]]]], every=1, momentum=0.05)
    for step in range(250):
        method.after(step)
    assert scribble2label.shares_of(method.means["a"])[0, 0].item() > 0.9995


def test_running_means_of_an_earlier_checkpoint_go_on(predicting):
    method = predicting([[[[255]], [[0]]]], every=1)
    method.set_extra_state({"a": torch.tensor([[[[204]], [[51]]]], dtype=torch.uint8)})
    assert sure(method).item() == IGNORED  # 204 of 255 is no more than the threshold
    method.after(0)
    assert method.means["a"].dtype == torch.uint16 and sure(method).item() == 128
    expected = torch.tensor([0.2 + 0.8 * 204 / 255, 0.8 * 51 / 255])
    torch.testing.assert_close(
        scribble2label.shares_of(method.means["a"]).flatten(), expected, rtol=0, atol=1e-5
    )


def test_running_means_of_a_checkpoint_are_read_bit_for_bit(tmp_path):
    method = Scribble2Label([nn.Conv2d(1, 2, 1)])
    method.means = {"a": torch.tensor([0, 40_000, 65_535], dtype=torch.uint16).view(1, 3, 1, 1)}
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other = Scribble2Label([nn.Conv2d(1, 2, 1)])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.means["a"], method.means["a"])


def begun(steps, *, partial=True, **options):
    data = SimpleNamespace(partial=partial, steps=steps)
    Scribble2Label([nn.Conv2d(1, 2, 1)], **options).begin(data)


def test_a_training_that_ends_before_a_pixel_is_sure_is_refused(predicting, caplog):
    """The eighth prediction of probability 1 is the first that lifts the mean above 0.8."""
    method = predicting([[[[255]], [[0]]]], every=1)
    reached = []
    for step in range(8):
        method.after(step)
        reached.append(float(scribble2label.shares_of(method.means["a"]).max()))
    assert reached[6] < 0.8 < reached[7]
    with pytest.raises(UserError, match=r"before step 800 .*choose method\.every=99 or less"):
        begun(800)
    begun(1200, start=0.1)
    assert "pseudo-labels begin at step 800 of 1200, not at step 120" in caplog.text
    caplog.clear()
    begun(800, every=99, start=0.99)
    assert caplog.text == ""


def test_labels_of_all_pixels_leave_scribble2label_nothing_to_do():
    with pytest.raises(UserError, match=r"every pixel has one: add data\.labels=scribble"):
        begun(60_000, partial=False)
