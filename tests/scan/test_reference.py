import math

import torch
from scan_inputs import sequence_inputs, value_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambaseg.scan import selective_scan


def reference(*inputs):
    return selective_scan(*inputs, backend="reference")


def test_two_steps_worked_out_by_hand():
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    u = torch.tensor([[[[2.0, 3.0]]]], dtype=torch.float64)
    delta = torch.tensor([[[[0.5, -1.0]]]], dtype=torch.float64)
    B = torch.tensor([[[[0.7, 0.2]]]], dtype=torch.float64)
    C = torch.tensor([[[[1.5, -0.4]]]], dtype=torch.float64)
    y = reference(u, delta, -2 * one, B, C, 0.1 * one[0], 0.25 * one[0])
    first, second = math.log1p(math.exp(0.75)), math.log1p(math.exp(-0.75))
    h = first * 0.7 * 2.0
    expected = [1.5 * h + 0.2]
    h = math.exp(-2 * second) * h + second * 0.2 * 3.0
    expected.append(-0.4 * h + 0.3)
    torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_gradients_are_those_of_finite_differences():
    inputs = [t.requires_grad_() for t in sequence_inputs(2, 2, 3, 5, 4)]
    assert torch.autograd.gradcheck(reference, inputs)


def test_softplus_is_right_in_both_tails():
    inputs = sequence_inputs(1, 1, 2, 4, 3)
    inputs[1] = torch.tensor([-40.0, -15.0, 15.0, 40.0], dtype=torch.float64).expand(1, 1, 2, 4)
    inputs[6] = torch.zeros_like(inputs[6])
    narrow = reference(*(t.float() for t in inputs))
    torch.testing.assert_close(narrow.double(), reference(*inputs), rtol=1e-5, atol=1e-6)


def test_bfloat16_input_is_scanned_in_float32():
    inputs = [t.bfloat16() for t in sequence_inputs(2, 1, 4, 50, 16)]
    y = reference(*inputs)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference(*(t.float() for t in inputs)).bfloat16())


class CountElements(TorchDispatchMode):
    """Adds up the sizes of all tensors that operators produce: work, without a clock."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def test_work_of_forward_and_backward_is_linear_in_length():
    def elements(length):
        with CountElements() as counter:
            value_and_gradients(reference, sequence_inputs(1, 1, 2, length, 4))
        return counter.total

    assert elements(512) / elements(128) < 4.2  # 4 if linear, towards 16 if quadratic
