"""Largest components: of classes, of regions, of all as one; what is tried, and who decides."""

import numpy as np
import pytest

from mambaseg.evaluation.largest import candidates, keep_largest, parts_of, voted
from mambaseg.evaluation.summary import kept_in_words

CLASSES = {"RV": (1,), "MYO": (2,)}
REGIONS = {"whole": (1, 2), "core": (2,)}


def test_a_region_is_one_component_where_its_labels_touch():
    labels = np.zeros((1, 4, 8), np.uint8)
    labels[0, 0, 0:3], labels[0, 1, 0:2] = 1, 2  # together the largest
    labels[0, 3, 4:8] = 1  # the largest of label 1
    labels[0, 0, 7] = 2
    whole = keep_largest(labels, {"foreground": (1, 2)})
    assert (whole[:, :2, :3] == labels[:, :2, :3]).all() and (whole > 0).sum() == 5
    each = keep_largest(labels, CLASSES)
    assert (each == 1).sum() == 4 and (each == 2).sum() == 2
    assert (keep_largest(labels, {**REGIONS}) == whole).all()


@pytest.mark.parametrize(
    ("structures", "tried"),
    [
        (CLASSES, {"foreground": (1, 2), **CLASSES}),
        (REGIONS, REGIONS),  # whole is the foreground
        (
            {"polyp": (1,), "other": (2,), "all": (1, 2)},
            {"all": (1, 2), "polyp": (1,), "other": (2,)},
        ),
    ],
)
def test_what_is_tried(structures, tried):
    found = candidates(["background", "RV", "MYO"], structures)
    assert list(found.items()) == list(tried.items())


def test_a_class_called_foreground_hides_no_choice():
    classes = {"foreground": (1,), "border": (2,)}
    found = candidates(["background", "foreground", "border"], classes)
    assert list(found.values()) == [(1, 2), (1,), (2,)]


def test_a_single_class_is_tried_once():
    assert candidates(["background", "polyp"], {"polyp": (1,)}) == {"polyp": (1,)}


def test_most_networks_decide():
    whole, rv = {"foreground": (1, 2)}, {"RV": (1,)}
    assert voted([rv, {**whole, **rv}, whole]) == {**whole, **rv}
    assert list(voted([rv, {**whole, **rv}, whole])) == ["foreground", "RV"]
    assert voted([rv, {}]) == {} and voted([rv]) == rv
    assert kept_in_words(voted([whole, rv, {}])) == "none"


def test_the_values_of_the_key():
    assert parts_of(False, CLASSES) == parts_of("auto", CLASSES) == {}
    assert parts_of(True, REGIONS) == REGIONS
    assert parts_of({"core": [2]}, CLASSES) == {"core": (2,)}
