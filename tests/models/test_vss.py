import math

import pytest
import torch
import torch.nn.functional as F

from mambaseg.errors import UserError
from mambaseg.models import SS2D, MambaUNet, VSSBlock, vss
from mambaseg.models.vss import initial_step_bias


def sequential_ss2d(module, x):
    """SS2D as VMamba writes it: four sequences first, then projections, then a loop over time."""
    height, width = x.shape[1:3]
    u, gate = module.in_proj(x)
    u = F.silu(module.conv2d(u.permute(0, 3, 1, 2)))  # (B, D, H, W)
    rows, columns = u.flatten(2), u.transpose(2, 3).flatten(2)
    sequences = torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)
    projected = torch.einsum("bkdl,kcd->bkcl", sequences, module.x_proj_weight)
    step, B, C = projected.split([module.rank, module.d_state, module.d_state], dim=2)
    step = torch.einsum("bkrl,kdr->bkdl", step, module.dt_projs_weight)
    step = F.softplus(step + module.dt_projs_bias[None, :, :, None])
    A = -torch.exp(module.A_logs).view(4, -1, module.d_state)
    D = module.Ds.view(4, -1)
    state, outputs = torch.zeros(*step.shape[:3], module.d_state, dtype=x.dtype), []
    for t in range(height * width):
        decay = torch.exp(step[..., t, None] * A)
        drive = step[..., t, None] * B[:, :, None, :, t] * sequences[..., t, None]
        state = decay * state + drive
        outputs.append((state * C[:, :, None, :, t]).sum(-1) + D * sequences[..., t])
    y = torch.stack(outputs, dim=-1)
    by_rows = (y[:, 0] + y[:, 2].flip(-1)).unflatten(-1, (height, width))
    by_columns = (y[:, 1] + y[:, 3].flip(-1)).unflatten(-1, (width, height)).transpose(2, 3)
    y = module.out_norm((by_rows + by_columns).permute(0, 2, 3, 1))
    return module.out_proj(y * F.silu(gate))


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)], ids=str)
def test_projecting_before_the_four_directions_changes_nothing(size):
    module = SS2D(8, d_state=3).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (module.A_logs, module.Ds, module.dt_projs_bias):
            parameter += 0.3 * torch.randn_like(parameter)  # directions and channels all differ
    ours, theirs = module(x), sequential_ss2d(module, x)
    torch.testing.assert_close(ours, theirs)
    parameters = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), parameters),
        torch.autograd.grad(theirs.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_initial_steps_lie_between_a_thousandth_and_a_tenth_on_a_log_scale():
    step = F.softplus(initial_step_bias((4, 5000)).double())
    assert step.min() >= 1e-3 * (1 - 1e-3)
    assert step.max() <= 1e-1 * (1 + 1e-3)
    assert step.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.05)


def test_initial_decay_is_minus_one_to_minus_n_in_every_channel():
    module = SS2D(8, d_state=16)
    assert torch.allclose(module.A_logs.exp(), torch.arange(1.0, 17.0).expand(4 * 16, 16))
    assert torch.equal(module.Ds, torch.ones(64))


def test_initial_projections_are_spread_as_published():
    module = MambaUNet().encoder[1].blocks[0].ss2d  # 192 channels: D = 384, R = 12
    assert module.x_proj_weight.abs().max().item() == pytest.approx(384**-0.5, rel=0.01)
    assert module.dt_projs_weight.abs().max().item() == pytest.approx(12**-0.5, rel=0.01)
    assert module.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert module.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_decay_and_bias_and_skip_stay_float32_under_autocast(monkeypatch):
    seen = {}

    def spy(x, delta, A, B, C, D, delta_bias, *, backend):
        seen.update(x=x, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
        return x

    monkeypatch.setattr(vss, "selective_scan_2d", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        SS2D(8)(torch.randn(1, 4, 4, 8))
    wide = {name for name, tensor in seen.items() if tensor.dtype == torch.float32}
    assert {"A", "D", "delta_bias"} <= wide
    assert seen["x"].dtype == torch.bfloat16


def test_decay_and_bias_and_skip_stay_exact_in_a_network_converted_to_bfloat16():
    network = MambaUNet(embed_dim=24, depths=(1, 1, 1, 1))
    before = {name: p.clone() for name, p in network.named_parameters()}
    network.to(torch.bfloat16)
    exact = ("A_logs", "Ds", "dt_projs_bias")
    for name, parameter in network.named_parameters():
        if name.endswith(exact):
            assert torch.equal(parameter, before[name])
        else:
            assert parameter.dtype == torch.bfloat16
    network(torch.rand(1, 1, 32, 32, dtype=torch.bfloat16)).sum().backward()
    assert network.encoder[0].blocks[0].ss2d.A_logs.grad.dtype == torch.float32
    network.double()
    assert {p.dtype for p in network.parameters()} == {torch.float64}


def test_network_under_autocast_stays_near_float32():
    network = MambaUNet(embed_dim=24).eval()
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected = network(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(image)
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_unknown_scan_backend_is_an_error_for_the_user():
    with pytest.raises(UserError, match="no-such-scan"):
        SS2D(8, scan_backend="no-such-scan")(torch.randn(1, 2, 2, 8))


def test_block_is_one_residual_branch():
    block = VSSBlock(8).eval()
    torch.nn.init.zeros_(block.ss2d.out_proj.weight)
    x = torch.randn(1, 4, 4, 8)
    assert torch.equal(block(x), x)


def test_one_block_diagonal_product_equals_a_product_per_direction():
    x = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 16, 6, dtype=torch.float64, requires_grad=True)
    dense, sparse = (vss.per_direction(x, weight, dense=dense) for dense in (True, False))
    assert dense.is_contiguous()
    torch.testing.assert_close(dense, sparse)
    cotangent = torch.randn_like(dense)
    for a, b in zip(
        torch.autograd.grad(dense, (x, weight), cotangent),
        torch.autograd.grad(sparse, (x, weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
