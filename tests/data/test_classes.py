"""Classes go by their names: each once, and in one order wherever two sides meet."""

import shlex

import pytest

from mambaseg.data.classes import (
    check_class_names,
    require_named_values,
    require_same_classes,
    sides_of_one,
    structures_of,
)
from mambaseg.errors import UserError
from runs import built, composed

NETWORK = ["background", "LV", "MYO", "RV"]


@pytest.mark.parametrize("names", [["b", "LV", "LV"], ["b", "LV", " lv"], ["b", "", "RV"]])
def test_each_class_has_a_name_of_its_own(names):
    with pytest.raises(UserError, match=r"data\.class_names"):
        check_class_names(names, "data.class_names")


@pytest.mark.parametrize(
    "data", [NETWORK, ["nothing", "lv", "Myo", "RV "], ("background", "LV", "MYO", "RV")]
)
def test_the_same_names_in_the_same_order_are_the_same(data):
    require_same_classes(NETWORK, data, label_map=None, checkpoint="best.ckpt")


def refused(data, label_map=None, network=NETWORK):
    with pytest.raises(UserError, match=r"best\.ckpt") as error:
        require_same_classes(network, data, label_map=label_map, checkpoint="best.ckpt")
    return str(error.value)


@pytest.mark.parametrize("data", [NETWORK[:3], [*NETWORK, "scar"]])
def test_other_numbers_of_classes_have_no_mapping(data):
    assert "data.class_names=" not in refused(data)


def test_other_names_may_mean_the_same_where_that_is_said():
    message = refused(["background", "left", "wall", "right"])
    assert "data.class_names=[background,LV,MYO,RV]" in message and "label_map" not in message


@pytest.mark.parametrize("label_map", [None, {0: 0, 10: 1, 20: 2, 30: 3, 99: 0}])
@pytest.mark.parametrize(
    ("network", "data"),
    [
        (NETWORK, ["background", "RV", "MYO", "LV"]),
        (["b", "one's", "a, b", "null", "x"], ["b", "null", "x", "a, b", "one's"]),
    ],
)
def test_the_mapping_that_is_offered_gives_the_networks_order(network, data, label_map):
    if label_map is not None and len(network) > 4:
        label_map = {**label_map, 40: 4}
    overrides = shlex.split(refused(data, label_map, network).rpartition(" order: ")[2])
    cfg = composed("data=acdc", *overrides)
    assert list(cfg.data.class_names) == network
    before = label_map or {k: k for k in range(len(network))}
    for value, index in before.items():
        # the background keeps its place whatever it is called
        assert network[cfg.data.label_map[value]] == data[index] or index == 0
    require_same_classes(network, cfg.data.class_names, label_map=None, checkpoint="best.ckpt")


@pytest.mark.parametrize(("names", "pairs"), [
    (["background", "left kidney", "spleen", "right kidney"], [("left kidney", "right kidney")]),
    (["b", "lung_L", "lung_R", "R-eye", "L-eye"], [("lung_L", "lung_R"), ("R-eye", "L-eye")]),
    (["b", "AtriumLeft", "AtriumRight"], [("AtriumLeft", "AtriumRight")]),
    (["background", "RV", "MYO", "LV"], []), (["b", "left lung", "bright"], []),
])  # fmt: skip
def test_sides_of_one_structure_are_found_by_their_names(names, pairs):
    assert sides_of_one(names) == pairs


@pytest.mark.parametrize(("augmentation", "said"), [("paper", True), ("none", False)])
def test_a_training_that_mirrors_sides_is_told_so(small_run, caplog, augmentation, said):
    names = "data.class_names=[background,left atrium,MYO,right atrium]"
    built(*small_run, "model=unet", f"augmentation={augmentation}", names)
    assert ("cannot tell left atrium and right atrium apart by the side" in caplog.text) == said


NAMED = {0: "background", 1: "cavity", 2: "wall"}


@pytest.mark.parametrize(("classes", "label_map"), [
    (["background", "cavity", "wall"], None),
    (["b", "Cavity", "wall"], {0: 0, 1: 1, 2: 2, 9: 0}),
    (["background", "wall", "cavity"], {0: 0, 1: 2, 2: 1}),
    (["background", "inside", "outside"], None),  # other names say nothing
    (["background", "heart"], {0: 0, 1: 1, 2: 1}),
    (["background", "wall"], {0: 0, 1: 0, 2: 1}),
])  # fmt: skip
def test_values_that_become_classes_of_their_name_or_of_new_names_pass(classes, label_map):
    require_named_values(NAMED, classes, label_map=label_map)


@pytest.mark.parametrize(("classes", "label_map", "offered"), [
    (["background", "wall", "cavity"], None, {0: 0, 1: 2, 2: 1}),
    (["background", "cavity", "wall"], {0: 0, 1: 2, 2: 1}, {0: 0, 1: 1, 2: 2}),
    (["background", "wall"], {0: 0, 1: 1, 2: 0}, {0: 0, 1: 0, 2: 1}),
])  # fmt: skip
def test_values_that_would_become_classes_of_another_name_are_refused(classes, label_map, offered):
    with pytest.raises(UserError, match="exchanged") as error:
        require_named_values(NAMED, classes, label_map=label_map)
    overrides = shlex.split(str(error.value).rpartition(" by name: ")[2])
    assert composed("data=acdc", *overrides).data.label_map == offered
    require_named_values(NAMED, classes, label_map=offered)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({"left": [2, 4]}, "'left' must be labels from 1 to 3"),
        ({"left": []}, "'left' must be labels"),
        ({"left": [2, 2]}, "each once"),
        ({"left": [True]}, "'left' must be labels"),
        ([1, 2], "give each region its labels"),
        ({"Background": [1]}, "there more than once"),
    ],
)
def test_regions_that_are_none_are_refused(regions, message):
    with pytest.raises(UserError, match=rf"data\.regions.*{message}"):
        structures_of(["background", "RV", "MYO", "LV"], regions)


def test_without_regions_the_classes_are_scored():
    assert structures_of(["background", "RV", "MYO"]) == {"RV": (1,), "MYO": (2,)}
    assert structures_of(["background", "RV", "MYO"], {"a": 2, "b": [2, 1]}) == {
        "a": (2,), "b": (1, 2),
    }  # fmt: skip
