import resource
import subprocess
import sys

import pytest
import torch
from scan_inputs import image_inputs, sequence_inputs, value_and_gradients

from mambaseg.scan import selective_scan_2d

pytest.importorskip("numba")


def test_importing_the_package_does_not_import_numba():
    code = "import sys, mambaseg.scan; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("width", [0, 5])
def test_the_operator_passes_opcheck(width):
    from mambaseg.scan import numba

    u, delta, A, B, C, D, bias = (t.float() for t in sequence_inputs(2, 4, 18, 20, 4))
    delta, B, C = (t.transpose(2, 3) for t in (delta, B, C))
    x = u.transpose(2, 3)[:, :1] if width else u.transpose(2, 3)
    inputs = [t.detach().requires_grad_() for t in (x, delta, A, B, C, D, bias)]
    torch.library.opcheck(numba._scan, (*inputs, width))


def test_results_do_not_depend_on_the_number_of_threads():
    from mambaseg.scan import numba

    before = torch.get_num_threads()
    inputs = image_inputs(3, 9, 8, 80, 16)
    try:
        torch.set_num_threads(1)
        alone = value_and_gradients(numba.selective_scan_2d, inputs, torch.float32)
        torch.set_num_threads(2)
        together = value_and_gradients(numba.selective_scan_2d, inputs, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_torch_decides_how_many_threads_run():
    import numba

    from mambaseg.scan.numba import selective_scan_2d as fused

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        fused(*(t.float() for t in image_inputs(1, 2, 2, 16, 2)))
        assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_memory_is_that_of_the_tensors_not_of_the_states():
    inputs = image_inputs(1, 64, 64, 64, 16)
    value_and_gradients(lambda *t: selective_scan_2d(*t, backend="numba"), inputs, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inputs = image_inputs(1, 128, 128, 64, 16)
    value_and_gradients(lambda *t: selective_scan_2d(*t, backend="numba"), inputs, torch.float32)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB
    assert grown < 400  # all states of the four directions would be 256 MiB more than the tensors
