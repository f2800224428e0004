"""The bidirectional WKV of RWKV networks for images, in linear time with plain tensor operations.

Source: Duan et al. 2024, Vision-RWKV, arXiv 2403.02308, section 3.2. For T positions of a channel
with decay w and bonus u, every position sees all others, weighed by distance::

    y_i = Σ_j exp(s_ij) v_j / Σ_j exp(s_ij)     s_ij = k_j − w (|i − j| − 1), s_ii = k_i + u

As exp(−w (i − j)) is exp(−w i) exp(w j), the sums over j < i and over j > i are cumulative sums.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bidirectional_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Average the values v (B, T, C) around each position; w and u (C,), k and the result as v.

    Sums are float32 (float64 for float64) whatever the inputs are. There |w| T may be up to 60:
    it is the range of all weights of a channel. (RWKV-UNet's w is a parameter divided by T, which
    starts at 0.)
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    w, u, k, values = (t.to(dtype) for t in (w, u, k, v))
    length = k.shape[1]
    place = torch.arange(length, dtype=dtype, device=k.device) - (length - 1) / 2
    growth = torch.exp(place[:, None] * w)  # (T, C), centred: half of the range on either side
    # What numerator and denominator have in common: the largest k, and for w < 0 the far ends.
    largest = k.detach().amax(1, keepdim=True) - w.detach().clamp(max=0) * (length / 2)
    key = torch.exp(k - largest)
    both = torch.stack([key * values, key])  # of numerator and denominator, (2, B, T, C)
    before = _exclusive_sum(both * growth) / growth
    after = _exclusive_sum((both / growth).flip(2)).flip(2) * growth
    numerator, denominator = torch.exp(w) * (before + after) + torch.exp(u) * both
    return (numerator / denominator).to(v.dtype)


def _exclusive_sum(x: Tensor) -> Tensor:
    """Sum what comes before each position of (2, B, T, C)."""
    return F.pad(x[:, :, :-1].cumsum(2), (0, 0, 1, 0))
