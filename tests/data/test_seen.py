"""An image is recognised however it is stored, and another one is not."""

import json

import numpy as np
import pytest

from mambaseg.data.seen import Known, Seen, fingerprint_of, require_unseen
from mambaseg.errors import UserError


@pytest.fixture
def image():
    """Integers in float32, as a reader gives them: (Z, C, H, W)."""
    return np.random.default_rng(0).integers(-50, 900, (4, 1, 20, 24)).astype(np.float32)


STORED = {
    "flipped": lambda image: image[::-1, :, :, ::-1],
    "axes exchanged": lambda image: image.transpose(3, 1, 0, 2),
    "slices the other way round": lambda image: image[::-1],
    "integers": lambda image: image.astype(np.int16),
    "double": lambda image: image.astype(np.float64),
    "between 0 and 1": lambda image: (image - image.min()) / np.float32(np.ptp(image)),
    "with slope and intercept": lambda image: image * np.float32(0.0123) + np.float32(7.7),
    "inverted": lambda image: 1000 - image,
    "grey as colours": lambda image: np.repeat(image, 3, axis=1),
}


@pytest.mark.parametrize("how", STORED)
def test_an_image_is_recognised_however_it_is_stored(image, how):
    assert fingerprint_of(STORED[how](image)) == fingerprint_of(image) != ""


def test_images_of_many_values_are_recognised_in_any_orientation():
    image = np.random.default_rng(0).normal(size=(3, 1, 200, 200)).astype(np.float32)
    assert fingerprint_of(image[::-1].transpose(2, 1, 0, 3)) == fingerprint_of(image)
    assert fingerprint_of(image + np.float32(1)) != fingerprint_of(image)


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (3, 0, 19, 23), (2, 0, 10, 11)])
def test_one_other_voxel_makes_another_image(image, place):
    other = image.copy()
    other[place] += 1
    assert fingerprint_of(other) != fingerprint_of(image)


def test_masks_of_as_many_pixels_are_told_apart_by_where_they_are():
    masks = np.zeros((2, 16, 16), np.float32)
    masks[0, 4:8, 4:8] = masks[1, 2:10, 6:8] = 1
    one, other = (fingerprint_of(mask[None, None]) for mask in masks)
    assert one != other


def test_one_enormous_value_does_not_make_images_alike():
    images = np.random.default_rng(0).integers(0, 100, (2, 3, 1, 8, 8)).astype(np.float32)
    images[:, 0, 0, 0, 0] = -3e38
    assert fingerprint_of(images[0]) != fingerprint_of(images[1])


@pytest.mark.parametrize("side", [8, 16, 64])
def test_small_images_in_which_hardly_a_value_repeats_are_told_apart(side):
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(1, 1, side, side)).astype(np.float32) for _ in range(9)]
    assert len({fingerprint_of(image) for image in images}) == 9
    stored = (-images[0] / 2)[..., ::-1].swapaxes(2, 3)  # inverted, rescaled, turned
    assert fingerprint_of(stored) == fingerprint_of(images[0])


def test_an_image_that_shows_nothing_is_nobodys():
    assert fingerprint_of(np.full((2, 1, 4, 4), 7.0)) == ""
    empty = Known("a", "a", ("",))
    seen = Seen.of({"train": [empty], "val": [], "test": []}, None, same_split=False)
    assert not seen.train and not seen.among([empty])


PARTS = {
    "train": [Known("p1_ED", "p1", ("1",)), Known("p1_ES", "p1", ("2",))],
    "val": [Known("p2_ED", "p2", ("3",))],
    "test": [Known("p3_ED", "p3", ("4",))],
}


def test_what_a_checkpoint_holds_names_nobody():
    plain = Seen.of(PARTS, None, same_split=False).plain()
    assert Seen.restored(json.loads(json.dumps(plain))).plain() == plain
    assert "p1" not in json.dumps(plain) and "ED" not in json.dumps(plain)


def test_all_images_of_a_patient_are_seen_when_one_is():
    seen = Seen.of(PARTS, None, same_split=False)
    renamed = [Known("x", "anna", ("2",)), Known("y", "anna", ("9",)), Known("z", "bert", ("8",))]
    assert seen.among(renamed) == {"x": "trained", "y": "trained"}
    assert seen.among([Known("v", "v", ("3",)), Known("t", "t", ("4",))]) == {"v": "validated"}


def test_a_published_split_that_validates_on_its_test_part_is_scored_as_it_is():
    both = {**PARTS, "val": PARTS["test"]}
    seen = Seen.of(both, None, same_split=False)
    assert seen.among(both["test"], own_split=True) == {}
    assert seen.among(both["test"]) == {"p3_ED": "validated"}
    # the same names of another order: a training image is not excused by the split's hash
    assert seen.among(both["train"], own_split=True) == {"p1_ED": "trained", "p1_ES": "trained"}


def test_a_network_inherits_what_its_parents_have_seen():
    parent = Seen.of(PARTS, None, same_split=False)
    fresh = {"train": [Known("n", "n", ("7",))], "val": [], "test": []}
    child = Seen.of({**fresh, "train": [Known("m", "m", ("6",))]}, parent, same_split=False)
    grandchild = Seen.of(fresh, child, same_split=False)
    cases = [*PARTS["train"], *PARTS["val"], *PARTS["test"], Known("m", "m", ("6",))]
    assert grandchild.among(cases) == dict.fromkeys(["p1_ED", "p1_ES", "p2_ED", "m"], "earlier")
    assert not Seen.of(fresh, Seen.unknown(), same_split=False).complete
    assert Seen.restored(Seen.of(fresh, Seen.unknown(), same_split=False).plain()).complete is False


def test_the_message_names_the_cases_and_what_to_do():
    found = {"p1_ED": "trained", "p2_ED": "validated"}
    with pytest.raises(UserError) as refused:
        require_unseen(found, 5, allowed=False, subject="best.ckpt")
    for word in ("best.ckpt", "2 of the 5", "p1_ED", "p2_ED", "evaluation.allow_seen=true"):
        assert word in str(refused.value)
    require_unseen(found, 5, allowed=True, subject="best.ckpt")


@pytest.mark.parametrize(
    "plain", [[], "x", {"complete": 1}, {"complete": True, "train": [1], "val": [], "test": []}]
)
def test_lists_that_are_none_are_refused(plain):
    with pytest.raises(ValueError, match="not"):
        Seen.restored(plain)
