"""Each method's loss and its gradient equal the original code's own, in float64."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mambaseg.data.classes import IGNORED
from mambaseg.errors import UserError
from mambaseg.models import AnySize, UNet
from mambaseg.training.losses import DiceCE
from mambaseg.training.methods import deep_adversarial, dmpls, fixmatch, terms, uamt
from mambaseg.training.methods.deep_adversarial import DeepAdversarial
from mambaseg.training.methods.deep_co_training import DeepCoTraining, mutual_difference
from mambaseg.training.methods.dmpls import DMPLS
from mambaseg.training.methods.entropy import Entropy
from mambaseg.training.methods.fixmatch import FixMatch, complementary, released_label
from mambaseg.training.methods.gated_crf import GatedCRF
from mambaseg.training.methods.ict import ICT
from mambaseg.training.methods.mean_teacher import MeanTeacher
from mambaseg.training.methods.method import Step, at_any_size
from mambaseg.training.methods.mumford_shah import MumfordShah, length
from mambaseg.training.methods.peers import Peers
from mambaseg.training.methods.scribble2label import Scribble2Label, running_mean, sure_label
from mambaseg.training.methods.semi_mamba_unet import SemiMambaUNet, contrast
from mambaseg.training.methods.supervised import Supervised
from mambaseg.training.methods.uamt import UAMT
from mambaseg.training.methods.urpc import URPC, pyramid_consistency
from mambaseg.training.methods.ustm import USTM
from mambaseg.training.methods.weak_mamba_unet import WeakMambaUNet, shares

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
HALF, SUM, PARTIAL = DiceCE(), DiceCE(ce_weight=1, dice_weight=1), DiceCE(
    ce_weight=1, dice_weight=0, partial=True
)  # fmt: skip
L = 2  # labelled samples of the golden batch


def golden(name):
    array = torch.from_numpy(GOLDEN[name])
    return array if array.is_floating_point() else array.long()


@pytest.fixture
def a():
    return golden("logits_a").requires_grad_()


class Says(nn.Module):
    """A network whose outputs, call by call, are known."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, image):
        return self.outputs.pop(0) if len(self.outputs) > 1 else self.outputs[0]

    def __deepcopy__(self, memo):
        return Says()


@dataclass(frozen=True)
class Fixed(Step):
    """A step whose random numbers are known."""

    numbers: tuple = ()

    def uniform(self, count):
        assert len(self.numbers) == count
        return list(self.numbers)


def step(number=7500, *, image=None, label=None, labelled=L, loss=HALF, steps=30_000, numbers=()):
    image = golden("image") if image is None else image
    return Fixed(
        image=image,
        label=golden("label") if label is None else label,
        labelled=labelled,
        number=number,
        steps=steps,
        positions=range(len(image)),
        seed=1,
        run=lambda function, image, places, turn: function(image),
        supervised_loss=loss,
        numbers=tuple(numbers),
    )


def scribbles(number=7500, **options):
    label = golden("scribble")
    label = label.where(label != 4, IGNORED)
    return step(number, label=label, labelled=len(label), loss=PARTIAL, **options)


def same(value, name, tolerance=1e-9):
    expected = torch.as_tensor(np.asarray(golden(name)), dtype=torch.float64)
    torch.testing.assert_close(value.detach().double(), expected, rtol=tolerance, atol=1e-12)


def same_gradient(value, a, name):
    (gradient,) = torch.autograd.grad(value, a, retain_graph=True)
    expected = golden(f"{name}.grad")
    assert (gradient - expected).abs().max() <= 1e-9 * expected.abs().max()


def total(method, its_step):
    return sum(method.terms(its_step).values())


def taught(method, *outputs):
    method.teacher.network = Says(*outputs)
    return method


def test_the_supervised_loss(a):
    for loss, name in ((DiceCE(ce_weight=1, dice_weight=0), "sup.ce"), (HALF, "sup.half"),
                       (DiceCE(ce_weight=0, dice_weight=1), "sup.dice")):  # fmt: skip
        value = Supervised([Says(a)]).terms(step(loss=loss))["supervised"]
        same(value, name)
        same_gradient(value, a, name)


def test_partial_cross_entropy(a):
    value = total(Supervised([Says(a)]), scribbles())
    same(value, "wsl.pce")
    same_gradient(value, a, "wsl.pce")


def test_nothing_is_learnt_of_a_batch_without_a_scribble(a):
    nothing = torch.full((4, 10, 7), IGNORED)
    for loss in (PARTIAL, DiceCE(partial=True)):
        value = total(Supervised([Says(a)]), step(label=nothing, labelled=4, loss=loss))
        (gradient,) = torch.autograd.grad(value, a)
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("number", [999, 1000, 7500])
def test_mean_teacher(a, number):
    method = taught(MeanTeacher([Says(a)]), golden("teacher")[L:])
    same(total(method, step(number)), f"mt.total_{number}")


def test_the_difference_to_the_teacher(a):
    value = terms.squared_difference(a[L:].softmax(1), golden("teacher")[L:].softmax(1))
    same(value, "mt.consistency")
    same_gradient(value, a, "mt.consistency")


@pytest.mark.parametrize("number", [0, 15000, 30000])
def test_uncertainty_aware_mean_teacher(a, number):
    passes = golden("teacher_noisy")[:, L:]
    method = taught(UAMT([Says(a)], released=True), golden("teacher")[L:], *passes)
    same(total(method, step(number)), f"uamt.total_{number}")
    threshold = method.threshold(number / 30000, 4)
    same(torch.tensor(threshold, dtype=torch.float64), f"uamt.threshold_{number}")
    uncertainty = terms.entropy(passes.softmax(2).mean(0))
    mask = uncertainty < threshold
    assert mask.sum() == golden(f"uamt.mask_count_{number}")
    same(uncertainty.view(golden("uamt.uncertainty").shape), "uamt.uncertainty")
    student, teacher = a[L:].softmax(1), golden("teacher")[L:].softmax(1)
    value = uamt.masked_difference(student, teacher, mask, 2)
    same(value, f"uamt.consistency_{number}")
    same_gradient(value, a, f"uamt.consistency_{number}")


def test_interpolation_consistency(a, monkeypatch):
    images = torch.cat([golden("image")] * 2)
    labels = torch.cat([golden("label")] * 2)
    student = Says(torch.cat([golden("logits_d"), a[:2]]))
    halves = golden("teacher")[[0, 1]], golden("teacher")[[2, 3]]  # of pairs of neighbours
    method = taught(ICT([student]), *halves)
    monkeypatch.setattr(method, "shares", lambda step, pairs: golden("lam"))
    found = method.terms(step(image=images, label=labels, labelled=4))
    same(sum(found.values()), "ict.total_7500")
    weight = 0.1 * terms.ramp(7500, 30000, stairs=200)
    same(found["consistency"] / weight, "ict.consistency")
    same_gradient(found["consistency"] / weight, a, "ict.consistency")


def test_a_teacher_sees_one_image_of_each_mixed_pair_at_a_time():
    """As in SSL4MIS: its batch norms take the statistics of half of the unlabelled images."""
    seen = []

    class Teacher(nn.Module):
        def forward(self, image):
            seen[-1] += (image, self.training)
            return image.expand(-1, 4, -1, -1)

    def run(function, image, places, turn):
        seen.append([list(places), turn])
        return function(image)

    images = torch.rand(8, 1, 10, 7)
    method = ICT([Says(torch.rand(6, 4, 10, 7))])
    method.teacher.network = Teacher()
    label = golden("label")[[0, 1, 2, 3, 0, 1, 2, 3]]
    method.terms(replace(step(image=images, label=label, labelled=4), run=run))
    _, one, other = sorted(seen, key=lambda call: call[1])
    for (places, turn, image, training), start in ((one, 4), (other, 5)):
        assert places == [start, start + 2] and turn == 1 and training
        assert torch.equal(image, images[start::2])


def test_entropy_minimisation(a):
    found = Entropy([Says(a)]).terms(step())
    same(sum(found.values()), "entropy.total_7500")
    value = found["entropy"] / (0.1 * terms.ramp(7500, 30000, stairs=200))
    same(value, "entropy.consistency")
    same_gradient(value, a, "entropy.consistency")


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_deep_co_training(a, quarters):
    other = golden("logits_b")[L:]
    if quarters % 2:
        other = other.reshape(2, 4, 7, 10)
    value = mutual_difference(other.softmax(1), a[L:].softmax(1).rot90(quarters, (-2, -1)))
    same(value, f"dct.consistency_k{quarters}")
    if quarters in (1, 2):
        same_gradient(value, a, f"dct.consistency_k{quarters}")
    if quarters == 1:
        method = DeepCoTraining([Says(a, other)])
        same(total(method, step(numbers=[0.3])), "dct.total_7500")


@pytest.mark.parametrize(("pseudo", "name"), [("ce", "cps"), ("dice", "ctct")])
def test_networks_teach_each_other(a, pseudo, name):
    found = Peers([Says(a), Says(golden("logits_b"))], pseudo=pseudo).terms(step())
    same(sum(found.values()), f"{name}.total_7500")
    weight = 0.1 * terms.ramp(7500, 30000, stairs=200)
    for number in (1, 2):
        same(found[f"pseudo_{number}"] / weight, f"{name}.pseudo{number}")
    same_gradient(found["pseudo_1"] / weight, a, f"{name}.pseudo1")


@pytest.mark.parametrize("number", [0, 7500, 30000])
def test_semi_mamba_unet(a, number):
    b = golden("logits_b")
    value = total(SemiMambaUNet([Says(a), Says(b)]), step(number))
    same(value, f"semi_mamba.total_{number}")
    if number == 7500:
        same_gradient(value, a, "semi_mamba.total_7500")
        same(contrast(a, b), "semi_mamba.contrast")
        same_gradient(contrast(a, b), a, "semi_mamba.contrast")


def test_a_pyramid_of_scales(a):
    outputs = [a[L:], *(golden(f"logits_{k}")[L:] for k in "bcd")]
    value = pyramid_consistency(outputs)
    same(value, "urpc.consistency")
    same_gradient(value, a, "urpc.consistency")


def test_fixmatch_as_released(a):
    b = golden("logits_b")
    assert torch.equal(released_label(b[L:], 0.8), golden("fixmatch.pseudo_label"))
    share, complement = complementary(a, b)
    same(share, "fixmatch.as_weight")
    same(complement, "fixmatch.comp")
    same_gradient(complement, a, "fixmatch.comp")
    method = FixMatch([Says(b, a)], released=True)
    value = method.pseudo(a, b, L)
    same(value, "fixmatch.unsup")
    same_gradient(value, a, "fixmatch.unsup")
    same(total(method, step(loss=SUM)), "fixmatch.total_7500")


def test_unsure_pixels_cost_nothing_in_a_mean_over_all():
    """FixMatch, equation 4: one sure pixel of a hundred has a hundredth of its cross entropy."""
    weak, strong = torch.zeros(1, 2, 10, 10), torch.zeros(1, 2, 10, 10)
    weak[0, 1, 0, 0] = 5.0
    method = FixMatch([Says()])
    found = method.pseudo(strong, weak, 0) - terms.dice(strong, fixmatch.sure_label(weak, 0.8))
    assert float(found) == pytest.approx(np.log(2) / 100, rel=1e-5)
    nothing = method.pseudo(strong, torch.zeros_like(weak), 0)
    assert nothing == 0


def test_a_discriminator(a, monkeypatch):
    method = DeepAdversarial([Says(torch.cat([a, a]))], in_channels=1, num_classes=4)
    monkeypatch.setattr(method.discriminator, "forward", lambda *_: golden("disc_unlabelled"))
    images, labels = torch.cat([golden("image")] * 2), torch.cat([golden("label")] * 2)
    same(total(method, step(image=images, label=labels, labelled=4)), "dan.total_7500")
    decision = golden("disc_unlabelled").requires_grad_()
    value = deep_adversarial.told_apart(decision, len(decision))
    same(value, "dan.adversarial")
    same_gradient(value, decision, "dan.adversarial")
    decision = golden("disc_all").requires_grad_()
    value = deep_adversarial.told_apart(decision, 4)
    same(value, "dan.discriminator")
    same_gradient(value, decision, "dan.discriminator")


@pytest.mark.parametrize("number", [0, 30000, 60000])
def test_a_turned_teacher(a, number):
    passes = golden("teacher_noisy")
    method = taught(USTM([Says(a)], released=True), golden("teacher"), *passes)
    found = method.terms(scribbles(number, steps=60_000, numbers=[0.6]))
    same(sum(found.values()), f"ustm.total_k2_{number}")
    if number == 30000:
        value = found["consistency"] / terms.ramp(number, 60_000, stairs=60)
        same(value, "ustm.consistency_k2_30000")
        same_gradient(value, a, "ustm.consistency_k2_30000")


def test_neighbours_as_released(a):
    method = GatedCRF([Says(a)], released=True)
    value = method.pairwise(a.softmax(1), golden("image"))
    same(value, "wsl.crf")
    same_gradient(value, a, "wsl.crf")
    same(total(method, scribbles()), "wsl.crf_total")


def test_neighbours_end_at_the_border():
    probability, image = torch.rand(2, 3, 6, 7).softmax(1), torch.rand(2, 2, 6, 7)
    expected = 0.0
    for y, x, v, u in np.ndindex(6, 7, 6, 7):
        if (y, x) == (v, u) or max(abs(y - v), abs(x - u)) > 2:
            continue
        apart = ((y - v) ** 2 + (x - u) ** 2) / 36
        unlike = ((image[:, :, y, x] - image[:, :, v, u]) / 0.1).square().sum(1)
        kernel = (-0.5 * (apart + unlike)).exp()
        agreement = (probability[:, :, y, x] * probability[:, :, v, u]).sum(1)
        expected += (kernel * (1 - agreement)).sum()
    method = GatedCRF([Says(probability)], radius=2)
    torch.testing.assert_close(method.pairwise(probability, image), expected / (2 * 6 * 7))


def test_mumford_shah(a):
    probability, image = a.softmax(1), golden("image")
    released = MumfordShah([Says(a)], released=True)
    same(released.region(probability, image), "wsl.ms_region")
    same(length(probability), "wsl.ms_length")
    value = released.region(probability, image) + length(probability)
    same_gradient(value, a, "wsl.ms")
    same(total(released, scribbles()), "wsl.ms_total")
    same(MumfordShah([Says(a)]).region(probability, image), "wsl.ms_region_unswapped")


def test_two_decoders(a, monkeypatch):
    beta = float(golden("beta"))
    method = DMPLS([UNet(widths=(2, 2, 2, 2, 2))])
    monkeypatch.setattr(method, "both", lambda image: [a, golden("logits_b")])
    found = method.terms(scribbles(numbers=[beta]))
    same(found["supervised"], "dmpls.pce")
    same(found["pseudo"] / 0.5, "dmpls.pseudo", tolerance=1e-6)  # smooth / B there
    same(sum(found.values()), "dmpls.total", tolerance=1e-6)
    label = dmpls.mixed_label([a, golden("logits_b")], (beta, 1 - beta))
    assert torch.equal(label, golden("dmpls.pseudo_label"))


def test_sure_predictions_and_scribbles(a):
    label = golden("scribble")
    label = label.where(label != 4, IGNORED)
    means = golden("s2l_mean").movedim(-1, 1)
    target = torch.stack([sure_label(m, one, 0.8) for m, one in zip(means, label, strict=True)])
    expected = golden("s2l.target")
    assert torch.equal(target, expected.where(expected != 4, IGNORED))
    value = terms.cross_entropy(a, target)
    same(value, "s2l.loss_u")
    same_gradient(value, a, "s2l.loss_u")
    method = Scribble2Label([Says(a)])
    shown = torch.where(target != IGNORED, target + 128, label)
    for number in (5999, 6000):
        found = method.terms(step(number, label=shown, labelled=4, loss=PARTIAL, steps=60_000))
        same(sum(found.values()), f"s2l.total_{number}")
    probability = golden("logits_b").softmax(1)[0].movedim(0, -1)
    same(running_mean(golden("s2l_mean")[0], probability, 0.2), "s2l.mean_new")
    nothing = step(6000, label=label, labelled=4, loss=PARTIAL, steps=60_000)
    assert method.terms(nothing)["pseudo"] == 0  # not a number in the published code


def test_what_is_sure_is_shown_where_there_is_no_scribble():
    method = Scribble2Label([Says()])
    method.means = {"a": torch.zeros(2, 4, 3, 2, dtype=torch.uint8)}
    method.means["a"][1, 2, 0] = 250
    label = torch.full((2, 5, 5), IGNORED, dtype=torch.uint8)
    label[:, 0, 0] = 1
    shown = method.relabelled(label, ["a", "b"], [1, 1])
    assert shown[0, 0].tolist() == [1, 130, IGNORED, IGNORED, IGNORED]
    assert torch.equal(shown[0, 1:], label[0, 1:]) and torch.equal(shown[1], label[1])


def test_weak_mamba_unet(a):
    outputs = [a, golden("logits_b"), golden("logits_c")]
    points = golden("points").tolist()
    torch.testing.assert_close(torch.tensor(shares(points)).double(), golden("weak_mamba.abc"))
    method = WeakMambaUNet([Says(output) for output in outputs])
    found = method.terms(scribbles(numbers=points))
    same(sum(found.values()), "weak_mamba.total")
    same_gradient(sum(found.values()), a, "weak_mamba.total")
    same(found["pseudo_1"], "weak_mamba.dice_a")


def test_ramps():
    for number, step in enumerate(golden("ramp.iterations").tolist()):
        for name, value in (
            ("ssl4mis", 0.1 * terms.ramp(step, 30_000, stairs=200)),
            ("ustm", terms.ramp(step, 60_000, stairs=60)),
        ):
            assert value == pytest.approx(float(golden(f"ramp.{name}")[number]), rel=1e-12), step


def test_a_teacher_follows():
    student, method = nn.Linear(5, 1, bias=False).double(), None
    for index, number in enumerate(golden("ema.steps").tolist()):
        student.weight.data = golden("ema_student").view(1, 5)
        method = terms.Teacher(student)
        method.network.weight.data = golden("ema_teacher").view(1, 5).clone()
        method.follow(student, number)
        torch.testing.assert_close(
            method.network.weight.view(5), golden("ema.updated")[index], rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("kind", [URPC, DMPLS])
def test_a_method_refuses_a_network_that_lacks_what_it_needs(kind):
    with pytest.raises(UserError, match=r"needs the decoder of a UNet \(model=unet\)"):
        kind([nn.Conv2d(1, 4, 1)])


@pytest.mark.parametrize(("kind", "count"), [(Supervised, 2), (SemiMambaUNet, 3), (Peers, 1)])
def test_a_method_says_how_many_networks_it_trains(kind, count):
    with pytest.raises(UserError, match=rf"trains .* not {count}: .*method.partner="):
        kind([nn.Conv2d(1, 4, 1) for _ in range(count)])


def test_a_unet_with_more_heads_and_a_second_decoder():
    torch.manual_seed(0)
    network = UNet(widths=(4, 4, 8, 8, 8)).eval()
    image = torch.rand(2, 1, 32, 32)
    scales = URPC([network]).scales(image)
    both = DMPLS([network]).eval().both(image)
    assert [tuple(x.shape) for x in scales] == [(2, 4, 32, 32)] * 4
    assert [tuple(x.shape) for x in both] == [(2, 4, 32, 32)] * 2
    for first in (scales[0], both[0]):
        torch.testing.assert_close(first, network(image), rtol=0, atol=0)
    assert not torch.equal(both[0], both[1])
    assert not [name for name in network.state_dict() if "heads" in name]


@pytest.mark.parametrize("kind", [URPC, DMPLS])
def test_parts_of_a_unet_see_an_image_of_any_size_as_the_whole_network_does(kind):
    torch.manual_seed(0)
    network = AnySize(UNet(widths=(4, 4, 8, 8, 8)), 16).eval()
    method, image = kind([network]), torch.rand(2, 1, 33, 20)
    parts = {URPC: "scales", DMPLS: "both"}[kind]
    first, *others = at_any_size(method, image, getattr(method, parts))
    torch.testing.assert_close(first, network(image), rtol=0, atol=0)
    assert others and all(other.shape == first.shape for other in others)


def test_the_second_decoder_sees_whole_maps_or_nothing(monkeypatch):
    """As WSL4MIS' `dropout2d` of each level of the encoder at the paper's rate of 0.5."""
    network = UNet(widths=(8, 8, 8, 8, 8)).train()
    method = DMPLS([network]).train()
    seen, decoded = [], network.decoded

    def watched(levels, *decoder):
        seen.append(levels)
        return decoded(levels, *decoder)

    monkeypatch.setattr(network, "decoded", watched)
    method.both(torch.rand(4, 1, 32, 32))
    for whole, dropped in zip(*seen, strict=True):
        kept = dropped.flatten(2).any(2)
        assert 0.2 < kept.float().mean() < 0.8
        torch.testing.assert_close(dropped, 2 * whole * kept[..., None, None], rtol=0, atol=0)
    assert [layer.rate for layer in method.dropout] == [0.5] * 5


def test_coarse_heads_are_enlarged_as_the_released_ones_are():
    """To the nearest pixel: SSL4MIS' `interpolate` without a mode."""
    fine, *coarse = URPC([UNet(widths=(4, 4, 8, 8, 8)).eval()]).scales(torch.rand(1, 1, 32, 32))
    for side, logits in zip((8, 4, 2), coarse, strict=True):
        blocks = logits.unfold(2, side, side).unfold(3, side, side).flatten(4)
        assert (blocks == blocks[..., :1]).all()
    assert not torch.equal(fine[..., ::2], fine[..., 1::2])


def test_a_small_decoder_has_as_many_scales_as_levels():
    network = UNet(widths=(4, 4, 8), dropout=(0, 0, 0))
    assert len(URPC([network]).scales(torch.rand(1, 1, 16, 16))) == 2
    with pytest.raises(UserError, match=r"1 level\(s\): 2 or more"):
        URPC([UNet(widths=(4, 4), dropout=(0, 0))])
