"""Which parameters an optimizer may spare from weight decay."""

from torch import nn


def names_without_decay(network: nn.Module) -> set[str]:
    """Name the parameters that pull to zero would harm: what a module lists in `no_weight_decay`.

    These are the scan's `A_logs` and `Ds` (as in Mamba) and the relative position biases (as in
    Swin). The published protocol decays every parameter; other recipes may use this.

    Returns:
        Names as in `network.named_parameters()`.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(names := getattr(module, "no_weight_decay", None), tuple)
        for name in names
    }
