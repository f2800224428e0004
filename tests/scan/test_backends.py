"""Every backend that can run here against the float64 reference: values and all gradients."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import (
    BACKENDS,
    DEVICES,
    INTERPRETED,
    fit,
    image_inputs,
    relative_errors,
    scan_1d,
    scan_2d,
    sequence_inputs,
    value_and_gradients,
)

from mambaseg.models import MambaUNet
from mambaseg.scan import selective_scan, selective_scan_2d

SEQUENCES = [  # B, K, D, L, N; and the same for an interpreter
    ((2, 4, 32, 65, 16), (1, 2, 33, 9, 2)),
    ((1, 1, 5, 1, 1), (1, 1, 5, 1, 1)),
    ((2, 3, 7, 200, 8), (2, 3, 7, 4, 8)),
    ((1, 2, 50, 49, 16), (1, 1, 2, 18, 16)),
    ((3, 1, 33, 7, 1), (3, 1, 3, 7, 1)),
    ((1, 1, 16, 128, 17), (1, 1, 3, 8, 17)),
]
IMAGES = [  # B, H, W, D, N
    ((2, 5, 7, 32, 16), (1, 4, 3, 5, 3)),
    ((1, 9, 20, 21, 8), (1, 2, 3, 33, 2)),
    ((1, 1, 1, 3, 1), (1, 1, 1, 3, 1)),
    ((3, 1, 70, 16, 4), (2, 1, 5, 3, 2)),
]

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


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


@cache
def true_sequences(shape):
    return value_and_gradients(scan_1d("reference"), sequence_inputs(*shape))


@cache
def true_images(shape):
    return value_and_gradients(four_explicit_scans, image_inputs(*shape))


@pytest.mark.parametrize("shapes", SEQUENCES, ids=str)
def test_sequences_agree_with_the_reference(backend, shapes):
    shape = fit(backend, *shapes)
    inputs, expected = sequence_inputs(*shape), true_sequences(shape)
    errors = relative_errors(value_and_gradients(scan_1d(backend), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("shapes", IMAGES, ids=str)
def test_images_agree_with_four_explicit_scans(backend, shapes):
    shape = fit(backend, *shapes)
    inputs, expected = image_inputs(*shape), true_images(shape)
    errors = relative_errors(value_and_gradients(scan_2d(backend), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


def test_float64_images_are_exact(backend):
    inputs = image_inputs(1, 3, 5, 4, 3)
    expected = value_and_gradients(four_explicit_scans, inputs)
    errors = relative_errors(value_and_gradients(scan_2d(backend), inputs), expected)
    assert max(errors.values()) < 1e-12, errors


def test_bfloat16_stays_within_its_precision(backend):
    inputs = image_inputs(*fit(backend, (2, 6, 9, 32, 16), (1, 2, 5, 8, 3)))
    parameters = {2, 5, 6}  # A, D and delta_bias stay float32, as in a network under autocast

    def mixed(*leaves):
        cast = [t.float() if i in parameters else t.bfloat16() for i, t in enumerate(leaves)]
        return scan_2d(backend)(*cast)

    actual = value_and_gradients(mixed, inputs, torch.float32)
    assert actual[0].dtype == torch.bfloat16
    errors = relative_errors(actual, value_and_gradients(four_explicit_scans, inputs))
    assert max(errors.values()) < 1e-2, errors


def test_strides_of_the_inputs_do_not_matter(backend):
    shape = fit(backend, (2, 2, 20, 70, 8), (2, 1, 5, 6, 3))
    inputs = [t.float() for t in sequence_inputs(*shape)]
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
    shape = fit(backend, (2, 4, 5, 18, 4), (1, 2, 3, 5, 2))
    inputs = [t.float().requires_grad_() for t in image_inputs(*shape)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    actual = torch.autograd.grad(scan_2d(backend)(*inputs).sum(), inputs)
    expected = torch.autograd.grad(four_explicit_scans(*wide).sum(), wide)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_extreme_step_sizes_are_right_in_both_tails(backend):
    inputs = sequence_inputs(*fit(backend, (1, 2, 17, 80, 16), (1, 1, 9, 10, 3)))
    inputs[1] = torch.linspace(-60, 60, inputs[1].numel(), dtype=torch.float64).view_as(inputs[1])
    expected = value_and_gradients(scan_1d("reference"), inputs)
    errors = relative_errors(value_and_gradients(scan_1d(backend), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("which", range(7))
def test_a_nan_comes_out_wherever_the_reference_has_one(backend, which):
    shape = fit(backend, (1, 2, 20, 40, 4), (1, 2, 4, 6, 2))
    inputs = [t.float() for t in sequence_inputs(*shape)]
    inputs[which].view(-1)[inputs[which].numel() // 2] = float("nan")
    expected = value_and_gradients(scan_1d("reference"), inputs, torch.float32)
    actual = value_and_gradients(scan_1d(backend), inputs, torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())


def test_the_same_inputs_give_the_same_bits(backend):
    if backend == "mamba_ssm":
        pytest.skip("the CUDA extension sums gradients of B and C in no fixed order")
    inputs = image_inputs(*fit(backend, (2, 9, 8, 80, 16), (2, 1, 2, 33, 2)))
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            runs.append(value_and_gradients(scan_2d(backend), inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for first, again in zip(*runs, strict=True):  # also on another number of threads
        assert torch.equal(first, again)


def test_every_element_is_written(backend):
    """Fresh memory is filled with NaN, so an element that a backend forgets shows."""
    inputs = image_inputs(*fit(backend, (2, 5, 13, 37, 5), (1, 1, 3, 33, 3)))
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
    inputs = [t.float() for t in image_inputs(1, 2, 3, 16, 4)]
    with torch.inference_mode():
        y = scan_2d(backend)(*inputs)
    torch.testing.assert_close(y.clone(), scan_2d(backend)(*inputs))


@pytest.mark.parametrize("function", [selective_scan, selective_scan_2d])
def test_it_compiles_without_a_graph_break(backend, function):
    if function is selective_scan:
        scan, inputs = (
            scan_1d(backend),
            sequence_inputs(*fit(backend, (1, 4, 6, 18, 4), (1, 1, 2, 3, 2))),
        )
    else:
        scan, inputs = (
            scan_2d(backend),
            image_inputs(*fit(backend, (1, 4, 6, 18, 4), (1, 2, 2, 3, 2))),
        )

    def call(*tensors):
        return scan(*tensors) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(call, inputs, torch.float32)
    errors = relative_errors(value_and_gradients(compiled, inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-6, errors


@cache
def losses(name, device):
    """Twelve steps of a small network, with dropped paths and momentum."""
    torch.manual_seed(0)
    network = MambaUNet(embed_dim=16, depths=(1, 1, 1, 1), d_state=4, scan_backend=name).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.rand(12, 2, 1, 32, 32), torch.randint(4, (2, 32, 32)).to(device)
    curve = []
    for image in images.to(device):
        loss = F.cross_entropy(network(image), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def test_training_goes_the_same_way_on_every_backend(backend):
    if backend == "triton" and INTERPRETED:
        pytest.skip("the steps take an hour in Triton's interpreter; a GPU runs this")
    if backend == "cuda" and DEVICES["cuda"] == "cpu":
        pytest.skip("the steps take a minute in the emulator; a GPU runs this")
    expected = losses("reference", DEVICES[backend])
    assert expected[-1] < 0.95 * expected[0]
    assert losses(backend, DEVICES[backend]) == pytest.approx(expected, rel=1e-4)
