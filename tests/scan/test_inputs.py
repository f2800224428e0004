import math

import pytest
import torch
from scan_inputs import NAMES, relative_errors


@pytest.mark.parametrize("which", range(len(NAMES)))
def test_a_nan_anywhere_is_an_error(which):
    expected = [torch.ones(2) for _ in NAMES]
    actual = [t.clone() for t in expected]
    actual[which][0] = float("nan")
    assert max(relative_errors(actual, expected).values()) == math.inf
