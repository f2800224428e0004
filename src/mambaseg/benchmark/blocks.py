"""Building blocks against each other at the four resolutions of the networks, forward + backward.

One candidate is not ours: MONAI's Swin block tells whether our Swin-UNet is a fair baseline.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.benchmark.measure import Call, Protocol
from mambaseg.benchmark.networks import Builder, Step, autocast_on, measure_networks
from mambaseg.models import VSSBlock
from mambaseg.models.window_attention import SwinBlock

WINDOW = 7
STAGES = 4


class MonaiSwinBlocks(nn.Module):
    """MONAI's Swin block, unshifted and shifted, on maps (B, side, side, C); the mask is ready."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        # MONAI is heavy, and not there on machines that measure scans and networks only
        from monai.networks.nets import swin_unetr

        super().__init__()
        get_window_size, compute_mask = swin_unetr.get_window_size, swin_unetr.compute_mask
        window, shift = get_window_size((side, side), (WINDOW, WINDOW), (WINDOW // 2, WINDOW // 2))
        padded = [-(-side // w) * w for w in window]
        self.mask: Tensor
        self.register_buffer("mask", compute_mask(padded, window, shift, torch.device("cpu")))
        self.blocks = nn.ModuleList(
            swin_unetr.SwinTransformerBlock(dim, heads, (WINDOW, WINDOW), (offset, offset))
            for offset in (0, WINDOW // 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, side, side, C)` to the same shape."""
        for block in self.blocks:
            x = block(x, self.mask)
        return x


def measure_blocks(
    protocol: Protocol, *, size: int, batch: int, scan_backend: str
) -> dict[str, Any]:
    """Measure two blocks of each kind, forward and backward, at every resolution.

    `size` is the side of the image in pixels: maps have sides size / 4 to size / 32.

    Returns:
        `rows`, with `stage`, and `notes`; see docs/performance.md. The base is MONAI's block.
    """
    rows, notes = [], []
    for stage in range(STAGES):
        dim, heads, side = 96 << stage, 3 << stage, size // (4 << stage)
        builders: dict[str, Builder] = {
            "Swin (MONAI)": partial(MonaiSwinBlocks, dim, heads, side),
            "Swin": partial(swin_blocks, dim, heads),
            "VSS": partial(_vss_blocks, dim, scan_backend),
        }
        generator = torch.Generator().manual_seed(protocol.seed)
        image = torch.randn(batch, side, side, dim, generator=generator).to(protocol.device)
        step = _forward_and_backward(image, autocast=protocol.autocast)
        measured = measure_networks(builders, step, protocol, images=batch)
        sizes = {"stage": stage + 1, "channels": dim, "side": side}
        rows += [{**sizes, **row} for row in measured["rows"]]
        notes += measured["notes"]
    return {"rows": rows, "notes": notes}


def swin_blocks(dim: int, heads: int) -> nn.Module:
    """Our Swin block, unshifted and shifted."""
    return nn.Sequential(*(SwinBlock(dim, heads, WINDOW, shifted=s) for s in (False, True)))


def _vss_blocks(dim: int, scan_backend: str) -> nn.Module:
    return nn.Sequential(*(VSSBlock(dim, scan_backend=scan_backend) for _ in range(2)))


def _forward_and_backward(image: Tensor, *, autocast: bool) -> Step:
    """Gradients of all parameters and of `image` (B, H, W, C)."""
    upstream = torch.randn_like(image)

    def make(blocks: nn.Module) -> Call:
        wanted = [image.clone().requires_grad_(), *blocks.train().parameters()]

        def call() -> None:
            with autocast_on(image, autocast):
                out = blocks(wanted[0])
            torch.autograd.grad(out, wanted, upstream.to(out.dtype))

        return call

    return make
