"""The 2-D scan from any 1-D scan: what the four directions mean, and a form every backend can run.

Source: Liu et al., "VMamba: Visual State Space Model" (2024), section 4.2 (SS2D: cross-scan, scan,
cross-merge). An image of H x W positions is read as four sequences of length L = H W: along the
rows, down the columns, and both of these backwards. Each is scanned on its own, and the four
outputs of a position are summed. Letters as in `reference`; K = 4.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NUM_DIRECTIONS = 4

Scan1d = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def selective_scan_2d(
    scan: Scan1d,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """Scan an image in four directions with a 1-D `scan` and sum the four outputs.

    `scan` is a 1-D selective scan, called as `scan(u, delta, A, B, C, D, delta_bias)`; the other
    arguments and the result are those of `dispatch.selective_scan_2d`.
    """
    height, width = x.shape[1:3]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # so that the sum is not in bfloat16
    four = wide.unsqueeze(3).expand(-1, -1, -1, NUM_DIRECTIONS, -1)
    y = scan(cross_scan(four), cross_scan(delta), A, cross_scan(B), cross_scan(C), D, delta_bias)
    return cross_merge(y, height, width).to(x.dtype)


def cross_scan(image: Tensor) -> Tensor:
    """Read each of the four maps (B, H, W, K, F) in its own direction: sequences (B, K, F, L)."""
    rows, columns, rows_back, columns_back = image.unbind(dim=3)  # each (B, H, W, F)
    sequences = (
        rows.flatten(1, 2),
        columns.transpose(1, 2).flatten(1, 2),
        rows_back.flatten(1, 2).flip(1),
        columns_back.transpose(1, 2).flatten(1, 2).flip(1),
    )
    return torch.stack(sequences, dim=1).transpose(2, 3)  # (B, K, L, F) -> (B, K, F, L)


def cross_merge(sequences: Tensor, height: int, width: int) -> Tensor:
    """Put the four sequences (B, K, F, L) back in place and sum them: an image (B, H, W, F)."""
    rows, columns, rows_back, columns_back = sequences.unbind(dim=1)  # each (B, F, L)
    by_rows = (rows + rows_back.flip(-1)).unflatten(-1, (height, width))
    by_columns = (columns + columns_back.flip(-1)).unflatten(-1, (width, height))
    return by_rows.permute(0, 2, 3, 1) + by_columns.permute(0, 3, 2, 1)
