import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(repeatable):
    """Small tensors gain nothing from a second thread, and lose much on a busy machine."""
    torch.set_num_threads(1)
