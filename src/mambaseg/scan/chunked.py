"""The `torch` backend: a chunked scan in ordinary PyTorch operations, on every device.

A loop over L steps is slow because each step is a few small operations. Here a sequence is cut into
M chunks of T steps, both about √L, and all chunks advance together:

1. each chunk from a state of zero, T steps: the state it would end with;
2. from chunk to chunk, M steps: the state each one really starts from;
3. each chunk again, from there, T steps: all states.

The backward does the same from the other end. States are only ever multiplied by decays
exp(Δ A) <= 1. The popular shorter form, with cumulative sums in the exponent, divides by products
of decays instead and overflows with ordinary step sizes.

All states at once would be N times as large as the input, so channels are done in blocks. Letters
as in `reference`, and R = M B: the chunks of all batch elements, side by side in the last axis.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseg.scan.operators import make_operator

BLOCK_ELEMENTS = {"cpu": 2**22}
"""States computed at a time, per device type: about four buffers of this size are in use."""
DEFAULT_BLOCK_ELEMENTS = 2**26  # accelerators want few, large operations


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `reference.selective_scan`: same arguments, same result."""
    out_dtype = u.dtype
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C, D, delta_bias = (
        t.to(state_dtype) for t in (u, delta, A, B, C, D, delta_bias)
    )
    delta = F.softplus(delta + delta_bias[..., None], threshold=20.0)
    steps = math.isqrt(u.shape[-1] - 1) + 1
    chunked = (_to_chunks(t, steps) for t in (delta, delta * u, B, C))
    recurrence: Callable[..., Any] = _in_loops if torch.compiler.is_exporting() else _scan
    y, _ = recurrence(*chunked, A.transpose(1, 2).contiguous(), u.shape[0])
    return (_from_chunks(y, u.shape) + D[..., None] * u).to(out_dtype)


def _to_chunks(sequences: Tensor, steps: int) -> Tensor:
    """Cut sequences (B, K, F, L) into chunks (T, K, F, R); zeros fill up the first one.

    Steps of size zero before the start leave the states at zero; after the end, a NaN among the
    states would reach gradients that it has no part in.
    """
    length = sequences.shape[-1]
    chunks = math.ceil(length / steps)
    whole = F.pad(sequences, (chunks * steps - length, 0))
    return whole.unflatten(-1, (chunks, steps)).permute(4, 1, 2, 3, 0).flatten(3).contiguous()


def _from_chunks(chunks: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_to_chunks`: sequences of `shape`."""
    whole = chunks.unflatten(-1, (-1, shape[0])).permute(4, 1, 2, 3, 0).flatten(3)
    return whole[..., whole.shape[-1] - shape[-1] :]


# ------------------------------------------------------------------ the recurrence as an operator


class _Chunks(NamedTuple):
    """What the recurrence takes."""

    delta: Tensor  # step sizes Δ, positive, (T, K, D, R)
    inflow: Tensor  # Δ u, (T, K, D, R)
    B: Tensor  # input weights, (T, K, N, R)
    C: Tensor  # output weights, (T, K, N, R)
    A: Tensor  # decay rates, (K, N, D)


def _forward(inputs: _Chunks, batch: int) -> tuple[Tensor, Tensor]:
    """Compute h_t = exp(Δ_t A) h_t-1 + B_t inflow_t and y_t = C_t h_t, in chunks.

    Returns:
        y (T, K, D, R), and the state that each chunk starts from (K, N, D, R).
    """
    delta, inflow, B, C, A = inputs
    y, starts = _empty(inputs, batch)
    for block in _blocks(delta, A):
        decays = _decays(delta, A, block)
        states = inflow[:, :, None, block] * B[:, :, :, None]
        end = states[0].clone()
        for decay, state in zip(decays[1:], states[1:], strict=True):
            torch.addcmul(state, decay, end, out=end)
        start = _carry(_decay_of_chunks(delta, A, block), end, batch)
        starts[:, :, block] = start
        for decay, state in zip(decays, states, strict=True):
            start = state.addcmul_(decay, start)
        y[:, :, block] = states.mul_(C[:, :, :, None]).sum(2)
    return y, starts


def _empty(inputs: _Chunks, batch: int) -> tuple[Tensor, Tensor]:
    delta = inputs.delta
    return delta.new_empty(delta.shape), delta.new_empty(*inputs.A.shape, delta.shape[-1])


def _backward(d_y: Tensor, inputs: _Chunks, starts: Tensor, batch: int) -> tuple[Tensor, ...]:
    delta, inflow, B, C, A = inputs
    d_delta, d_inflow, d_A = (torch.empty_like(t) for t in (delta, inflow, A))
    d_B, d_C = torch.zeros_like(B), torch.zeros_like(C)
    for block in _blocks(delta, A):
        decays = _decays(delta, A, block)
        states = delta.new_empty(len(delta) + 1, *decays.shape[1:])  # with the one before the first
        states[0] = starts[:, :, block]
        torch.mul(inflow[:, :, None, block], B[:, :, :, None], out=states[1:])
        for t, decay in enumerate(decays):
            states[t + 1].addcmul_(decay, states[t])
        d_y_block = d_y[:, :, None, block]
        d_C += (states[1:] * d_y_block).sum(3)
        whole = _decay_of_chunks(delta, A, block)
        d_states = _state_gradients(d_y_block * C[:, :, :, None], decays, whole, batch)
        d_B += (d_states * inflow[:, :, None, block]).sum(3)
        d_inflow[:, :, block] = (d_states * B[:, :, :, None]).sum(2)
        d_exponent = d_states.mul_(decays).mul_(states[:-1])
        d_delta[:, :, block] = (d_exponent * A[:, :, block, None]).sum(2)
        d_A[:, :, block] = d_exponent.mul_(delta[:, :, None, block]).sum((0, 4))
    return d_delta, d_inflow, d_B, d_C, d_A


_scan = make_operator(
    "chunked_scan", _forward, _backward, _empty, kind=_Chunks, options=", SymInt batch"
)


def _in_loops(
    delta: Tensor, inflow: Tensor, B: Tensor, C: Tensor, A: Tensor, batch: int
) -> tuple[Tensor, None]:
    """The same three steps as loops that an exported graph can hold (ONNX: its operator `Scan`).

    An exported network has to run without this package, so without its operators. No gradients.
    """
    from torch._higher_order_ops.scan import scan  # torch has no public name for it yet

    rates = A[..., None]  # (K, N, D, 1)

    def advance(state: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        delta, inflow, B = at[:3]  # (K, D, R), (K, D, R), (K, N, R)
        return torch.exp(delta[:, None] * rates) * state + inflow[:, None] * B[:, :, None]

    def to_end(state: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        state = advance(state, at)
        return state, state.new_zeros(())  # a loop has to give something

    def to_next(start: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        decay, end = at  # (K, N, D, B)
        return decay * start + end, start.clone()

    def to_output(state: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        state = advance(state, at)
        return state, (state * at[3][:, :, None]).sum(1)

    zero = delta.new_zeros(*A.shape, delta.shape[-1])
    end, _ = scan(to_end, zero, (delta, inflow, B), dim=0)
    whole = torch.exp(delta.sum(0)[:, None] * rates)
    chunks = tuple(t.unflatten(-1, (-1, batch)).movedim(-2, 0).contiguous() for t in (whole, end))
    _, starts = scan(to_next, delta.new_zeros(*A.shape, batch), chunks, dim=0)
    start = starts.movedim(0, -2).flatten(-2).contiguous()
    _, y = scan(to_output, start, (delta, inflow, B, C), dim=0)
    return y, None


# ------------------------------------------------------------------ parts of both directions


def _blocks(delta: Tensor, A: Tensor) -> Iterator[slice]:
    """Blocks of channels whose states (T, K, N, block, R) stay below the limit."""
    limit = BLOCK_ELEMENTS.get(delta.device.type, DEFAULT_BLOCK_ELEMENTS)
    channels = delta.shape[2]
    size = max(1, limit * channels // (delta.numel() * A.shape[1]))
    return (slice(first, first + size) for first in range(0, channels, size))


def _decays(delta: Tensor, A: Tensor, block: slice) -> Tensor:
    """Give exp(Δ A), in (0, 1], for a block of channels: (T, K, N, block, R)."""
    return (delta[:, :, None, block] * A[:, :, block, None]).exp_()


def _decay_of_chunks(delta: Tensor, A: Tensor, block: slice) -> Tensor:
    """Give the product of all decays of a chunk: (K, N, block, R)."""
    return _decays(delta.sum(0, keepdim=True), A, block)[0]


def _carry(decays: Tensor, ends: Tensor, batch: int) -> Tensor:
    """Step 2: turn the ends of chunks that start from zero into the true starts of all chunks.

    Shapes (K, N, D, R): `decays` over each whole chunk, `ends`, and the result.
    """
    starts = torch.zeros_like(ends)
    decay, end, start = (t.split(batch, dim=-1) for t in (decays, ends, starts))
    for m in range(1, len(start)):
        torch.addcmul(end[m - 1], decay[m - 1], start[m - 1], out=start[m])
    return starts


def _state_gradients(gradients: Tensor, decays: Tensor, whole: Tensor, batch: int) -> Tensor:
    """Turn the gradients C d_y of the states' own outputs into those of the states, in place.

    The three steps of the forward, from the last step to the first. Shapes (T, K, N, D, R); `whole`
    holds the decays of whole chunks, (K, N, D, R).
    """
    into_chunk = torch.zeros_like(whole)  # gradient of the state before a chunk, from this chunk
    for t in range(len(gradients) - 1, -1, -1):
        into_chunk.add_(gradients[t]).mul_(decays[t])
    behind = torch.zeros_like(whole)  # gradient of the last state of a chunk, from all chunks after
    chunks = (t.split(batch, dim=-1) for t in (whole, into_chunk, behind))
    decay_of, gradient_of, result = chunks
    for m in range(len(result) - 2, -1, -1):
        torch.addcmul(gradient_of[m + 1], decay_of[m + 1], result[m + 1], out=result[m])
    gradients[-1] += behind
    for t in range(len(gradients) - 2, -1, -1):
        gradients[t].addcmul_(decays[t + 1], gradients[t + 1])
    return gradients
