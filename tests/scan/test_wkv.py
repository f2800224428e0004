import pytest
import torch

from mambaseg.scan import bidirectional_wkv


def by_definition(w, u, k, v):
    """All T² pairs."""
    place = torch.arange(k.shape[1], dtype=k.dtype)
    distance = (place[:, None] - place).abs()[..., None]
    score = k[:, None] - w * (distance - 1)  # (B, T, T, C)
    score = torch.where(distance == 0, k[:, None] + u, score)
    return (score.softmax(2) * v[:, None]).sum(2)


def inputs(length, decay, dtype=torch.float64):
    torch.manual_seed(3)
    w = torch.linspace(-decay, decay, 5, dtype=dtype) / length
    u, k, v = (torch.randn(shape, dtype=dtype) for shape in ((5,), (2, length, 5), (2, length, 5)))
    return [t.requires_grad_() for t in (w, u, 3 * k, v)]


@pytest.mark.parametrize(("length", "decay"), [(1, 1), (2, 3), (7, 0), (64, 4), (97, 100)])
def test_values_and_gradients_are_those_of_the_definition(length, decay):
    given = inputs(length, decay)
    weights = torch.randn(2, length, 5, dtype=torch.float64)
    actual, expected = bidirectional_wkv(*given), by_definition(*given)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad((y * weights).sum(), given) for y in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * max(scale, 1))


@pytest.mark.parametrize("decay", [4, 60])
def test_float32_stays_near_float64(decay):
    given = inputs(300, decay)
    expected = bidirectional_wkv(*given)
    narrow = [t.detach().float().requires_grad_() for t in given]
    actual = bidirectional_wkv(*narrow)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
    actual.sum().backward()
    assert all(t.grad.isfinite().all() for t in narrow)


def test_bfloat16_is_summed_in_float32():
    w, u, k, v = inputs(50, 2)
    k, v = k.bfloat16(), v.bfloat16()
    actual = bidirectional_wkv(w.float(), u.float(), k, v)
    assert actual.dtype == torch.bfloat16
    expected = bidirectional_wkv(w, u, k.double(), v.double())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-2)
