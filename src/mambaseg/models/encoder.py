"""Which parameters are the encoder's, and how deep each lies: for freezing and layer-wise rates."""

from collections.abc import Mapping

from torch import nn

from mambaseg.errors import UserError
from mambaseg.models.any_size import AnySize

USUAL = ("patch_embed.", "stem.", "encoder.", "bottom_norm.")
"""Where the names of encoders' parameters begin; a network may name others (`encoder_parts`)."""


def encoder_depths(network: nn.Module) -> dict[str, int]:
    """Depth of each of the encoder's parameters, by its name in `named_parameters`.

    A stage or block has one depth: the entries of the first list on the way to a parameter count,
    in the network's own order, and what is not in a list belongs to what comes before it. The first
    has depth 0. A network names lists that belong to another one's entries, place by place, in
    `encoder_twins`.

    Raises:
        UserError: the network has no part that is named like an encoder's.
    """
    inner, outer, parts = network, "", None
    if isinstance(network, AnySize):
        inner, outer, parts = network.network, "network.", network.encoder_parts
    parts = parts or getattr(inner, "encoder_parts", None) or USUAL
    twins: Mapping[str, str] = getattr(inner, "encoder_twins", {})
    starts = tuple(outer + part for part in (*parts, *twins))
    names = [name for name, _ in network.named_parameters() if name.startswith(starts)]
    if not names:
        children = ", ".join(name for name, _ in inner.named_children())
        raise UserError(
            f"{type(inner).__name__} has no part that is named like an encoder (it has "
            f"{children}): name its parts in model.encoder_parts, or leave optim.freeze_encoder "
            "and optim.layer_decay out"
        )
    units: dict[str, int] = {}
    depths, last, before = {}, "", ""
    for name in names:
        start = next(one for one in starts if name.startswith(one))
        parts = name.removeprefix(start).split(".")
        place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if place is not None:
            part = start.removeprefix(outer)
            last = outer + twins.get(part, part) + ".".join(parts[: place + 1])
        elif start != before:
            last = start
        before = start
        depths[name] = units.setdefault(last, len(units))
    return depths
