import pytest
import torch
from scan_inputs import relative_errors, sequence_inputs, value_and_gradients

from mambaseg.scan import choose_backend, chunked, dispatch, reference


def operator_inputs():
    normal = torch.Generator().manual_seed(0)
    steps, groups, channels, states, batch, chunks = 4, 2, 3, 5, 2, 3
    shapes = [
        (steps, groups, width, chunks * batch) for width in (channels, channels, states, states)
    ]
    delta, inflow, B, C = (torch.rand(shape, generator=normal) for shape in shapes)
    A = -torch.rand(groups, states, channels, generator=normal)
    return [t.requires_grad_() for t in (delta, inflow, B, C, A)], batch


def test_the_operator_passes_opcheck():
    inputs, batch = operator_inputs()
    torch.library.opcheck(chunked._scan, (*inputs, batch))


def test_gradients_are_those_of_finite_differences():
    inputs = [t.requires_grad_() for t in sequence_inputs(1, 2, 2, 5, 2)]
    assert torch.autograd.gradcheck(chunked.selective_scan, inputs)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 10, 15, 16, 17])
def test_every_length_fits_into_chunks(length):
    inputs = sequence_inputs(2, 1, 2, length, 3)
    expected = value_and_gradients(reference.selective_scan, inputs)
    errors = relative_errors(value_and_gradients(chunked.selective_scan, inputs), expected)
    assert max(errors.values()) < 1e-12, errors


def test_blocks_of_channels_change_nothing(monkeypatch):
    inputs = sequence_inputs(2, 3, 7, 30, 4)
    whole = value_and_gradients(chunked.selective_scan, inputs)
    for limit in (1, 30 * 2 * 3 * 4 * 3):  # one channel at a time; three, so that one is left over
        monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", {"cpu": limit})
        errors = relative_errors(value_and_gradients(chunked.selective_scan, inputs), whole)
        assert max(errors.values()) < 1e-13, errors


def test_decays_whose_products_leave_the_range_of_floats_do_no_harm():
    """Where cumulative sums in the exponent fail: one step decays by e^-50, a chunk by e^-500."""
    inputs = sequence_inputs(1, 1, 8, 120, 16)
    inputs[1] = inputs[1] * 2 + 3
    inputs[2] = -torch.arange(1.0, 17.0, dtype=torch.float64).expand(1, 8, 16).contiguous()
    expected = value_and_gradients(reference.selective_scan, inputs)
    actual = value_and_gradients(chunked.selective_scan, inputs, torch.float32)
    errors = relative_errors(actual, expected)
    assert max(errors.values()) < 1e-5, errors


def test_autocast_does_not_reach_the_states():
    inputs = [t.float() for t in sequence_inputs(1, 2, 4, 20, 4)]
    expected = value_and_gradients(chunked.selective_scan, inputs, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = value_and_gradients(chunked.selective_scan, inputs, torch.float32)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_auto_takes_it_where_nothing_faster_runs(monkeypatch):
    assert choose_backend("auto", "mps") == "torch"
    without = {name: dispatch.BACKENDS[name] for name in ("torch", "reference")}
    monkeypatch.setattr(dispatch, "BACKENDS", without)
    assert choose_backend("auto", "cpu") == choose_backend("auto", "cuda") == "torch"
