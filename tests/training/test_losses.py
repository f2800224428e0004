import importlib
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from mambaseg.data.classes import IGNORED
from mambaseg.errors import UserError
from mambaseg.training.checks import require_settings
from mambaseg.training.losses import (
    DeepSupervision,
    DiceCE,
    WithBoundary,
    leave_out_ignored,
    signed_distance,
    taken_label,
)


def batch(shape=(3, 4, 16, 20), seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    label = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    return logits, label


def published_dice(logits, label, smooth=1e-5):
    """The formula, written out class by class in the dtype of the logits."""
    probability = logits.softmax(1)
    losses = []
    for index in range(logits.shape[1]):
        p, g = probability[:, index], (label == index).to(logits.dtype)
        numerator = 2 * (p * g).sum() + smooth
        losses.append(1 - numerator / ((p * p).sum() + (g * g).sum() + smooth))
    return sum(losses) / len(losses)


def published_loss(logits, label, ce=0.5, dice=0.5):
    picked = logits.log_softmax(1).gather(1, label[:, None])
    return -ce * picked.mean() + dice * published_dice(logits, label)


@pytest.mark.parametrize("case", ["random", "confident", "class absent", "one slice"])
def test_dice_ce_and_its_gradient_equal_the_published_formula_in_float64(case):
    logits, label = batch(
        shape=(1, 4, 9, 7) if case == "one slice" else (3, 4, 16, 20),
        scale=30.0 if case == "confident" else 1.0,
    )
    if case == "class absent":
        label[label == 3] = 0
    exact = logits.clone().requires_grad_()
    expected = published_loss(exact, label)
    expected.backward()
    ours = logits.float().requires_grad_()
    value = DiceCE()(ours, label)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-9)


def test_dice_ce_of_a_hand_sized_batch():
    # Two slices of one pixel, two classes. Pixel 0: p = (0.8, 0.2), class 0; pixel 1: p =
    # (0.4, 0.6), class 1. Sums over both slices: class 0: I 0.8, p2 0.64 + 0.16, g2 1; class 1:
    # I 0.6, p2 0.04 + 0.36, g2 1.
    logits = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log().reshape(2, 2, 1, 1)
    label = torch.tensor([0, 1]).reshape(2, 1, 1)
    dice = 1 - (1.6 / 1.8 + 1.2 / 1.4) / 2
    cross_entropy = -(math.log(0.8) + math.log(0.6)) / 2
    assert DiceCE()(logits, label).item() == pytest.approx(0.5 * (cross_entropy + dice), rel=1e-5)
    weighted = DiceCE(ce_weight=1.0, dice_weight=2.0)(logits, label)
    assert weighted.item() == pytest.approx(cross_entropy + 2 * dice, rel=1e-5)


def test_a_perfect_prediction_costs_nothing_also_where_a_class_is_absent():
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    label[:, 2:5, 2:5] = 2
    logits = 60.0 * F.one_hot(label, 4).movedim(-1, 1).float()
    assert DiceCE()(logits, label).item() == pytest.approx(0, abs=1e-6)


def test_sums_run_over_the_whole_batch_not_slice_by_slice():
    logits, label = batch()
    label[0] = 0  # a slice without heart, as at the apex
    together = DiceCE(ce_weight=0)(logits, label)
    apart = torch.stack(
        [DiceCE(ce_weight=0)(logits[i : i + 1], label[i : i + 1]) for i in range(3)]
    )
    assert together.item() == pytest.approx(0.5 * published_dice(logits, label).item(), rel=1e-6)
    assert abs(together.item() - apart.mean().item()) > 0.01


def test_dice_ce_stays_in_float32_under_autocast():
    logits, label = batch(shape=(4, 4, 64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = DiceCE()(logits.bfloat16(), label)
    assert value.dtype == torch.float32
    expected = published_loss(logits.bfloat16().double(), label)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_dice_ce_has_no_state_to_save():
    assert DiceCE().state_dict() == {}


def test_dice_ce_equals_monais():
    from monai.losses import DiceCELoss

    options = {"to_onehot_y": True, "softmax": True, "squared_pred": True, "batch": True}
    oracle = DiceCELoss(**options, smooth_nr=1e-5, smooth_dr=1e-5, lambda_dice=0.5, lambda_ce=0.5)
    logits, label = batch()
    ours, theirs = (logits.float().requires_grad_() for _ in range(2))
    value, expected = DiceCE()(ours, label), oracle(theirs, label[:, None])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    value.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)


def test_logits_without_bounds_give_no_nan():
    logits = torch.tensor([1e38, -1e38]).reshape(1, 2, 1, 1).requires_grad_()
    for label in (0, 1):
        value = DiceCE()(logits, torch.full((1, 1, 1), label))
        value.backward()
        assert not value.isnan() and not logits.grad.isnan().any()


def _half_of_a_batch(rank, store, folder):
    """One of two processes: the loss of its half of the batch, and the gradient that DDP sends."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, label = batch(shape=(4, 4, 16, 20))
    mine = slice(2 * rank, 2 * rank + 2)
    leaf = logits.float()[mine].requires_grad_()
    value = DiceCE()(leaf, label[mine])
    value.backward()
    torch.save((value.detach(), leaf.grad / 2), f"{folder}/{rank}.pt")  # DDP takes the mean
    dist.destroy_process_group()


def test_two_processes_have_the_loss_of_the_whole_batch(tmp_path):
    torch.multiprocessing.start_processes(
        _half_of_a_batch, (tmp_path / "store", tmp_path), nprocs=2, start_method="spawn"
    )
    logits, label = batch(shape=(4, 4, 16, 20))
    whole = logits.float().requires_grad_()
    value = DiceCE()(whole, label)
    value.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert (parts[0][0] + parts[1][0]).item() / 2 == pytest.approx(value.item(), rel=1e-6)
    gradient = torch.cat([part[1] for part in parts])
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-5, atol=1e-9)


# ---- nnU-Net's, weights, top-k, boundary


@pytest.mark.parametrize("whole", [True, False])
def test_nnunets_dice_ce_skips_the_background_and_squares_nothing(whole):
    logits, label = batch(shape=(2, 3, 6, 5))
    p, g = logits.softmax(1), F.one_hot(label, 3).movedim(-1, 1)
    over = (0, 2, 3) if whole else (2, 3)
    dice = (2 * (p * g).sum(over) + 1e-5) / (p.sum(over) + g.sum(over) + 1e-5)
    expected = F.cross_entropy(logits, label) + 1 - dice[..., 1:].mean()
    options = {"ce_weight": 1.0, "dice_weight": 1.0, "background": False, "squared": False}
    torch.testing.assert_close(DiceCE(**options, batch=whole)(logits, label), expected)


def test_class_weights_weight_the_mean_as_torch_does_and_leave_out_ignored_pixels():
    logits, label = batch()
    label[0, :4] = IGNORED
    weights = [0.1, 1.0, 2.0, 5.0]
    ours = DiceCE(ce_weight=1, dice_weight=0, class_weights=weights, partial=True)
    theirs = torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(logits, label, theirs, ignore_index=IGNORED)
    torch.testing.assert_close(ours(logits, label), expected, rtol=1e-6, atol=0)
    with pytest.raises(UserError, match="3 weights for 4 classes"):
        DiceCE(class_weights=[1, 1, 1])(logits, label)


@pytest.mark.parametrize("weights", [(math.nan, 1), (1, -1), (1, math.inf)])
def test_weights_of_terms_are_numbers_from_0(weights):
    with pytest.raises(UserError, match=r"loss\.ce_weight, loss\.dice_weight: numbers, 0 or more"):
        DiceCE(ce_weight=weights[0], dice_weight=weights[1])


def test_a_loss_that_teaches_nothing_or_the_opposite_is_refused():
    with pytest.raises(UserError, match="both are 0, nothing would be learnt"):
        DiceCE(ce_weight=0, dice_weight=0)
    for weight in (-1, math.nan, math.inf):
        with pytest.raises(UserError, match=r"loss\.weight=.*: a number, 0 or more"):
            WithBoundary(DiceCE(), weight=weight)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, math.nan], [math.inf, 1]], ids=str)
def test_class_weights_that_cannot_be_are_refused_by_their_key(weights):
    with pytest.raises(UserError, match=r"loss\.class_weights: one weight per class, .*null: none"):
        DiceCE(class_weights=weights)


def test_the_dice_of_partial_labels_is_that_of_the_pixels_that_have_one():
    logits, label = batch()
    label[:, :4] = IGNORED
    value = DiceCE(ce_weight=0, dice_weight=1, partial=True)(logits, label)
    torch.testing.assert_close(value, published_dice(logits[:, :, 4:], label[:, 4:]))


def test_top_k_takes_the_worst_of_the_pixels_that_have_a_label():
    logits, label = batch(shape=(1, 2, 2, 5))
    label[0, 0] = IGNORED
    costs = F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="none")[0, 1]
    loss = DiceCE(ce_weight=1, dice_weight=0, top_k=0.4, partial=True)
    torch.testing.assert_close(loss(logits, label), costs.sort(descending=True).values[:2].mean())
    assert loss(logits, torch.full_like(label, IGNORED)).item() == 0


def test_the_boundary_loss_of_a_hand_sized_slice():
    inside = torch.tensor([[0, 1, 1, 1, 0, 0]], dtype=torch.bool).numpy()
    assert signed_distance(inside).tolist() == [[1, 0, -1, 0, 1, 2]]
    assert not signed_distance(inside & False).any()
    probability = torch.tensor([0.1, 0.9, 0.8, 0.7, 0.2, 0.3])
    logits = torch.stack([1 - probability, probability]).log().reshape(1, 2, 1, 6)
    label = torch.from_numpy(inside).long()[None]
    region = DiceCE()
    boundary = (0.1 - 0.8 + 0.2 + 2 * 0.3) / 6
    value = WithBoundary(region, weight=0.5)(logits, label)
    assert value.item() == pytest.approx(region(logits, label).item() + 0.5 * boundary, rel=1e-5)
    with pytest.raises(UserError, match="WithBoundary cannot leave out"):
        leave_out_ignored(WithBoundary(region))


def test_the_boundary_loss_of_several_classes_is_the_mean_of_theirs():
    """Distances by comparing each pixel with each other one, also where a class is missing."""
    logits, label = batch(shape=(2, 4, 7, 6))
    label[0][label[0] == 3] = 0
    places = torch.cartesian_prod(torch.arange(7), torch.arange(6)).double()
    apart = torch.cdist(places, places)  # of all pairs of pixels
    total = 0.0
    for slice_, probability in zip(label, logits.softmax(1), strict=True):
        for k in range(1, 4):
            inside = (slice_ == k).flatten()
            if inside.any():
                outer, inner = apart[:, inside].amin(1), apart[:, ~inside].amin(1)
                phi = torch.where(inside, 1 - inner, outer)
                total += (phi * probability[k].flatten()).sum()
    region = DiceCE()
    value = WithBoundary(region, weight=0.7)(logits, label) - region(logits, label)
    torch.testing.assert_close(value, 0.7 * total / (2 * 3 * 7 * 6), rtol=1e-6, atol=0)


# ---- several heads


def test_deep_supervision_halves_the_weights_and_drops_the_coarsest_head():
    label = torch.zeros(1, 8, 8, dtype=torch.long)
    label[:, 2:6, 3:8] = 1
    outputs = [torch.randn(1, 2, side, side, requires_grad=True) for side in (8, 4, 2)]
    loss = DiceCE()
    fine, middle, coarse = (loss(one, label[:, k // 2 :: k, k // 2 :: k])
                            for one, k in zip(outputs, (1, 2, 4), strict=True))  # fmt: skip
    torch.testing.assert_close(
        DeepSupervision(loss)(outputs, label), (fine + middle / 2) / 1.5, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        DeepSupervision(loss, coarsest=True)(outputs, label), (4 * fine + 2 * middle + coarse) / 7
    )
    DeepSupervision(loss)(outputs, label).backward()
    assert all(one.grad.any() for one in outputs[:2])
    assert not outputs[2].grad.any()  # zeros rather than none, for DDP
    leave_out_ignored(DeepSupervision(loss))
    assert loss.partial


HEADS = {
    "u_mamba_none": ["model.widths=[4,8,8]", "model.blocks=1"],
    "nnunet_2d": ["model.deep_supervision=true", "model.filters=[4,8,8]", "model.strides=[1,2,2]",
                  "model.kernel_size=[3,3,3]", "model.upsample_kernel_size=[2,2]",
                  "model.size_multiple=4"],
}  # fmt: skip


@pytest.mark.parametrize("model", HEADS)
def test_a_network_with_several_heads_is_supervised_deeply(model, phantom_root, tmp_path):
    from runs import small_overrides, trained

    words = [*small_overrides(phantom_root, tmp_path), f"model={model}", *HEADS[model]]
    run = trained(*words, "loss=deep_supervision", "data.steps=2", "test=false", "trainer=cpu")
    assert run.folder.trained
    if model == "u_mamba_none":
        heads = run.task.network.network.heads
        assert all(head.weight.requires_grad for head in heads)


def test_nnunets_recipe_trains_on_any_data(phantom_root, tmp_path):
    from runs import small_overrides, trained

    words = [*small_overrides(phantom_root, tmp_path), "experiment=nnunet_2d"]
    run = trained(*words, *HEADS["nnunet_2d"], "data.steps=2", "trainer=cpu")
    assert run.folder.trained and run.folder.path.parent.name == "nnunet_2d"
    config = run.config
    assert config["data"]["oversample"] == 0.33 and config["data"]["intensity"] == "zscore"
    assert (config["optim"]["optimizer"]["momentum"], config["trainer"]["gradient_clip_val"]) == (
        0.99, 12,
    )  # fmt: skip
    assert "low_resolution" in config["augmentation"] and run.data.views == "flips"


def test_a_network_with_one_head_and_a_loss_for_several_are_refused(phantom_root, tmp_path):
    from runs import UNET, small_overrides, trained

    words = [*small_overrides(phantom_root, tmp_path), "trainer=cpu"]
    with pytest.raises(UserError, match="needs a network with heads at several scales"):
        trained(*words, *UNET, "loss=deep_supervision")
    with pytest.raises(UserError, match="outputs while it trains"):
        trained(*words, "model=nnunet_2d", *HEADS["nnunet_2d"])
    with pytest.raises(UserError, match="method=supervised only"):
        trained(*words, *UNET, "loss=deep_supervision", "method=entropy", "data.labelled=2")


# ---- losses of others


def test_monais_losses_get_the_label_with_a_channel():
    from monai import losses

    class Mine(losses.DiceLoss):
        pass

    _, label = batch()
    for loss in (losses.DiceFocalLoss(), losses.FocalLoss(), Mine()):
        assert torch.equal(taken_label(loss, label), label[:, None])
    for loss in (DiceCE(), torch.nn.CrossEntropyLoss()):
        assert taken_label(loss, label) is label


def test_what_monais_focal_losses_compute():
    """Lin's mean per pixel over the number of classes; with Dice the sigmoid form of each class."""
    from monai import losses

    logits, label = batch()
    truth = F.one_hot(label, 4).movedim(-1, 1)
    p = logits.softmax(1).gather(1, label[:, None])
    focal = losses.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0)(logits, label[:, None])
    torch.testing.assert_close(focal.double(), -((1 - p) ** 2 * p.log()).mean() / 4)
    options = {"to_onehot_y": True, "softmax": True}
    both = losses.DiceFocalLoss(**options)(logits, label[:, None])
    q = torch.where(truth.bool(), logits, -logits).sigmoid()
    sigmoid = -((1 - q) ** 2 * q.log()).mean()
    dice = losses.DiceLoss(**options)(logits, label[:, None])
    torch.testing.assert_close(both.double(), dice.double() + sigmoid)


@pytest.mark.parametrize("kind", ["DiceLoss", "DiceCELoss", "DiceFocalLoss", "TverskyLoss"])
def test_a_loss_of_monai_is_set_up_for_logits_and_class_indices(kind):
    kind = getattr(importlib.import_module("monai.losses"), kind)
    require_settings(kind(softmax=True, to_onehot_y=True))
    with pytest.raises(UserError, match=r"loss\.softmax=true"):
        require_settings(kind(to_onehot_y=True))
    with pytest.raises(UserError, match=r"loss\.to_onehot_y=true"):
        require_settings(kind(softmax=True))
    require_settings(torch.nn.CrossEntropyLoss())


OWN = """
import torch

class Squares(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits, label):
        truth = torch.nn.functional.one_hot(label, logits.shape[1]).movedim(-1, 1)
        return self.factor * (logits.softmax(1) - truth).square().mean()
"""


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dice_focal", None),  # ours, which names MONAI's
        ("cross_entropy", None),
        ("squares", "_target_: own_loss_file.Squares\nfactor: 2.0\n"),
        ("tversky", "_target_: monai.losses.TverskyLoss\nto_onehot_y: true\nsoftmax: true\n"),
    ],
)
def test_a_loss_is_a_file_and_a_config_from_outside_too(
    name, config, phantom_root, tmp_path, monkeypatch
):
    from runs import own_overrides, trained

    (tmp_path / "own_loss_file.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    if config:
        (tmp_path / "conf" / "loss" / f"{name}.yaml").write_text(config)
    words = ["data=phantom", f"data.root={phantom_root}", "data.prepare.patients=8", "test=false"]
    run = trained(*own_overrides(tmp_path), f"loss={name}", *words, configs=tmp_path / "conf")
    assert run.folder.trained and run.task.results["stage"] == "val"
    assert type(run.task.loss).__name__ == run.config["loss"]["_target_"].rpartition(".")[2]


# ---- regions ------------------------------------------------------------------------------------

NNUNET = {"ce_weight": 1.0, "dice_weight": 1.0, "background": False, "squared": False}


def test_the_dice_of_regions_is_that_of_their_summed_probabilities():
    logits, label = batch()
    regions = {"whole": [1, 2, 3], "core": [2, 3], "tip": 3}
    loss = DiceCE(**NNUNET, regions=regions)(logits, label)
    expected = F.cross_entropy(logits, label)
    for own in ([1, 2, 3], [2, 3], [3]):
        p, g = logits.softmax(1)[:, own].sum(1), torch.isin(label, torch.tensor(own)).double()
        expected += (1 - (2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5)) / 3
    torch.testing.assert_close(loss, expected)


def test_classes_as_regions_give_the_loss_of_the_classes():
    logits, label = batch()
    label[:, :3] = IGNORED
    plain = DiceCE(**NNUNET, partial=True)(logits, label)
    each = DiceCE(**NNUNET, partial=True, regions={"a": [1], "b": [2], "c": [3]})(logits, label)
    torch.testing.assert_close(each, plain)


def test_a_loss_of_regions_without_regions_is_refused():
    with pytest.raises(UserError, match=r"loss\.regions: needs regions, such as data\.regions="):
        DiceCE(regions=None)


def test_a_region_without_a_border_has_no_distance():
    for inside in (np.ones((3, 4), bool), np.zeros((3, 4), bool)):
        assert not signed_distance(inside).any()


def test_the_share_of_pixels_is_rounded_down_to_one_at_least():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(1, 2, 1, 4)
    label = torch.ones(1, 1, 4, dtype=torch.long)
    costs = torch.nn.functional.cross_entropy(logits, label, reduction="none").flatten()
    for share, count in ((0.1, 1), (0.5, 2), (0.7, 2), (0.75, 3), (0.99, 3)):
        loss = DiceCE(ce_weight=1, dice_weight=0, top_k=share)(logits, label)
        assert loss == pytest.approx(float(costs[:count].mean())), share


def test_class_weights_count_relative_to_each_other_only():
    label = torch.arange(9).view(1, 3, 3) % 2
    logits = torch.stack([label.flip(1) / 2, label / 3], dim=1)
    one, same = (
        DiceCE(ce_weight=1, dice_weight=0, class_weights=[weight, 3 * weight])(logits, label)
        for weight in (1, 1e-3)
    )
    assert one == pytest.approx(float(same))
