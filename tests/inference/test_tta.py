"""Test-time augmentation: the views follow the training, and those that do not fit are said."""

import json

import nibabel
import numpy as np
import pytest
import torch

from mambaseg.app.ensemble import restore_predictor
from mambaseg.data.augmentation import Augmentation
from mambaseg.data.formats.images import find_images
from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from mambaseg.inference.segment import VIEWS, Member, choose_views, learnt_views, segment
from mambaseg.inference.trained import read_checkpoint
from runs import UNET, built
from tiny_checkpoints import write_checkpoint


class Sides(torch.nn.Module):
    """What is bright is class 1 in the left half of the image and class 2 in the right half."""

    def forward(self, image):
        bright = image[:, 0] > 0.5
        right = torch.arange(image.shape[-1]) >= image.shape[-1] // 2
        label = bright * (1 + right.long())
        return 20.0 * torch.nn.functional.one_hot(label, 3).permute(0, 3, 1, 2).float()


def bright_spots():
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, 10:14, 4:9] = image[0, 0, 10:14, 22:30] = 1
    return image


def labels(views):
    member = Member(Sides(), Preprocessing("native", 32), views)
    return segment([member], [bright_spots()]).labels[0]


def test_on_a_grid_of_unequal_sides_a_training_has_shown_no_turned_grid():
    for learnt, square, other in (("all", "all", "flips"), ("rot90", "rot90", "none"),
                                  ("flips", "flips", "flips")):  # fmt: skip
        assert learnt_views({"views": learnt}, (32, 32)) == square
        assert learnt_views({"views": learnt}, (32, 64)) == other
    assert learnt_views({}, (32, 64)) is None


# a view as the matrix of the map (row, column) about the middle that it reads the image with
QUARTER, MIRROR = np.array([[0, 1], [-1, 0]]), np.diag([1, -1])


def matrices(views):
    return {
        tuple((np.linalg.matrix_power(QUARTER, turns) @ (MIRROR if mirrored else np.eye(2)))
              .round().astype(int).ravel())
        for turns, mirrored in views
    }  # fmt: skip


@pytest.mark.parametrize("preset", ["none", "paper", "modern"])
def test_the_views_that_follow_a_training_are_what_its_draws_generate(preset):
    """The nearest symmetry of the square to each drawn map, and their products."""
    augmentation = Augmentation(preset, Preprocessing("native", 32), seed=1)
    drawn = augmentation.draw(3, range(400), np.full((400, 2), 32))[:, :4].reshape(-1, 2, 2)
    symmetries = {m: np.reshape(m, (2, 2)) for m in matrices(VIEWS["all"])}
    seen = {max(symmetries, key=lambda m: float((symmetries[m] * d).sum())) for d in drawn}
    while True:
        more = {tuple((symmetries[a] @ symmetries[b]).ravel()) for a in seen for b in seen} | seen
        if more == seen:
            break
        seen = more
    assert matrices(VIEWS[augmentation.views]) == seen


@pytest.mark.parametrize(("views", "count"), [("none", 1), ("flips", 4), ("rot90", 4), ("all", 8)])
def test_each_name_stands_for_its_views(views, count):
    assert len(matrices(VIEWS[views])) == len(VIEWS[views]) == count
    determinants = [round(np.linalg.det(np.reshape(m, (2, 2)))) for m in matrices(VIEWS[views])]
    assert determinants.count(-1) == (0 if views in ("none", "rot90") else count // 2)


def test_left_and_right_stay_where_they_are_with_the_views_of_a_training_without_flips(caplog):
    expected = labels("none")
    assert set(expected.unique().tolist()) == {0, 1, 2}
    assert torch.equal(labels(choose_views(True, "none", "net.ckpt")), expected)
    assert "net.ckpt was trained without flips or rotations" in caplog.text
    assert not torch.equal(labels("flips"), expected)  # what is to be said below


@pytest.mark.parametrize(("tta", "learnt", "said"), [
    ("flips", "none", "classes that differ by their side can be exchanged"),
    ("rot90", "none", "classes that differ by their side can be exchanged"),
    ("all", "none", "has not learnt from 7 of these 8 views"),
    ("all", "flips", "has not learnt from 4 of these 8 views"),
    ("rot90", "flips", "has not learnt from 2 of these 4 views"),
    ("flips", "flips", ""),
    ("flips", "all", ""), ("rot90", "all", ""), ("all", "all", ""),
    ("none", "none", ""), (False, None, ""), ("flips", None, ""),
])  # fmt: skip
def test_chosen_views_that_the_training_did_not_show_are_said(tta, learnt, said, caplog):
    assert choose_views(tta, learnt, "net.ckpt") == (tta or "none")
    assert said in caplog.text if said else not caplog.text


def test_views_that_nobody_knows_are_refused():
    with pytest.raises(UserError, match=r"tta=turns: choose true, none, flips, rot90, all"):
        choose_views("turns", "all", "net.ckpt")
    with pytest.raises(UserError, match=r"old\.ckpt does not record the augmentation"):
        choose_views(True, None, "old.ckpt")
    for odd in (1, None, ["flips"], 0):
        with pytest.raises(UserError, match="choose true"):
            choose_views(odd, "all", "net.ckpt")


@pytest.mark.parametrize(
    ("augmentation", "views"),
    [("none", "none"), ("modern", "flips"), ("modern_no_flip", "none"), ("paper", "all")],
)
def test_a_training_writes_the_views_that_it_showed_into_the_checkpoint(
    small_run, augmentation, views
):
    with built(*small_run, *UNET, f"augmentation={augmentation}") as run:
        run.fit()
    best = run.folder.path / "checkpoints" / "best.ckpt"
    assert read_checkpoint(best).about["views"] == views
    predictor = restore_predictor([best], device="cpu", tta=True)
    assert [member.views for member in predictor.members] == [views]


def test_each_network_of_an_ensemble_sees_its_own_views_and_has_one_vote(tmp_path):
    paths = [
        write_checkpoint(tmp_path / f"{name}.ckpt", seed=seed, augmentation=name)
        for seed, name in enumerate(("none", "paper"))
    ]
    scan = np.random.default_rng(0).integers(0, 900, (32, 32, 2)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(scan, np.eye(4)), tmp_path / "a.nii.gz")
    predictor = restore_predictor(paths, device="cpu", tta=True, probabilities=True)
    sources = find_images(str(tmp_path / "a.nii.gz"), outside=tmp_path / "out")
    assert predictor.predict(sources, tmp_path / "out").done == ["a"]
    about = json.loads((tmp_path / "out" / "a.json").read_text())
    assert about["made_by"]["tta"] == ["none", "all"]
    together = predictor.segment(predictor.read(sources[0])).probabilities.astype(int)
    alone = [
        restore_predictor([path], device="cpu", tta=True, probabilities=True) for path in paths
    ]
    one, other = (each.segment(each.read(sources[0])).probabilities.astype(int) for each in alone)
    assert abs(2 * together - one - other).max() <= 2  # of 255: rounding


def test_an_augmentation_that_is_no_name_is_a_damaged_checkpoint(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", augmentation={"_target_": "os.system"})
    with pytest.raises(UserError, match="about its augmentation"):
        restore_predictor([path], device="cpu")
