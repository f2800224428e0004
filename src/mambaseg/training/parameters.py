"""Parameters for the optimizer, in groups of one weight decay and one learning rate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.models import encoder_depths, names_without_decay


def parameter_groups(
    modules: Iterable[nn.Module],
    decay: str,
    networks: Iterable[nn.Module] = (),
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Every parameter that learns, in one group (`decay` is `all`) or two (`matrices`).

    The second has weight decay 0: vectors (biases, norms) and what the network itself names (the
    scan's A_logs and Ds, position biases). The scan's step bias counts as a matrix.

    With a `layer_decay` below 1 there are such groups for each stage of the encoders of `networks`,
    with a `share` of the learning rate: `layer_decay` for the last stage, its square for the one
    before it, and so on (Clark et al. 2020, arXiv 2003.10555, Section 3; there by layer).
    """
    shares = _shares(networks, layer_decay) if layer_decay != 1 else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, False): []}
    if decay != "all":
        groups[1.0, True] = []
    for module in modules:
        spared_names = names_without_decay(module) if decay != "all" else set()
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:  # a teacher's
                continue
            spared = decay != "all" and (name in spared_names or parameter.ndim < 2)
            groups.setdefault((shares.get(id(parameter), 1.0), spared), []).append(parameter)
    return [
        {
            "params": parameters,
            **({"weight_decay": 0.0} if spared else {}),
            **({"share": share} if share != 1 else {}),
        }
        for (share, spared), parameters in groups.items()
    ]


def encoder_parameters(networks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of the encoders of all networks."""
    return [one.get_parameter(name) for one in networks for name in encoder_depths(one)]


def _shares(networks: Iterable[nn.Module], layer_decay: float) -> dict[int, float]:
    """Share of the learning rate, by the `id` of a parameter of an encoder."""
    shares: dict[int, float] = {}
    for network in networks:
        depths = encoder_depths(network)
        last = max(depths.values())
        for name, depth in depths.items():
            shares[id(network.get_parameter(name))] = layer_decay ** (last + 1 - depth)
    return shares


def lay_out_states(optimizer: torch.optim.Optimizer) -> None:
    """Lays loaded states out like their parameters: channels-last where these are.

    Fused optimizers of PyTorch 2.13 on CPUs go through memory in its own order and take the layout
    of a state for granted: of another layout, they would give each weight another one's momentum.
    """
    for parameter, states in optimizer.state.items():
        for name, state in states.items():
            if isinstance(state, Tensor) and state.shape == parameter.shape:
                laid_out = torch.empty_like(parameter, dtype=state.dtype).copy_(state)
                states[name] = state if state.stride() == parameter.stride() else laid_out


def has_batch_norms(network: nn.Module) -> bool:
    """Whether a network normalises by all that it sees at a time."""
    return any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in network.modules())
