"""The linear layer by oneDNN equals PyTorch's, values and gradients, wherever it is used."""

import pytest
import torch
import torch.nn.functional as F

from mambaseg.models import linear as module
from mambaseg.models.linear import Linear, linear


@pytest.mark.skipif(not module.ONEDNN, reason="needs AVX-512")
@pytest.mark.parametrize(("ins", "outs", "bias"), [(96, 384, True), (384, 96, False)])
def test_equals_pytorchs_in_values_and_gradients(ins, outs, bias):
    torch.manual_seed(0)
    x, d_y = torch.randn(2, 20, 20, ins), torch.randn(2, 20, 20, outs)
    layer = Linear(ins, outs, bias=bias)
    assert module._is_faster(x, layer.weight)

    def results(call):
        image = x.clone().requires_grad_()
        y = call(image)
        layer.zero_grad()
        y.backward(d_y)
        return [y, image.grad, *(p.grad for p in layer.parameters())]

    ours = results(layer)
    for one, theirs in zip(ours, results(lambda x: F.linear(x, *layer.parameters())), strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-5, atol=1e-4)
    assert torch.equal(ours[0], results(layer)[0])


def test_small_narrow_or_half_precise_products_are_pytorchs():
    few, wide, narrow = torch.randn(2, 96), torch.randn(4000, 96), torch.randn(4000, 8)
    weight, thin = torch.randn(96, 96), torch.randn(96, 8)
    for x, w in ((few, weight), (narrow, thin), (wide.double(), weight.double())):
        assert not module._is_faster(x, w)
        assert torch.equal(linear(x, w), F.linear(x, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(wide, weight).dtype == torch.bfloat16


@pytest.mark.skipif(not module.ONEDNN, reason="needs AVX-512")
def test_gradients_of_gradients_are_pytorchs():
    torch.manual_seed(0)
    x = torch.randn(400, 96, requires_grad=True)
    weight = torch.randn(96, 96, requires_grad=True)

    def penalty(call):  # as of a gradient penalty
        (gradient,) = torch.autograd.grad(call(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight))

    assert module._is_faster(x, weight)
    for ours, theirs in zip(penalty(linear), penalty(F.linear), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
