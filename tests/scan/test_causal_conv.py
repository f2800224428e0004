import sys
from types import SimpleNamespace

import cuda_stand_in
import pytest
import torch

from mambaseg.scan import causal_conv
from mambaseg.scan.causal_conv import causal_conv1d


def by_hand(x, weight, bias, activation):
    batch, channels, length = x.shape
    width = weight.shape[1]
    y = torch.zeros_like(x)
    for b in range(batch):
        for d in range(channels):
            for t in range(length):
                total = bias[d].item()
                for back in range(min(width, t + 1)):
                    total += (weight[d, width - 1 - back] * x[b, d, t - back]).item()
                y[b, d, t] = total
    return y if activation is None else y * torch.sigmoid(y)


def arguments(width, length=9):
    make = torch.Generator().manual_seed(width)
    shapes = ((2, 3, length), (3, width), (3,))
    return [torch.randn(*shape, generator=make, dtype=torch.float64) for shape in shapes]


@pytest.fixture
def extension(monkeypatch):
    """The package causal-conv1d, as if it were there and fitted the input."""
    package = cuda_stand_in.causal_conv1d()
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    monkeypatch.setattr(causal_conv, "_fits_extension", lambda x, width: True)
    causal_conv._extension.cache_clear()
    yield package
    causal_conv._extension.cache_clear()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_it_is_the_sum_written_out(width, activation):
    inputs = arguments(width, length=5)
    torch.testing.assert_close(causal_conv1d(*inputs, activation), by_hand(*inputs, activation))


def test_gradients_are_those_of_finite_differences():
    inputs = [t.requires_grad_() for t in arguments(4, length=3)]
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, "silu"), inputs)


def test_no_output_sees_a_later_input():
    x, weight, bias = arguments(4)
    before = causal_conv1d(x, weight, bias)
    x[..., 5:] += 1
    after = causal_conv1d(x, weight, bias)
    assert torch.equal(after[..., :5], before[..., :5])
    assert not torch.isclose(after[..., 5], before[..., 5]).any()


def test_the_output_has_the_dtype_of_the_input():
    x, weight, bias = (t.float() for t in arguments(4))
    y = causal_conv1d(x.bfloat16(), weight, bias, "silu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), causal_conv1d(x, weight, bias, "silu"), rtol=2e-2, atol=2e-2
    )


def test_the_bias_may_be_left_out():
    x, weight, bias = arguments(3)
    torch.testing.assert_close(
        causal_conv1d(x, weight) + bias[:, None], causal_conv1d(x, weight, bias)
    )


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="relu"):
        causal_conv1d(*arguments(4), activation="relu")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_extension_is_called_with_what_it_takes(extension, activation):
    x, weight, bias = arguments(4)
    channels_last = x.transpose(1, 2).contiguous().transpose(1, 2)
    y = causal_conv1d(channels_last, weight, bias, activation)
    assert extension.calls == 1
    torch.testing.assert_close(y, by_hand(x, weight, bias, activation))


def test_a_tensor_on_the_cpu_does_not_go_to_the_extension(extension, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "causal_conv1d", extension)
    causal_conv1d(*arguments(4))
    assert extension.calls == 0


def test_the_extension_which_adds_in_any_order_is_not_for_deterministic_trainings():
    x = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert causal_conv._fits_extension(x, 4)
    torch.use_deterministic_algorithms(True)
    try:
        assert not causal_conv._fits_extension(x, 4)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_missing_extension_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)  # importing it raises ImportError
    monkeypatch.setattr(causal_conv, "_fits_extension", lambda x, width: True)
    causal_conv._extension.cache_clear()
    inputs = arguments(4)
    torch.testing.assert_close(causal_conv1d(*inputs), by_hand(*inputs, None))
    causal_conv._extension.cache_clear()
