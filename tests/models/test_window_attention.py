import pytest
import torch
import torch.nn.functional as F

from mambaseg.models import SwinBlock, WindowAttention, window_attention
from mambaseg.models.window_attention import attention_mask, relative_position_index


def brute_force(attention, x):
    """Attend token by token: keys are the valid tokens of the same window, never a wrapped one."""
    height, width, dim = x.shape
    window, heads = attention.window, attention.heads
    shifts = [attention.shift if size > window else 0 for size in (height, width)]
    query, key, value = attention.qkv(x).unflatten(-1, (3, heads, dim // heads)).unbind(2)
    out = torch.zeros_like(x)
    tokens = [(i, j) for i in range(height) for j in range(width)]

    def window_of(i, j):
        return (i - shifts[0]) // window, (j - shifts[1]) // window

    for i, j in tokens:
        others = [token for token in tokens if window_of(*token) == window_of(i, j)]
        for head in range(heads):
            scores = []
            for k, m in others:
                offset = (i - k + window - 1) * (2 * window - 1) + (j - m + window - 1)
                score = query[i, j, head] @ key[k, m, head] * (dim // heads) ** -0.5
                scores.append(score + attention.relative_position_bias_table[offset, head])
            weights = torch.stack(scores).softmax(0)
            seen = torch.stack([value[k, m, head] for k, m in others])
            out[i, j, head * (dim // heads) : (head + 1) * (dim // heads)] = weights @ seen
    return attention.proj(out)


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize(
    "size", [(6, 9), (5, 7), (2, 7), (3, 3), (1, 1), (4, 3)], ids=str
)  # window 3: whole windows, padded on both axes, one window on an axis, one in all, one token
def test_attention_is_what_a_loop_over_tokens_gives(size, shifted):
    attention = WindowAttention(8, heads=2, window=3, shifted=shifted).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(*size, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attention(x[None])[0], brute_force(attention, x))


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_values_of_padded_tokens_do_not_matter(shifted, monkeypatch):
    attention = WindowAttention(8, heads=2, window=7, shifted=shifted)
    x = torch.randn(2, 16, 5, 8)
    with torch.no_grad():
        expected = attention(x)
        pad, pads = F.pad, []

        def pad_with_large_values(tensor, widths):
            pads.append(widths)
            return pad(tensor, widths, value=1e3)

        monkeypatch.setattr(window_attention.F, "pad", pad_with_large_values)
        assert torch.equal(attention(x), expected)
    assert pads == [(0, 0, 0, 2, 0, 5)]


def test_shift_connects_neighbouring_windows():
    x = torch.randn(1, 14, 14, 8)
    changed = x.clone()
    changed[0, 7, 7] += 1
    for shifted, rows in [(False, range(7, 14)), (True, range(3, 10))]:
        attention = WindowAttention(8, heads=2, window=7, shifted=shifted)
        with torch.no_grad():
            differs = (attention(x) != attention(changed)).any(-1)[0]
        assert sorted(set(differs.nonzero()[:, 0].tolist())) == list(rows)


def test_every_token_may_attend_to_itself():
    mask = attention_mask(5, 9, 4, (2, 2), torch.device("cpu"))
    assert mask.shape == (6, 1, 16, 16)
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert torch.equal(mask, mask.mT)


def test_relative_positions_are_numbered_once_per_offset():
    index = relative_position_index(3)
    assert index.shape == (9, 9)
    assert sorted(index.unique().tolist()) == list(range(25))
    assert set(index.diagonal().tolist()) == {12}  # offset (0, 0) is the middle
    assert index[0, 1] == 11  # the query is one column left of the key
    assert index[0, 3] == 7  # the query is one row above the key


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="10 channels do not divide into 3 heads"):
        WindowAttention(10, heads=3, window=7, shifted=False)


def test_block_is_two_residual_branches():
    block = SwinBlock(8, heads=2, window=4, shifted=True).eval()
    x = torch.randn(1, 6, 6, 8)
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.equal(block(x), x)
