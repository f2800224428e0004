"""Every backend that can run here against the float64 reference: values and all gradients."""

import pytest
import torch
from scan_inputs import image_inputs, relative_errors, sequence_inputs, value_and_gradients

from mambaseg.scan import available_backends, selective_scan, selective_scan_2d

BACKENDS = available_backends("cpu")
SEQUENCES = [  # B, K, D, L, N
    (2, 4, 32, 65, 16),
    (1, 1, 5, 1, 1),
    (2, 3, 7, 200, 8),
    (1, 2, 50, 49, 16),
    (3, 1, 33, 7, 1),
    (1, 1, 16, 128, 17),
]
IMAGES = [(2, 5, 7, 32, 16), (1, 9, 20, 21, 8), (1, 1, 1, 3, 1), (3, 1, 70, 16, 4)]  # B, H, W, D, N


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def scan_1d(backend):
    return lambda *inputs: selective_scan(*inputs, backend=backend)


def scan_2d(backend):
    return lambda *inputs: selective_scan_2d(*inputs, backend=backend)


def four_explicit_scans(x, delta, A, B, C, D, delta_bias):
    """The 2-D form spelled out with stack, flip and cat, one scan per direction."""
    height, width = x.shape[1:3]
    total = torch.zeros_like(x)
    for k in range(4):

        def read(image, k=k):  # (B, H, W, F) -> (B, 1, F, L)
            if k % 2 == 1:
                image = torch.stack([image[:, :, j] for j in range(width)], dim=1)
            lines = torch.cat(list(image.unbind(1)), dim=1)  # (B, L, F)
            return (lines.flip(1) if k >= 2 else lines).permute(0, 2, 1)[:, None]

        parameters = (A[k : k + 1], D[k : k + 1], delta_bias[k : k + 1])
        y = selective_scan(
            read(x), read(delta[:, :, :, k]), parameters[0], read(B[:, :, :, k]),
            read(C[:, :, :, k]), *parameters[1:], backend="reference",
        )[:, 0].permute(0, 2, 1)  # fmt: skip
        y = y.flip(1) if k >= 2 else y
        if k % 2 == 1:
            y = torch.stack(y.split(height, dim=1), dim=2)
        else:
            y = torch.stack(y.split(width, dim=1), dim=1)
        total = total + y
    return total


@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
def test_sequences_agree_with_the_reference(backend, shape):
    inputs = sequence_inputs(*shape)
    expected = value_and_gradients(scan_1d("reference"), inputs)
    errors = relative_errors(value_and_gradients(scan_1d(backend), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_images_agree_with_four_explicit_scans(backend, shape):
    inputs = image_inputs(*shape)
    expected = value_and_gradients(four_explicit_scans, inputs)
    errors = relative_errors(value_and_gradients(scan_2d(backend), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


def test_float64_images_are_exact(backend):
    inputs = image_inputs(1, 3, 5, 4, 3)
    expected = value_and_gradients(four_explicit_scans, inputs)
    errors = relative_errors(value_and_gradients(scan_2d(backend), inputs), expected)
    assert max(errors.values()) < 1e-12, errors


def test_bfloat16_stays_within_its_precision(backend):
    inputs = image_inputs(2, 6, 9, 32, 16)
    parameters = {2, 5, 6}  # A, D and delta_bias stay float32, as in a network under autocast

    def mixed(*leaves):
        cast = [t.float() if i in parameters else t.bfloat16() for i, t in enumerate(leaves)]
        return selective_scan_2d(*cast, backend=backend)

    actual = value_and_gradients(mixed, inputs, torch.float32)
    assert actual[0].dtype == torch.bfloat16
    errors = relative_errors(actual, value_and_gradients(four_explicit_scans, inputs))
    assert max(errors.values()) < 1e-2, errors


def test_strides_of_the_inputs_do_not_matter(backend):
    inputs = [t.float() for t in sequence_inputs(2, 2, 20, 70, 8)]
    expected = value_and_gradients(scan_1d(backend), inputs, torch.float32)

    def strided(u, delta, A, B, C, D, delta_bias):
        def sliced(t):  # the same numbers, every other element of a tensor twice as long
            return torch.stack((t, torch.full_like(t, float("nan"))), dim=-1)[..., 0]

        def channels_last(t):
            return t.transpose(2, 3).contiguous().transpose(2, 3)

        return scan_1d(backend)(
            channels_last(u), sliced(delta), sliced(A), channels_last(B), sliced(C), sliced(D),
            sliced(delta_bias),
        )  # fmt: skip

    errors = relative_errors(value_and_gradients(strided, inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-6, errors


def test_an_expanded_gradient_of_the_output_is_understood(backend):
    inputs = [t.float().requires_grad_() for t in image_inputs(2, 4, 5, 18, 4)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    actual = torch.autograd.grad(scan_2d(backend)(*inputs).sum(), inputs)
    expected = torch.autograd.grad(four_explicit_scans(*wide).sum(), wide)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_extreme_step_sizes_are_right_in_both_tails(backend):
    inputs = sequence_inputs(1, 2, 17, 80, 16)
    inputs[1] = torch.linspace(-60, 60, inputs[1].numel(), dtype=torch.float64).view_as(inputs[1])
    expected = value_and_gradients(scan_1d("reference"), inputs)
    errors = relative_errors(value_and_gradients(scan_1d(backend), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("which", range(7))
def test_a_nan_comes_out_wherever_the_reference_has_one(backend, which):
    inputs = [t.float() for t in sequence_inputs(1, 2, 20, 40, 4)]
    inputs[which].view(-1)[inputs[which].numel() // 2] = float("nan")
    expected = value_and_gradients(scan_1d("reference"), inputs, torch.float32)
    actual = value_and_gradients(scan_1d(backend), inputs, torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())


def test_the_same_inputs_give_the_same_bits(backend):
    inputs = image_inputs(2, 9, 8, 80, 16)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            runs.append(value_and_gradients(scan_2d(backend), inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for first, again in zip(runs[0], runs[1], strict=True):
        assert torch.equal(first, again)


def test_every_element_is_written(backend):
    """Fresh memory is filled with NaN, so an element that a backend forgets shows."""
    inputs = image_inputs(2, 5, 13, 37, 5)
    torch.use_deterministic_algorithms(True)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        results = value_and_gradients(scan_2d(backend), inputs, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills
    assert not any(t.isnan().any() for t in results)


def test_no_gradient_is_kept_in_inference(backend):
    inputs = [t.float() for t in image_inputs(1, 4, 4, 16, 4)]
    with torch.inference_mode():
        y = scan_2d(backend)(*inputs)
    torch.testing.assert_close(y.clone(), scan_2d(backend)(*inputs))
