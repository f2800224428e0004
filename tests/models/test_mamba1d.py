import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_goldens import read_golden

from mambaseg.evaluation.costs import count_operations
from mambaseg.models import Mamba1d, mamba1d, names_without_decay


def sequential_mamba(module, x):
    """The block as the paper writes it, token by token."""
    batch, length, _ = x.shape
    u, gate = (x @ module.in_proj.weight.T).chunk(2, dim=-1)
    weight, width = module.conv1d.weight[:, 0], module.conv1d.weight.shape[-1]
    state, outputs = torch.zeros(batch, *module.A_log.shape, dtype=x.dtype), []
    for t in range(length):
        window = [
            u[:, s] * weight[:, width - 1 + s - t] for s in range(max(0, t - width + 1), t + 1)
        ]
        v = F.silu(sum(window) + module.conv1d.bias)  # (B, D)
        step, B, C = (v @ module.x_proj.weight.T).split(
            [module.rank, module.d_state, module.d_state], dim=-1
        )
        step = F.softplus(step @ module.dt_proj.weight.T + module.dt_proj.bias)
        decay = torch.exp(-step[..., None] * module.A_log.exp())
        state = decay * state + (step * v)[..., None] * B[:, None]
        outputs.append((state * C[:, None]).sum(-1) + module.D * v)
    return (torch.stack(outputs, dim=1) * F.silu(gate)) @ module.out_proj.weight.T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_it_agrees_with_the_package_mamba_ssm(dtype, tolerance):
    golden, state_dict = read_golden("mamba1d")
    module = Mamba1d(golden["size"][-1].item()).to(dtype)
    module.load_state_dict(state_dict)
    x = np.random.default_rng(int(golden["seed"])).standard_normal(golden["size"])
    with torch.no_grad():
        y = module(torch.from_numpy(x.astype(np.float32)).to(dtype))
    np.testing.assert_allclose(y.numpy(), golden["output"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [1, 3, 9])
def test_values_and_gradients_are_those_of_the_paper(length):
    module = Mamba1d(8, d_state=3).double()
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for parameter in (module.A_log, module.D, module.dt_proj.bias):
            parameter += 0.3 * torch.randn_like(parameter)  # channels and states all differ
    ours, theirs = module(x), sequential_mamba(module, x)
    torch.testing.assert_close(ours, theirs)
    wanted = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), wanted),
        torch.autograd.grad(theirs.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_no_token_sees_a_later_one():
    module = Mamba1d(8).eval()
    x = torch.randn(1, 9, 8)
    with torch.no_grad():
        before = module(x)
        x[:, 5:] += 1
        after = module(x)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.isclose(after[:, 5], before[:, 5]).any()


def test_it_begins_as_mamba_does():
    module = Mamba1d(64, d_state=16)  # D = 128, R = 4
    assert torch.allclose(module.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
    assert torch.equal(module.D, torch.ones(128))
    step = F.softplus(module.dt_proj.bias)
    assert step.min() >= 1e-3 * (1 - 1e-3)
    assert step.max() <= 1e-1 * (1 + 1e-3)
    assert module.dt_proj.weight.abs().max().item() == pytest.approx(4**-0.5, rel=0.05)


def test_what_the_state_decays_by_stays_float32(monkeypatch):
    seen = {}

    def spy(u, delta, A, B, C, D, delta_bias, *, backend):
        seen.update(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
        return u

    monkeypatch.setattr(mamba1d, "selective_scan", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Mamba1d(8)(torch.randn(1, 4, 8))
    assert {name for name, tensor in seen.items() if tensor.dtype == torch.float32} == {
        "A",
        "D",
        "delta_bias",
    }
    module = Mamba1d(8)
    before = {name: p.clone() for name, p in module.named_parameters()}
    module.to(torch.bfloat16)
    exact = {name for name, p in module.named_parameters() if p.dtype == torch.float32}
    assert exact == {"A_log", "D", "dt_proj.bias"}
    assert all(torch.equal(module.get_parameter(name), before[name]) for name in exact)
    assert module.double().dt_proj.bias.dtype == torch.float64


def test_decay_and_skip_are_spared_from_weight_decay():
    assert names_without_decay(Mamba1d(8)) == {"A_log", "D"}


def test_operations_of_the_scan_are_counted():
    counted = count_operations(Mamba1d(8, d_state=3), torch.randn(2, 5, 8))
    assert counted["scan_flops"] == 2 * 5 * 16 * (9 * 3 + 1)
