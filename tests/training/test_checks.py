"""What cannot be trained is refused before the first step, with the config or file and a remedy."""

import shutil

import nibabel
import numpy as np
import pytest
import torch
from monai.losses import SSIMLoss
from torch import nn

from mambaseg.errors import UserError
from mambaseg.models import AnySize, UNet
from mambaseg.training.checks import require_heads, require_logits, require_loss, require_minimum
from mambaseg.training.losses import DeepSupervision, DiceCE
from runs import built

LABEL = torch.zeros(2, 8, 8, dtype=torch.long)


class MyUNet(UNet):
    """A class of the user's own with the arguments of another."""


def check(logits, label=LABEL):
    require_logits(logits, label, num_classes=4, network="model=mine (conf/model/mine.yaml)")


# ---- activated outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.1, 100.0])
def test_softmax_outputs_are_refused(dtype, spread):
    with pytest.raises(UserError, match=r"conf/model/mine.yaml\) gives softmax outputs.*logits"):
        check((spread * torch.randn(2, 4, 8, 8)).softmax(1).to(dtype))


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_sigmoid_outputs_are_refused(spread):
    with pytest.raises(UserError, match="sigmoid outputs"):
        check((spread * torch.randn(2, 4, 8, 8)).sigmoid())


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(2, 4, 8, 8),
        torch.ones(2, 4, 8, 8),
        torch.randn(2, 4, 8, 8),
        torch.full((2, 4, 8, 8), 0.1),  # a bias alone
        torch.rand(2, 4, 8, 8) * torch.tensor([0.1, 0.3, 0.6, 0.9]).view(4, 1, 1),
        torch.randn(2, 4, 8, 8).log_softmax(1),  # softmax leaves it as it is
        torch.full((2, 4, 8, 8), float("nan")),  # another check's business
    ],
)
def test_logits_pass(logits):
    check(logits)


# ---- losses


@pytest.mark.parametrize(
    ("loss", "batch", "said"),
    [
        (nn.L1Loss(), 2, "L1Loss does not take"),
        (nn.L1Loss(), 4, "Using a target size"),  # which torch would stretch over the classes
        (nn.CrossEntropyLoss(reduction="none"), 2, r"gives \(2, 8, 8\) instead of one number"),
        (nn.CTCLoss(), 2, r"CTCLoss does not take"),
    ],
)
def test_a_loss_for_something_else_is_refused(loss, batch, said):
    with pytest.raises(UserError, match=rf"{said}.*Use another, such as loss=dice_ce"):
        label = torch.zeros(batch, 8, 8, dtype=torch.long)
        require_loss(loss, torch.randn(batch, 4, 8, 8), label, instead="dice_ce")


def test_a_loss_that_fails_without_a_word_is_refused_too():
    class Silent(nn.Module):
        def forward(self, *_):
            raise ValueError

    with pytest.raises(UserError, match=r"Silent does not take .*\(ValueError\)"):
        require_loss(Silent(), torch.randn(2, 4, 8, 8), LABEL, instead="dice_ce")


def test_a_loss_for_several_heads_or_with_what_is_left_out_passes():
    require_loss(nn.CrossEntropyLoss(), torch.randn(2, 4, 8, 8), LABEL, instead="dice_ce")
    require_loss(DiceCE(partial=True), torch.randn(2, 4, 8, 8), LABEL, instead="dice_ce")


@pytest.mark.parametrize(
    "loss", [nn.L1Loss(), nn.MSELoss(), nn.SmoothL1Loss(), SSIMLoss(2)], ids=repr
)
def test_losses_of_images_are_least_at_the_clear_one(loss):
    require_minimum(loss, torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=repr)
def test_losses_of_classes_are_not(loss):
    with pytest.raises(UserError, match="not least where the restored image is the clear one"):
        require_minimum(loss, torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))


# ---- heads


@pytest.mark.parametrize(("heads", "coarsest", "warned"), [
    (1, False, False), (2, False, True), (2, True, False), (3, False, False),
])  # fmt: skip
def test_deep_supervision_that_trains_the_finest_head_alone_is_warned_of(
    heads, coarsest, warned, caplog
):
    loss, logits = DeepSupervision(DiceCE(), coarsest=coarsest), torch.randn(2, 4, 8, 8)
    require_heads([logits] * heads, loss, network="model=mine")
    assert ("model=mine alone" in caplog.text) is warned
    assert ("model.deep_supr_num" in caplog.text) is warned


def test_deep_supervision_of_one_output_names_networks_whose_heads_it_trains():
    with pytest.raises(UserError, match=r"emcad_b2.*nnunet_2d with .*model\.deep_supr_num=4.*half"):
        require_heads(torch.randn(2, 4, 8, 8), DeepSupervision(DiceCE()), network="model=mine")


# ---- shapes


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 8), (2, 4, 4, 8), (1, 4, 8, 8), (2, 8)])
def test_another_shape_is_refused(shape):
    with pytest.raises(UserError, match=r"conf/model/mine.yaml\) gives .* expected .*\(2, 4, 8, 8"):
        check(torch.randn(shape))


class Gives(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, image):
        return self.change(image)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda image: image[..., ::2, ::2], "a tensor (1, 1, 4, 4)"),
        (lambda image: image.repeat(1, 1, 2, 2), "a tensor (1, 1, 16, 16)"),  # not just cropped
        (lambda image: (image, image), "a tuple"),
        (lambda image: {"out": image}, "a dict"),
    ],
)
def test_outputs_of_another_size_or_kind_are_refused(change, said):
    with pytest.raises(UserError, match="Gives gives") as refused:
        AnySize(Gives(change), 4)(torch.rand(1, 1, 7, 8))
    assert said in str(refused.value)


# ---- in a training


class Probabilities(nn.Module):
    """A network that has its softmax in it, as a config may name it."""

    def __init__(self, classes=4, softmax=True):
        super().__init__()
        self.layer, self.softmax = nn.Conv2d(1, classes, 1), softmax

    def forward(self, image):
        logits = self.layer(image)
        return logits.softmax(1) if self.softmax else logits


@pytest.fixture
def trains_not(small_run):
    """Trains in this process and gives the message with which that ends before a step is taken."""

    def run(*words, configs=None):
        words = [*small_run, "trainer.log_every_n_steps=1", *words]
        with pytest.raises(UserError) as refused, built(*words, configs=configs) as run:
            run.fit()
        assert run.trainer.global_step == 0 and run.folder.record["status"] == "failed"
        assert not list(run.folder.path.glob("checkpoints/*"))
        return str(refused.value)

    return run


@pytest.fixture
def mine(tmp_path):
    """A folder with the config of a network, model=mine."""
    (tmp_path / "conf/model").mkdir(parents=True)
    config = "name: mine\n_target_: test_checks.Probabilities\nsize_multiple: 1\n"
    (tmp_path / "conf/model/mine.yaml").write_text(config)
    return tmp_path / "conf"


def test_a_training_on_probabilities_does_not_begin(trains_not, mine):
    said = trains_not("model=mine", configs=mine)
    assert "conf/model/mine.yaml" in said and "softmax" in said


def test_a_training_with_a_loss_of_images_does_not_begin(trains_not):
    assert "Use another, such as loss=dice_ce" in trains_not("loss=l1")


def test_a_training_of_too_few_classes_does_not_begin(trains_not, mine):
    said = trains_not("model=mine", "+model.classes=3", "+model.softmax=false", configs=mine)
    assert "(4, 3, 32, 32)" in said and "data.num_classes" in said


@pytest.mark.parametrize(
    ("model", "change", "key"),
    [
        ("unet", "model._target_=test_checks.MyUNet", "_target_"),
        ("unet", "~model.dropout", "dropout"),
        ("monai_basic_unet", "+model.act=a/path", "act"),
    ],
)
def test_a_network_that_no_later_command_could_build_is_not_trained(small_run, model, change, key):
    with pytest.raises(UserError, match=rf"model\.{key}: .*model/{model}\.yaml, .*mine\.yaml"):
        built(*small_run, f"model={model}", change)


@pytest.fixture
def relabelled(phantom_root, tmp_path):
    """A copy of the phantom whose labels of some patients are changed; returns words for it."""

    def copy(change, patients):
        root = tmp_path / "relabelled"
        shutil.copytree(phantom_root, root)
        (root / "phantom.json").unlink()
        for patient in patients:
            for path in root.glob(f"{patient}/*_gt.nii.gz"):
                image = nibabel.load(path)
                changed = change(np.asarray(image.dataobj)).astype(np.uint8)
                nibabel.save(nibabel.Nifti1Image(changed, image.affine), path)
        return ["model=unet", "data.prepare=null", f"data.root={root}"]

    return copy


@pytest.fixture
def split(small_run):
    """Who is in which part of the phantom."""
    with built("model=unet", *small_run) as run:
        return run.data.split


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_without_foreground_is_found_before_the_first_step(
    part, split, trains_not, relabelled
):
    patients = getattr(split, part)
    said = trains_not(*relabelled(np.zeros_like, patients))
    assert f"the {part} part of split random-seed0" in said and "no foreground" in said
    assert patients[0] in said and "_gt.nii.gz" in said and "data.split" in said


def test_a_class_that_is_never_trained_is_named(split, trains_not, relabelled):
    said = trains_not(*relabelled(lambda label: np.where(label == 2, 3, label), split.train))
    assert "class 2 (MYO)" in said and "train part" in said and "data.class_names" in said


def test_a_class_that_only_the_other_parts_lack_is_no_error(split, relabelled, small_run):
    words = relabelled(lambda label: np.where(label == 2, 3, label), [*split.val, *split.test])
    with built(*small_run, "data.steps=1", "test=false", *words) as run:
        run.fit()
    assert run.folder.record["status"] == "done"


@pytest.mark.parametrize(
    "word",
    ["data.steps=0", "data.val_every=0", "data.batch_size=0", "data.size=0",
     "trainer.accumulate_grad_batches=0"],
)  # fmt: skip
def test_a_budget_of_nothing_is_refused(word, small_run):
    with pytest.raises(Exception, match=r"0") as refused:
        built(*small_run, "model=unet", word)
    cause = refused.value.__cause__ or refused.value
    assert isinstance(cause, UserError) and word.partition("=")[0].split(".")[1] in str(cause)
