"""What a method shows its networks in a step, and what it makes of their answers."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import nn

from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from mambaseg.models import UNet
from mambaseg.models.stochastic import Dropout
from mambaseg.training.losses import DiceCE
from mambaseg.training.methods.deep_adversarial import DeepAdversarial, Discriminator
from mambaseg.training.methods.deep_co_training import DeepCoTraining
from mambaseg.training.methods.dmpls import DMPLS
from mambaseg.training.methods.entropy import Entropy
from mambaseg.training.methods.fixmatch import FixMatch
from mambaseg.training.methods.gated_crf import GatedCRF
from mambaseg.training.methods.ict import ICT
from mambaseg.training.methods.mean_teacher import MeanTeacher
from mambaseg.training.methods.method import Step
from mambaseg.training.methods.mumford_shah import MumfordShah
from mambaseg.training.methods.peers import Peers
from mambaseg.training.methods.semi_mamba_unet import SemiMambaUNet
from mambaseg.training.methods.uamt import UAMT
from mambaseg.training.methods.urpc import URPC, pyramid_consistency
from mambaseg.training.methods.ustm import USTM
from mambaseg.training.methods.weak_mamba_unet import WeakMambaUNet
from mambaseg.training.segmentation import SegmentationTask

LOSS = DiceCE(partial=True)


class Watched(nn.Module):
    """Logits pixel by pixel; remembers the images that it was shown, and in which mode."""

    def __init__(self, classes=4, norm=False):
        super().__init__()
        self.norm = nn.BatchNorm2d(1) if norm else nn.Identity()
        self.head = nn.Conv2d(1, classes, 1)
        nn.init.normal_(self.head.weight, std=3)
        self.seen, self.modes = [], []

    def forward(self, image):
        self.seen.append(image.detach())
        self.modes.append(self.training)
        return self.head(self.norm(image))


class Says(nn.Module):
    """Answers with known logits, call by call."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, image):
        return self.outputs.pop(0) if len(self.outputs) > 1 else self.outputs[0]

    def __deepcopy__(self, memo):
        return Says(*self.outputs)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def step_of(image, *, labelled=2, number=700, steps=1000, seed=1, **options):
    return Step(
        image=image,
        label=torch.randint(3, (len(image), *image.shape[2:])),
        labelled=labelled,
        number=number,
        steps=steps,
        positions=range(len(image)),
        seed=seed,
        run=lambda function, image, places, turn: function(image),
        supervised_loss=LOSS,
        **options,
    )


def risen(number, steps, stairs):
    """The ramp of a weight, written out."""
    return math.exp(-5 * (1 - math.floor(number * stairs / steps) / stairs) ** 2)


# ---- noise and teachers


def test_a_teacher_sees_clipped_noise_of_its_own_on_the_unlabelled_images():
    image = torch.rand(6, 1, 16, 16)
    method = MeanTeacher([Watched()], noise=0.1, clip=0.15).train()
    method.terms(step_of(image))
    (student,), (taught,) = method.network.seen, method.teacher.network.seen
    assert torch.equal(student, image)
    noise = taught - image[2:]
    assert noise.abs().max() == pytest.approx(0.15, abs=1e-6)
    clipped = (noise.abs() > 0.1499).float().mean()  # 13.4 % of a normal distribution at 1.5 σ
    assert 0.09 < clipped < 0.18 and 0.08 < noise.std() < 0.1
    assert not torch.equal(noise[0], noise[1])
    assert method.teacher.network.modes == [True]


@pytest.mark.parametrize("kind", [UAMT, USTM])
def test_each_pass_of_a_teacher_has_noise_of_its_own(kind):
    image = torch.rand(4, 1, 12, 12)
    method = kind([Watched()], passes=3, clip=0.15).train()
    for number in range(8):
        step = step_of(image, number=number, labelled=2 if kind is UAMT else 4)
        method.teacher.network.seen.clear()
        method.terms(step)
        turned = image[2:]
        if kind is USTM:
            turned = image.rot90(int(4 * step.uniform(1)[0]), (-2, -1))
        noises = [seen - turned for seen in method.teacher.network.seen]
        assert len(noises) == 4
        for place, noise in enumerate(noises):
            assert 0.1 < noise.abs().max() < 0.1501 and abs(noise.mean()) < 0.03
            assert not any(torch.equal(noise, other) for other in noises[:place])


def test_a_teacher_takes_parameters_but_keeps_statistics_of_its_own_passes():
    image = torch.rand(4, 1, 12, 12)
    method = MeanTeacher([Watched(norm=True)]).train()
    method.terms(step_of(image))
    teacher = method.teacher.network
    own = 0.1 * teacher.seen[0].mean()  # the momentum of a batch norm is 0.1
    with torch.no_grad():
        method.network.head.weight.fill_(7.0)
        method.network.norm.running_mean.fill_(7.0)
    method.after(0)
    assert torch.equal(teacher.head.weight, method.network.head.weight)
    torch.testing.assert_close(teacher.norm.running_mean, own.view(1))


def certain(passes, threshold):
    probability = passes.softmax(2).mean(0)
    return -(probability * (probability + 1e-6).log()).sum(1) < threshold


def test_the_defaults_of_uamt_count_all_classes():
    """Yu et al. 2019, equations 2-4, written out for 4 classes in float64."""
    student, teacher = torch.randn(6, 4, 9, 8).double(), torch.randn(4, 4, 9, 8).double()
    passes = 2 * torch.randn(3, 4, 4, 9, 8).double()
    method = UAMT([Says(student)], passes=3)
    method.teacher.network = Says(teacher, *passes)
    found = method.terms(step_of(torch.rand(6, 1, 9, 8), number=333))["consistency"]
    threshold = (0.75 + 0.25 * math.exp(-5 * (1 - 0.333) ** 2)) * math.log(4)
    mask = certain(passes, threshold)
    assert 0.2 < mask.double().mean() < 0.95 and mask.sum() > certain(passes, math.log(2)).sum()
    squares = (student[2:].softmax(1) - teacher.softmax(1)).square() * mask[:, None]
    expected = 0.1 * risen(333, 1000, 200) * squares.sum() / (4 * mask.sum())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_the_defaults_of_ustm_count_all_classes_and_rise_in_60_stairs():
    student, teacher = torch.randn(4, 4, 9, 9).double(), torch.randn(4, 4, 9, 9).double()
    passes = 2 * torch.randn(2, 4, 4, 9, 9).double()
    method = USTM([Says(student)], passes=2)
    method.teacher.network = Says(teacher, *passes)
    step = step_of(torch.rand(4, 1, 9, 9), labelled=4, number=333)
    found = method.terms(step)["consistency"]
    mask = certain(passes, (0.75 + 0.25 * math.exp(-5 * (1 - 0.333) ** 2)) * math.log(4))
    turned = student.rot90(int(4 * step.uniform(1)[0]), (-2, -1))
    squares = (turned.softmax(1) - teacher.softmax(1)).square() * mask[:, None]
    expected = risen(333, 1000, 60) * squares.sum() / (4 * mask.sum())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


# ---- views


def test_the_view_of_deep_co_training_is_the_turned_batch():
    image, quarters = torch.rand(4, 1, 9, 6), set()
    for number in range(12):
        step = step_of(image, number=number)
        method = DeepCoTraining([Watched()])
        found = method.terms(step)["consistency"]
        turns = int(4 * step.uniform(1)[0])
        assert torch.equal(method.network.seen[1], image[2:].rot90(turns, (-2, -1)))
        assert found < 1e-12  # a network that sees single pixels says the same of either
        quarters.add(turns)
    assert quarters == {0, 1, 2, 3}


def test_what_is_dropped_in_a_mix_follows_the_place_of_its_first_image():
    asked = []
    step = step_of(torch.rand(6, 1, 7, 5))

    def run(function, image, places, turn):
        asked.append((list(places), turn))
        return function(image)

    ICT([Watched()]).terms(dataclasses.replace(step, run=run))
    assert asked == [([2, 4], 1), ([3, 5], 1), ([0, 1, 2, 4], 0)]


@pytest.mark.parametrize(("number", "counts"), [(499, False), (500, True)])
def test_ustm_waits_for_its_start(number, counts):
    method = USTM([Watched()], passes=2, start=0.5)
    with torch.no_grad():
        method.teacher.network.head.weight.mul_(-2)
    found = method.terms(step_of(torch.rand(6, 1, 7, 5), number=number))["consistency"]
    assert bool(found > 0) == counts


def test_an_image_too_small_for_the_discriminator_is_refused():
    method = DeepAdversarial([Watched()], in_channels=1, num_classes=4, width=2)
    method.terms(step_of(torch.rand(4, 1, 16, 16)))
    with pytest.raises(UserError, match=r"from 16 × 16 pixels on, these have 8 × 16 \(data\.size"):
        method.terms(step_of(torch.rand(4, 1, 8, 16)))


def test_gated_crf_says_where_its_default_is_for_another_unit(caplog):
    for intensity, warned in (("percentile", 0), ("zscore", 1)):
        data = SimpleNamespace(preprocessing=SimpleNamespace(intensity=intensity))
        GatedCRF([Watched()]).begin(data)
        assert caplog.text.count("method.intensity=0.1 counts in standard deviations") == warned


def test_mixed_images_and_mixed_targets_have_the_same_shares(monkeypatch):
    image, share = torch.rand(6, 1, 7, 5), torch.tensor([0.25, 0.9]).view(-1, 1, 1, 1)
    method = ICT([Watched()])
    with torch.no_grad():
        method.teacher.network.head.weight.mul_(-2)
    monkeypatch.setattr(method, "shares", lambda step, pairs: share.flatten().double())
    found = method.terms(step_of(image, number=0))["consistency"]  # it counts from the first step
    one, other = image[[2, 4]], image[[3, 5]]
    mixed = (1 - share) * one + share * other
    torch.testing.assert_close(method.network.seen[0], torch.cat([image[:2], mixed]))
    said = [method.teacher.network(half).softmax(1) for half in (one, other)]
    target = (1 - share) * said[0] + share * said[1]
    difference = (method.network(mixed).softmax(1) - target).square().mean()
    torch.testing.assert_close(found, 0.1 * risen(0, 1000, 200) * difference)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_follow_a_beta_distribution(alpha):
    method, image = ICT([Watched()], alpha=alpha), torch.rand(6, 1, 2, 2)
    found, numbers = [], []
    for number in range(200):
        step = step_of(image, number=number)
        found += method.shares(step, (2, 4)).tolist()
        numbers += [step.uniform_of(place, 1)[0] for place in (2, 4)]
    np.testing.assert_allclose(beta.cdf(found, alpha, alpha), numbers, atol=1e-3)
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)
    assert np.var(found) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


# ---- FixMatch


def jittered(image, brightness, contrast):
    """torchvision's brightness and then contrast of an image in [0, 1], in its formulas."""
    bright = (brightness * image).clamp(0, 1)
    return (contrast * bright + (1 - contrast) * bright.mean()).clamp(0, 1)


def test_brightness_is_cut_before_contrast_takes_its_mean():
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    drawn = SimpleNamespace(image=image, uniform_of=lambda place, count: [1.0, 0.0])
    found = FixMatch([Watched()], jitter=0.8).strong(drawn)  # factors 1.8 and 0.2
    torch.testing.assert_close(found.flatten(), torch.tensor([0.50667, 0.68667, 0.70667]),
                               rtol=0, atol=1e-5)  # fmt: skip
    drawn.uniform_of = lambda place, count: [0.5, 1.0]  # contrast alone, 1.8
    assert torch.equal(FixMatch([Watched()]).strong(drawn), image)  # cut again


def test_the_strong_view_is_the_jittered_batch_and_unlike_the_weak_one():
    image = torch.rand(4, 1, 9, 8)
    image[:, 0, 0, :2] = torch.tensor([0.0, 1.0])
    step, method = step_of(image), FixMatch([Watched()])
    method.terms(step)
    weak, strong = method.network.seen
    assert torch.equal(weak, image)
    for place in range(4):
        brightness, contrast = (1 + 0.8 * (2 * n - 1) for n in step.uniform_of(place, 2))
        torch.testing.assert_close(strong[place], jittered(image[place], brightness, contrast))
        assert (strong[place] - weak[place]).abs().max() > 0.01


def test_the_defaults_of_fixmatch_learn_where_the_weak_view_is_sure():
    """Equation 4 and the Dice of the sure pixels, written out in float64."""
    weak, strong = 2 * torch.randn(4, 4, 9, 8).double(), torch.randn(4, 4, 9, 8).double()
    for place, most in enumerate((0.78, 0.82)):  # on either side of the threshold
        weak[2:, :, place] = torch.tensor([most, *[(1 - most) / 3] * 3]).log().view(1, 4, 1)
    found = FixMatch([Says(weak, strong)]).terms(step_of(torch.rand(4, 1, 9, 8)))["pseudo"]
    highest, label = weak[2:].softmax(1).max(1)
    sure = highest > 0.8
    assert not sure[:, 0].any() and sure[:, 1].all()
    probability = strong[2:].softmax(1)
    costs = -probability.gather(1, label[:, None])[:, 0].log() * sure
    dices = []
    for k in range(4):
        true, p = (label == k) & sure, probability[:, k] * sure
        dices.append((2 * (p * true).sum() + 1e-5) / (p.square().sum() + true.sum() + 1e-5))
    expected = 0.1 * risen(700, 1000, 200) * (costs.mean() + 1 - sum(dices) / 4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


# ---- the discriminator


def decided(weights, probability, image):
    """The discriminator of SSL4MIS without its dropout, layer by layer."""

    def convolved(x, name):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, 1)

    x = convolved(probability, "of_map") + convolved(image, "of_image")
    for name in ("layers.0", "layers.3", "layers.6"):
        x = F.leaky_relu(convolved(x, name), 0.2)
    side = x.shape[-1] // 2
    x = F.avg_pool2d(x, side).reshape(len(x), -1)  # 7 × 7 of an image of 224
    return F.linear(x, weights["decide.weight"], weights["decide.bias"])


def test_the_discriminator_drops_after_its_first_two_layers_only():
    discriminator = Discriminator(1, 4, width=2)
    kinds = [type(layer).__name__ for layer in discriminator.layers]
    assert kinds == ["Conv2d", "LeakyReLU", "DropMaps"] * 2 + ["Conv2d", "LeakyReLU"]
    assert [layer.rate for layer in discriminator.layers if hasattr(layer, "rate")] == [0.5] * 2
    probability, image = torch.rand(2, 4, 224, 224).softmax(1), torch.rand(2, 1, 224, 224)
    torch.testing.assert_close(
        discriminator.eval()(probability, image),
        decided(discriminator.state_dict(), probability, image),
    )


def adversarial():
    image = torch.rand(4, 1, 32, 32)
    method = DeepAdversarial([Watched()], in_channels=1, num_classes=4, width=2, lr=0.01)
    method.discriminator.eval()  # without dropout
    step = step_of(image, labelled=1)
    return method, step, method.terms(step), method.network(image).softmax(1)


def test_a_network_learns_to_pass_its_unlabelled_outputs_as_labelled():
    method, step, found, probability = adversarial()
    weights = dict(method.discriminator.named_parameters())
    decision = decided(weights, probability[1:], step.image[1:])
    expected = 0.1 * risen(700, 1000, 200) * -decision.log_softmax(1)[:, 1].mean()
    torch.testing.assert_close(found["adversarial"], expected)
    own, theirs = (
        torch.autograd.grad(value, method.network.head.weight)[0]
        for value in (found["adversarial"], expected)
    )
    assert own.abs().max() > 0
    torch.testing.assert_close(own, theirs)


def test_the_discriminator_takes_a_step_of_adam_towards_the_truth():
    method, step, _, probability = adversarial()
    own = copy.deepcopy(method.discriminator).requires_grad_()
    decision = decided(dict(own.named_parameters()), probability.detach(), step.image)
    truth = torch.tensor([1, 0, 0, 0])  # one image of the four has a label
    F.cross_entropy(decision, truth).backward()
    torch.optim.Adam(own.parameters(), 0.01, betas=(0.9, 0.99)).step()
    before = copy.deepcopy(method.discriminator.state_dict())
    method.after(0)
    for name, parameter in method.discriminator.named_parameters():
        torch.testing.assert_close(parameter, own.get_parameter(name), rtol=1e-4, atol=1e-5)
        assert not torch.equal(parameter, before[name])
    assert not any(p.requires_grad or p.grad is not None for p in method.discriminator.parameters())


# ---- random numbers


def test_numbers_of_a_step_depend_on_seed_step_sample_and_pass():
    image = torch.zeros(3, 1, 5, 4)
    one = step_of(image)
    for other in (step_of(image, number=701), step_of(image, seed=2)):
        assert one.uniform(2) != other.uniform(2)
        assert one.uniform_of(1, 2) != other.uniform_of(1, 2)
        assert not torch.equal(one.normal(image), other.normal(image))
    again = step_of(image)
    assert one.uniform(2) == again.uniform(2) and one.uniform_of(1, 2) == again.uniform_of(1, 2)
    assert len({tuple(one.uniform_of(place, 2)) for place in range(3)}) == 3
    noise = one.normal(image, turn=1)
    assert torch.equal(noise, again.normal(image, turn=1))
    assert torch.equal(noise[1:], one.normal(image[1:], first=1, turn=1))
    assert not torch.equal(noise, one.normal(image, turn=2))
    assert not torch.equal(noise[0], noise[1])


# ---- large logits


def test_scales_that_know_of_no_class_have_a_finite_divergence():
    """Where a class is too improbable for float32 at all scales; elsewhere the plain formula."""
    logits = [torch.tensor([200.0, -200.0, k]).view(1, 3, 1, 1) for k in range(3)]
    leaves = [one.requires_grad_() for one in logits]
    value = pyramid_consistency(leaves)
    exact = pyramid_consistency([one.detach().double() for one in logits])
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(value, leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)

    logs = [torch.randn(2, 4, 5, 5).double().log_softmax(1) for _ in range(4)]
    mean = sum(log.exp() for log in logs) / 4
    terms = []
    for log in logs:
        divergence = (mean * (mean.log() - log)).sum(1, keepdim=True)
        weight = (-divergence).exp()
        squares = ((mean - log.exp()).square() * weight).sum() / 4
        terms.append(squares / (weight.sum() + 1e-8 * 50) + divergence.mean())
    torch.testing.assert_close(pyramid_consistency(logs), sum(terms) / 4, rtol=1e-9, atol=0)


@pytest.mark.parametrize("released", [False, True])
def test_a_class_of_no_pixel_has_no_region(released):
    logits = torch.randn(2, 4, 5, 5)
    logits[0, 3] = -300.0
    logits.requires_grad_()
    method, image = MumfordShah([Says(logits)], released=released), torch.randn(2, 1, 5, 5)
    image[1] = 0  # a blank image, whose intensities are the weights in the released code
    value = method.terms(step_of(image))["functional"]
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all()


def both_of(kind, outputs):
    method = kind([UNet(widths=(2, 2, 2, 2, 2))])
    name = "scales" if kind is URPC else "both"
    setattr(method, name, lambda image: outputs)
    return method


def taught(method, *outputs):
    method.teacher.network = Says(*outputs)
    return method


EXTREME = {
    "mean_teacher": lambda x: taught(MeanTeacher([Says(x(4))]), x(2)),
    "uamt": lambda x: taught(UAMT([Says(x(4))], passes=2), x(2), x(2), x(2)),
    "ustm": lambda x: taught(USTM([Says(x(4))], passes=2), x(4), x(4), x(4)),
    "ict": lambda x: taught(ICT([Says(x(3))]), x(1), x(1)),
    "entropy": lambda x: Entropy([Says(x(4))]),
    "cps": lambda x: Peers([Says(x(4)), Says(x(4))]),
    "cross_teaching": lambda x: Peers([Says(x(4)), Says(x(4))], pseudo="dice"),
    "semi_mamba_unet": lambda x: SemiMambaUNet([Says(x(4)), Says(x(4))]),
    "deep_co_training": lambda x: DeepCoTraining([Says(x(4), x(2))]),
    "fixmatch": lambda x: FixMatch([Says(x(4), x(4))]),
    "fixmatch released": lambda x: FixMatch([Says(x(4), x(4))], released=True),
    "gated_crf": lambda x: GatedCRF([Says(x(4))], radius=2),
    "mumford_shah": lambda x: MumfordShah([Says(x(4))]),
    "mumford_shah released": lambda x: MumfordShah([Says(x(4))], released=True),
    "weak_mamba_unet": lambda x: WeakMambaUNet([Says(x(4)), Says(x(4)), Says(x(4))]),
    "urpc": lambda x: both_of(URPC, [x(4) for _ in range(4)]),
    "dmpls": lambda x: both_of(DMPLS, [x(4), x(4)]),
}  # fmt: skip


@pytest.mark.parametrize("scale", [100.0, 1e6, 1e30])
@pytest.mark.parametrize("method", EXTREME)
def test_terms_and_gradients_of_large_logits_are_finite(method, scale):
    leaves = []

    def drawn(samples):
        leaves.append((scale * torch.randn(samples, 4, 8, 8)).requires_grad_())
        return leaves[-1]

    terms = EXTREME[method](drawn).terms(step_of(torch.rand(4, 1, 8, 8)))
    assert all(term.isfinite() for term in terms.values()), terms
    gradients = torch.autograd.grad(sum(terms.values()), leaves, allow_unused=True)
    assert all(one.isfinite().all() for one in gradients if one is not None)


# ---- what a task does around a method


def task_of(method):
    return SegmentationTask(
        method.network, LOSS, torch.optim.SGD, None, preprocessing=Preprocessing("paper", 4),
        class_names=("background", "a", "b", "c"), method=method,
    )  # fmt: skip


def test_the_gradients_of_two_networks_are_clipped_apart():
    large, small = nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(1, 4, 1, bias=False)
    large.weight.grad, small.weight.grad = (torch.full((4, 1, 1, 1), one) for one in (5.0, 0.5))
    task_of(Peers([large, small])).configure_gradient_clipping(None, 2.0, "norm")
    torch.testing.assert_close(large.weight.grad, torch.full((4, 1, 1, 1), 1.0))  # norm 10 to 2
    assert torch.equal(small.weight.grad, torch.full((4, 1, 1, 1), 0.5))  # its norm is 1


def test_what_is_logged_of_a_step_is_the_mean_of_its_micro_batches(monkeypatch):
    task, logged, seen = task_of(Entropy([Watched()])), {}, []
    monkeypatch.setattr(task, "log", lambda name, value, **_: logged.update({name: float(value)}))
    for step, count in ((0, 3), (1, 2)):
        for place in range(count):
            batch = {
                "image": torch.rand(2, 1, 8, 8), "label": torch.randint(4, (2, 8, 8)), "step": step,
                "position": torch.arange(2) + 2 * place, "labelled": 1, "case": ["a", "b"],
            }  # fmt: skip
            loss = task.training_step(batch, place).detach()
            terms = {"loss": loss, **task._terms}
            seen.append({f"train/{name}": float(value) for name, value in terms.items()})
        for name in ("train/loss", "train/supervised", "train/entropy"):
            mean = sum(one[name] for one in seen[-count:]) / count
            assert logged[name] == pytest.approx(mean, rel=1e-6), (step, name)
    assert len(logged) == 3


def test_each_pass_of_a_step_drops_something_else():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), Dropout(0.5))
    task = task_of(MeanTeacher([network])).train()
    batch = {"image": torch.rand(2, 1, 8, 8), "label": torch.randint(4, (2, 8, 8)), "step": 3,
             "position": torch.arange(2), "labelled": 1}  # fmt: skip
    step = task._offered(batch)
    first, again, second = (step.logits(network, turn=turn) for turn in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first == 0, second == 0)


def test_each_of_three_networks_learns_from_the_next():
    outputs = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    method = Peers([Says(one) for one in outputs], weight=1.0)
    step = step_of(torch.rand(4, 1, 8, 8), number=1000)
    terms = method.terms_of(step, outputs)
    for number in range(3):
        taught = method.pseudo_loss(outputs[number][2:], outputs[(number + 1) % 3][2:].argmax(1))
        assert terms[f"pseudo_{number + 1}"] == taught
