"""What the backends for a GPU share, where autocast there would change it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mambaseg.scan.operators import merge_directions


@pytest.fixture
def autocast():
    """Autocast of a GPU to bfloat16; its context manager does nothing where there is none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_of_the_directions_keeps_its_type_under_autocast(autocast, dtype):
    with FakeTensorMode():
        each = torch.empty(2, 35, 4, 19, dtype=dtype, device="cuda")
        assert each.sum(dim=2).dtype == torch.float32  # as autocast wants it
        merged = merge_directions(each, 7)
    assert merged.dtype == dtype and merged.shape == (2, 35, 1, 19)
