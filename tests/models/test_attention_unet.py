import torch
import torch.nn.functional as F

from mambaseg.models import AttentionUNet, UNet
from mambaseg.models.attention_unet import AdditiveGate


def test_the_gate_is_the_equation_written_out():
    gate = AdditiveGate(4, 6).double().eval()
    x, g = torch.rand(2, 4, 6, 8).double(), torch.rand(2, 6, 3, 4).double()
    alpha = torch.empty(2, 1, 3, 4).double()
    for i in range(3):
        for j in range(4):
            patch = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            q = torch.einsum("ocpq,bcpq->bo", gate.skip.weight, patch)
            q = q + g[:, :, i, j] @ gate.gate.weight[:, :, 0, 0].T + gate.gate.bias
            score = q.clamp(min=0) @ gate.psi.weight[0, :, 0, 0] + gate.psi.bias
            alpha[:, 0, i, j] = 1 / (1 + torch.exp(-score))
    alpha = F.interpolate(alpha, size=(6, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(gate(x, g), gate.out(x * alpha))


def test_only_the_gates_differ_from_the_unet():
    gated, plain = AttentionUNet(), UNet()
    extra = set(gated.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(gated.state_dict())
    assert all(".attention." in name for name in extra)
    assert sum(p.numel() for p in gated.parameters()) == 1_967_288


def test_a_closed_gate_lets_nothing_of_the_skip_through():
    gate = AdditiveGate(4, 6).eval()
    with torch.no_grad():
        gate.psi.bias.fill_(-100)
        first, second = (gate(torch.rand(1, 4, 6, 8), torch.rand(1, 6, 3, 4)) for _ in range(2))
    torch.testing.assert_close(first, second)
