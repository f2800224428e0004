import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary as medpy
from scipy.ndimage import distance_transform_edt

from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import BUILT_IN, _confusion_matrix, score_case
from mambaseg.evaluation.summary import summarise
from mambaseg.evaluation.surface import border, surface_distances

ORACLE = {
    "dice": medpy.dc,
    "iou": medpy.jc,
    "precision": medpy.precision,
    "sensitivity": medpy.sensitivity,
    "specificity": medpy.specificity,
}
SURFACE_ORACLE = {"hd95": medpy.hd95, "hd": medpy.hd, "asd": medpy.asd, "assd": medpy.assd}

NAMES = [metric.name for metric in BUILT_IN]


def by_medpy(oracle, prediction, reference, spacing=(1.0, 1.0, 1.0)):
    """What medpy says of two volumes, or of two pictures in place of volumes of one slice."""
    if 1 in prediction.shape:
        across = prediction.shape.index(1)
        prediction, reference = (np.squeeze(mask, across) for mask in (prediction, reference))
        spacing = np.delete(spacing, across).tolist()
    return oracle(prediction, reference, spacing)


def one_class(prediction, reference, **options):
    """The row of class 1 of two binary volumes."""
    options = {"num_classes": 2, **options}
    return score_case(prediction.astype(np.uint8), reference.astype(np.uint8), **options)[1]


def blob(rng, shape):
    """A non-empty mask: a single voxel, noise, a box that may touch the ends, or an ellipsoid."""
    mask = np.zeros(shape, bool)
    kind = rng.integers(4)
    if kind == 0:
        mask[tuple(rng.integers(shape))] = True
    elif kind == 1:
        mask = rng.random(shape) < rng.uniform(0.05, 0.95)
    elif kind == 2:
        ends = [np.sort(rng.integers(0, size + 1, 2)) for size in shape]
        mask[tuple(slice(low, high + 1) for low, high in ends)] = True
    else:
        grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
        centre, radii = rng.uniform(0, shape), rng.uniform(0.5, 1 + np.asarray(shape) / 2)
        mask = (((grid - centre) / radii) ** 2).sum(-1) <= 1
    mask[tuple(rng.integers(shape))] = True
    return mask


blobs = st.builds(
    lambda seed, shape: (
        blob(np.random.default_rng(seed), shape),
        blob(np.random.default_rng(seed + 1), shape),
    ),
    st.integers(0, 2**32),
    st.tuples(st.integers(1, 7), st.integers(1, 24), st.integers(1, 24)),
)
spacings = st.tuples(*[st.floats(0.3, 12).map(lambda value: round(value, 3))] * 3)


@settings(max_examples=200, deadline=None)
@given(blobs, spacings)
def test_scores_equal_medpy_on_any_two_blobs(pair, spacing):
    prediction, reference = pair
    row = one_class(prediction, reference, spacing=spacing)
    for name, oracle in ORACLE.items():
        if name == "specificity" and reference.all():
            assert row[name] is None  # medpy says 0 for 0 / 0
            continue
        assert row[name] == pytest.approx(oracle(prediction, reference)), name
    for name, oracle in SURFACE_ORACLE.items():
        assert row[f"{name}_vox"] == pytest.approx(by_medpy(oracle, prediction, reference)), name
        expected = by_medpy(oracle, prediction, reference, spacing)
        assert row[f"{name}_mm"] == pytest.approx(expected), name


def emptied(pair, which):
    return tuple(mask & (keep == "1") for mask, keep in zip(pair, which, strict=True))


@settings(max_examples=60)
@given(blobs, spacings, st.sampled_from(["00", "01", "10"]))
def test_empty_masks_score_zero_as_by_medpy_or_nothing_where_it_fails(pair, spacing, which):
    prediction, reference = emptied(pair, which)
    strict = one_class(prediction, reference, spacing=spacing)
    for name in ("dice", "iou", "precision", "sensitivity"):
        if which == "00":  # medpy has NaN for Dice and 1 for IoU
            assert strict[name] is None, name
            continue
        with np.errstate(invalid="ignore"):
            expected = ORACLE[name](prediction, reference)
        # Where nothing is predicted medpy's precision is 0 / 0; our policy calls it a miss.
        assert strict[name] == np.nan_to_num(expected) == 0, name
    if not reference.all():
        assert strict["specificity"] == pytest.approx(medpy.specificity(prediction, reference))
    for name, oracle in SURFACE_ORACLE.items():
        with pytest.raises(RuntimeError):
            oracle(prediction, reference)
        assert strict[f"{name}_vox"] is None and strict[f"{name}_mm"] is None
    assert strict["voxels"] == prediction.sum()
    assert strict["reference_voxels"] == reference.sum()


@settings(max_examples=60)
@given(blobs, spacings)
def test_symmetric_scores_stay_when_prediction_and_reference_change_places(pair, spacing):
    there, back = (one_class(*masks, spacing=spacing) for masks in (pair, pair[::-1]))
    for name in ("dice", "iou", "accuracy", "hd95_mm", "hd_mm", "assd_mm", "nsd_mm", "hd95_vox"):
        assert there[name] == pytest.approx(back[name]), name
    assert there["precision"] == back["sensitivity"]


@settings(max_examples=60, deadline=None)
@given(blobs, spacings, st.floats(0, 8))
def test_surface_dice_equals_its_definition_on_medpys_distances(pair, spacing, tolerance):
    from medpy.metric.binary import __surface_distances as distances

    prediction, reference = pair
    there = by_medpy(distances, prediction, reference, spacing)
    back = by_medpy(distances, reference, prediction, spacing)
    within = tolerance * (1 + 1e-6)  # what a header's rounding explains
    expected = ((there <= within).sum() + (back <= within).sum()) / (len(there) + len(back))
    row = one_class(prediction, reference, spacing=spacing, tolerance_mm=tolerance)
    assert row["nsd_mm"] == pytest.approx(expected)


def by_transform(start, goal, spacing):
    """Distances as a distance transform of the whole volume has them."""
    nearest = distance_transform_edt(
        ~goal, sampling=spacing, return_distances=False, return_indices=True
    )
    away = (nearest - np.indices(start.shape))[:, start] * np.asarray(spacing)[:, None]
    return np.sqrt(np.add.reduce(away * away))


@settings(max_examples=100, deadline=None)
@given(blobs, st.sampled_from([(10.0, 1.5625, 1.5625), (5.0, 1.25, 1.25), (0.5, 4.0, 1.0)]))
def test_distances_are_those_of_a_distance_transform_to_the_last_bit(pair, spacing):
    """Of spacings whose squares are exact; with others the last bit may tell equal ways apart."""
    voxels = (1.0, 1.0, 1.0)
    found = surface_distances(*pair, [voxels, spacing])
    ours, theirs = (border(mask, (1, 2) if len(mask) == 1 else (0, 1, 2)) for mask in pair)
    for unit, distances in zip((voxels, spacing), found, strict=True):
        assert np.array_equal(distances.to_reference, by_transform(ours, theirs, unit))
        assert np.array_equal(distances.to_prediction, by_transform(theirs, ours, unit))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_every_class_background_included_is_scored_as_medpy_scores_its_mask(seed, num_classes):
    rng = np.random.default_rng(seed)
    prediction, reference = rng.integers(0, num_classes, (2, 3, 5, 6)).astype(np.uint8)
    for row in score_case(prediction, reference, num_classes=num_classes):
        masks = prediction == row["class"], reference == row["class"]
        if row["outcome"] == "scored":
            assert row["dice"] == pytest.approx(medpy.dc(*masks))
            assert row["hd95_vox"] == pytest.approx(medpy.hd95(*masks))
        assert row["accuracy"] == pytest.approx((masks[0] == masks[1]).mean())


def test_a_picture_has_contours_and_a_slice_of_a_volume_has_faces():
    small, large = np.zeros((2, 1, 60, 60), bool)
    small[0, 10:50, 10:50] = large[0, 5:55, 5:55] = True
    row = one_class(small, large, tolerance_vox=1.0)
    assert row["hd95_vox"] == pytest.approx(medpy.hd95(small[0], large[0])) == 34**0.5
    assert row["assd_vox"] == pytest.approx(medpy.assd(small[0], large[0]))
    assert row["nsd_vox"] == 0
    volume = np.concatenate([np.zeros_like(small), small, np.zeros_like(small)])
    assert border(volume).sum() == small.sum() and border(small, (1, 2)).sum() == 4 * 39


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_is_scored_as_such_along_any_axis(axis):
    one, other = (np.zeros((1, 20, 20), np.uint8) for _ in range(2))
    one[0, 4:12, 5:14], other[0, 6:15, 5:12] = 1, 1
    rows = [
        score_case(*(np.moveaxis(mask, 0, place) for mask in (one, other)), num_classes=2,
                   spacing=(2.0, 2.0, 2.0))[1]
        for place in (0, axis)
    ]  # fmt: skip
    assert rows[0] == rows[1] and rows[0]["hd_mm"] > 2


@pytest.mark.parametrize(("side", "pixels"), [(0.4, 5), (0.2, 10), (2 / 3, 3), (0.5, 4)])
def test_a_tolerance_holds_for_the_float32_of_a_header_too(side, pixels):
    truth = np.zeros((1, 40, 40), np.uint8)
    truth[0, 10:20, 10:20] = 1
    moved = np.roll(truth, pixels, axis=2)
    for told in (side, float(np.float32(side))):
        (_, row) = score_case(moved, truth, num_classes=2, spacing=(5.0, told, told))
        assert row["nsd_mm"] == 1.0


def test_slices_labelled_among_others_are_compared_by_their_contours():
    """Their whole cross-sections were surface on both sides: the scores were far too good."""
    reference = np.zeros((12, 40, 40), np.uint8)
    reference[:, 10:30, 10:30] = 1
    prediction, ignored = np.roll(reference, 5, axis=2), np.ones(reference.shape, bool)
    ignored[1::3] = False
    single = one_class(prediction[:1], reference[:1])
    row, _ = score_case(prediction, reference, num_classes=2, ignored=ignored)[::-1]
    for name in ("hd95_vox", "assd_vox", "nsd_vox", "dice"):
        assert row[name] == pytest.approx(single[name], abs=0.05), name
    assert row["nsd_vox"] < 0.6


@settings(max_examples=30, deadline=None)
@given(blobs, st.integers(0, 2**32))
def test_of_unknown_voxels_the_borders_are_those_that_no_label_of_them_can_remove(pair, seed):
    unknown = np.random.default_rng(seed).random(pair[0].shape) < 0.3
    for mask in pair:
        known = mask & ~unknown
        expected = border(known) & border(mask | unknown)
        assert np.array_equal(border(known, unknown=unknown), expected)


def test_a_part_whose_surroundings_are_unknown_has_no_distances():
    labels = np.ones((1, 3, 3), np.uint8)
    ignored = np.ones((1, 5, 5), bool)
    ignored[:, 2, 2] = False
    row = score_case(np.pad(labels, ((0, 0), (1, 1), (1, 1))), np.ones((1, 5, 5), np.uint8),
                     num_classes=2, ignored=ignored)[1]  # fmt: skip
    assert row["dice"] == 1.0 and row["hd95_vox"] is None and row["nsd_vox"] is None


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (10.0, 1.5, 1.5), (0.5, 4.0, 1.0)])
def test_a_background_that_spans_the_volume_and_specks_far_away_equal_medpy(spacing):
    reference = np.zeros((6, 60, 70), np.uint8)
    reference[2:5, 20:35, 20:35] = 1
    prediction = np.zeros_like(reference)
    prediction[2:5, 22:36, 19:35] = 1
    prediction[0, 58, 2] = prediction[5, 1, 69] = 1
    for row in score_case(prediction, reference, num_classes=2, spacing=spacing):
        masks = prediction == row["class"], reference == row["class"]
        for name, oracle in SURFACE_ORACLE.items():
            assert row[f"{name}_mm"] == pytest.approx(oracle(*masks, voxelspacing=spacing)), name
            assert row[f"{name}_vox"] == pytest.approx(oracle(*masks)), name


def test_two_single_voxels_three_pixels_and_one_slice_apart():
    prediction, reference = np.zeros((2, 3, 5, 5), np.uint8)
    prediction[0, 2, 0] = 1
    reference[1, 2, 3] = 1
    row = one_class(prediction, reference, spacing=(4.0, 1.0, 1.0))
    assert row["hd_vox"] == row["hd95_vox"] == row["asd_vox"] == pytest.approx(math.sqrt(10))
    assert row["hd_mm"] == row["assd_mm"] == pytest.approx(5.0)
    assert row["nsd_mm"] == 0 and row["dice"] == 0
    assert row["accuracy"] == pytest.approx(73 / 75)
    assert row["volume_ml"] == pytest.approx(0.004)
    assert row["voxels"] == row["reference_voxels"] == 1


def test_voxels_are_counted_without_a_spacing_too():
    prediction, reference = np.zeros((2, 2, 3, 4), np.uint8)
    prediction[0] = 1
    reference[1, 0, :2] = 1
    row = one_class(prediction, reference)
    assert (row["voxels"], row["reference_voxels"]) == (12, 2)


def test_overlap_of_hand_sized_rows_of_voxels():
    prediction = np.array([1, 1, 1, 0, 0, 0, 0, 0], np.uint8).reshape(1, 1, 8)
    reference = np.array([0, 1, 1, 1, 1, 0, 0, 0], np.uint8).reshape(1, 1, 8)
    row = one_class(prediction, reference)  # TP 2, FP 1, FN 2, TN 3
    assert row["dice"] == pytest.approx(4 / 7)
    assert row["iou"] == pytest.approx(2 / 5)
    assert row["precision"] == pytest.approx(2 / 3)
    assert row["sensitivity"] == pytest.approx(2 / 4)
    assert row["specificity"] == pytest.approx(3 / 4)
    assert row["accuracy"] == pytest.approx(5 / 8)


def test_surface_dice_hd95_and_the_two_mean_distances_of_hand_sized_rows_of_voxels():
    # In a volume one voxel thick every voxel is border. Prediction 0, 1, 2; reference 2, 3, 4, 5:
    # there 2, 1, 0; back 0, 1, 2, 3.
    prediction = np.array([1, 1, 1, 0, 0, 0, 0], np.uint8).reshape(1, 1, 7)
    reference = np.array([0, 0, 1, 1, 1, 1, 0], np.uint8).reshape(1, 1, 7)
    row = one_class(prediction, reference, spacing=(8.0, 1.0, 2.0), tolerance_mm=2.0)
    assert row["nsd_vox"] == pytest.approx(4 / 7)  # tolerance 1 voxel
    assert row["nsd_mm"] == pytest.approx(4 / 7)  # 2 mm are one voxel along x
    assert row["asd_vox"] == pytest.approx(3 / 3)
    assert row["assd_vox"] == pytest.approx(9 / 7)
    assert row["hd_mm"] == 6.0
    assert row["hd95_vox"] == pytest.approx(2.7)  # sorted 0 0 1 1 2 2 3, position 5.7
    loose = one_class(prediction, reference, spacing=(8.0, 1.0, 2.0), tolerance_mm=4.0)
    assert loose["nsd_mm"] == pytest.approx(6 / 7)


def test_the_first_and_last_slice_of_a_mask_are_border_where_the_volume_ends():
    mask = np.zeros((5, 7, 7), np.uint8)
    mask[:, 1:6, 1:6] = 1
    thinner = mask.copy()
    thinner[0] = 0
    # The 25 voxels of slice 0 are border, so is slice 1 of the thinner one: 9 of them inside.
    row = one_class(thinner, mask)
    assert row["assd_vox"] == pytest.approx(medpy.assd(thinner, mask))
    assert row["hd_vox"] == 1.0


def test_an_exact_prediction_has_distance_zero_and_scores_one():
    mask = np.zeros((4, 6, 6), np.uint8)
    mask[1:3, 2:5, 2:5] = 1
    row = one_class(mask, mask, spacing=(8.0, 1.5, 1.5))
    names = [name for name in NAMES if "volume" not in name]
    assert {name: row[name] for name in names} == {
        name: 0.0 if name.startswith(("hd", "as")) else 1.0 for name in names
    }


def test_unknown_spacing_leaves_mm_and_ml_undefined_but_not_voxels():
    mask = np.ones((2, 3, 3), np.uint8)
    mask[0, 0, 0] = 0
    row = one_class(mask, mask)
    undefined = {name for name in NAMES if row[name] is None}
    assert undefined == {name for name in NAMES if name.endswith(("_mm", "_ml"))}


def test_without_surface_the_other_columns_are_the_same():
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 3, (2, 3, 8, 8))
    full = score_case(prediction, reference, num_classes=3, spacing=(2, 1, 1))
    quick = score_case(prediction, reference, num_classes=3, spacing=(2, 1, 1), surface=False)
    for long, short in zip(full, quick, strict=True):
        assert "hd95_vox" in long and "hd95_vox" not in short
        assert short == {key: long[key] for key in short}


# Empty masks ----------------------------------------------------------------------------------

FULL = np.zeros((4, 5, 7), np.uint8)
FULL[1:3, 1:4, 2:5] = 1
NOTHING = np.zeros_like(FULL)
SPACING = (10.0, 2.0, 1.0)
DIAGONAL_VOX, DIAGONAL_MM = math.sqrt(9 + 16 + 36), math.sqrt(900 + 64 + 36)
OUTCOME = {
    "missed": (NOTHING, FULL),
    "false_positive": (FULL, NOTHING),
    "both_empty": (NOTHING, NOTHING),
}


@pytest.mark.parametrize(
    ("policy", "outcome", "overlap", "vox", "mm"),
    [
        ("strict", "missed", 0.0, None, None),
        ("strict", "false_positive", 0.0, None, None),
        ("strict", "both_empty", None, None, None),
        ("penalty", "missed", 0.0, DIAGONAL_VOX, DIAGONAL_MM),
        ("penalty", "false_positive", 0.0, DIAGONAL_VOX, DIAGONAL_MM),
        ("penalty", "both_empty", 1.0, 0.0, 0.0),
        ("legacy", "missed", 0.0, 0.0, 0.0),
        ("legacy", "false_positive", 0.0, None, None),
        ("legacy", "both_empty", 0.0, 0.0, 0.0),
    ],
)
def test_empty_masks_score_as_the_table_of_policies_says(policy, outcome, overlap, vox, mm):
    row = one_class(*OUTCOME[outcome], spacing=SPACING, policy=policy)
    assert row["outcome"] == outcome and row["policy"] == policy
    for name in ("dice", "iou", "precision", "sensitivity", "nsd_vox", "nsd_mm"):
        assert row[name] == overlap, name
    for name in ("hd95", "hd", "asd", "assd"):
        assert row[f"{name}_vox"] == (None if vox is None else pytest.approx(vox)), name
        assert row[f"{name}_mm"] == (None if mm is None else pytest.approx(mm)), name
    assert row["accuracy"] == pytest.approx(1 - (0 if outcome == "both_empty" else 18 / 140))


def released_validation_code(prediction, reference):
    """What the validation code released with Mamba-UNet does with one class: (Dice, HD95)."""
    if prediction.sum() > 0:
        return medpy.dc(prediction, reference), medpy.hd95(prediction, reference)
    return 0, 0


@pytest.mark.parametrize("pair", [(NOTHING, FULL), (NOTHING, NOTHING), (FULL, np.roll(FULL, 1))])
def test_legacy_reproduces_the_released_validation_code(pair):
    row = one_class(*pair, policy="legacy")
    assert (row["dice"], row["hd95_vox"]) == pytest.approx(released_validation_code(*pair))


@pytest.mark.parametrize("policy", ["strict", "penalty", "legacy"])
def test_policies_agree_where_both_masks_have_voxels(policy):
    shifted = np.roll(FULL, 1, axis=2)
    strict = one_class(FULL, shifted, spacing=SPACING)
    assert one_class(FULL, shifted, spacing=SPACING, policy=policy) == strict | {"policy": policy}


@settings(max_examples=50, deadline=None)
@given(blobs, spacings)
def test_no_real_distance_is_larger_than_the_penalty(pair, spacing):
    empty = np.zeros_like(pair[1])
    penalty = one_class(empty, pair[1], spacing=spacing, policy="penalty")
    real = one_class(*pair, spacing=spacing, policy="penalty")
    for name in ("hd_mm", "hd_vox", "assd_mm"):
        assert real[name] <= penalty[name] + 1e-9


# Bad input ------------------------------------------------------------------------------------


def test_confusion_matrix_has_references_in_rows_and_predictions_in_columns():
    prediction, reference = np.array([0, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 2, 2])
    assert _confusion_matrix(prediction, reference, 3).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 2]]


@pytest.mark.parametrize("place", [0, 1])
def test_a_label_that_is_no_class_is_refused_and_not_counted_as_another(place):
    pair = [np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 2), np.uint8)]
    pair[place][0, 0, 0] = 7
    with pytest.raises(UserError, match=r"0 to 7.*0\.\.3"):
        score_case(*pair, num_classes=4)


def test_shapes_that_differ_are_refused():
    with pytest.raises(UserError, match=r"differ in shape.*\(1, 2, 2\).*\(1, 2, 3\)"):
        score_case(np.zeros((1, 2, 2), int), np.zeros((1, 2, 3), int), num_classes=2)


def test_an_unknown_policy_is_refused_with_the_names_that_exist():
    with pytest.raises(UserError, match="strict, penalty, legacy"):
        score_case(NOTHING, FULL, num_classes=2, policy="nanmean")


# Summary --------------------------------------------------------------------------------------

CLASSES = ("background", "RV", "LV")


def row(case, index, dice, outcome="scored", **more):
    phase = case[-2:]
    convention = {"policy": "strict", "tolerance_mm": 2.0, "tolerance_vox": 1.0}
    hd95 = dice * 10 if outcome == "scored" else None
    values = {"dice": dice, "hd95_mm": hd95, "class": index, "outcome": outcome}
    return {"case": case, "phase": phase, **values, **convention, **more}


TABLE = [
    row("a_ED", 0, 0.9), row("a_ED", 1, 0.8), row("a_ED", 2, 0.6),
    row("a_ES", 0, 0.7), row("a_ES", 1, 0.0, "missed"), row("a_ES", 2, 0.8),
    row("b_ED", 0, 0.8), row("b_ED", 1, 0.7), row("b_ED", 2, None, "both_empty"),
]  # fmt: skip


def test_a_small_table_is_summarised_as_by_hand():
    summary = summarise(TABLE, CLASSES)
    assert summary["cases"] == 3
    assert summary["classes"]["RV"]["dice"] == pytest.approx(
        {"mean": 0.5, "median": 0.7, "sd": math.sqrt(0.19), "count": 3}
    )
    assert summary["classes"]["RV"]["hd95_mm"] == pytest.approx(
        {"mean": 7.5, "median": 7.5, "sd": math.sqrt(0.5), "count": 2}
    )
    assert summary["classes"]["LV"]["dice"]["mean"] == pytest.approx(0.7)
    assert summary["classes"]["RV"]["counts"] == {
        "scored": 2, "missed": 1, "false_positive": 0, "both_empty": 0
    }  # fmt: skip
    # means of class means: (0.5 + 0.7) / 2 and (0.8 + 0.5 + 0.7) / 3
    assert summary["foreground"]["dice"] == pytest.approx({"mean": 0.6, "classes": 2, "count": 5})
    assert summary["all"]["dice"] == pytest.approx({"mean": 2 / 3, "classes": 3, "count": 8})
    assert summary["foreground"]["counts"]["missed"] == 1
    assert summary["foreground"]["counts"]["both_empty"] == 1


def test_a_summary_breaks_down_by_phase_and_by_group_where_rows_have_them():
    summary = summarise(TABLE, CLASSES)
    assert "by_group" not in summary
    assert summary["by_phase"]["ED"]["cases"] == 2
    assert summary["by_phase"]["ED"]["classes"]["RV"]["dice"]["mean"] == pytest.approx(0.75)
    # ES has one case, its RV missed: a mean of 0 over one value, an undefined distance, no sd.
    late = summary["by_phase"]["ES"]["classes"]["RV"]
    assert late["dice"] == {"mean": 0.0, "sd": None, "median": 0.0, "count": 1}
    assert late["hd95_mm"] == {"mean": None, "sd": None, "median": None, "count": 0}
    assert summary["by_phase"]["ES"]["foreground"]["hd95_mm"]["classes"] == 1
    # a class whose mean is 0 stays in the average: (0 + 0.8) / 2
    average = summary["by_phase"]["ES"]["foreground"]["dice"]
    assert average == pytest.approx({"mean": 0.4, "classes": 2, "count": 2})
    grouped = summarise([entry | {"group": "DCM"} for entry in TABLE], CLASSES)
    assert grouped["by_group"]["DCM"]["foreground"] == grouped["foreground"]


def test_a_summary_states_its_convention_and_is_plain_json():
    mask = np.zeros((2, 4, 4), np.uint8)
    mask[:, 1:3] = 1
    rows = score_case(mask, mask, num_classes=3, policy="penalty", tolerance_mm=1.5)
    summary = summarise(rows, CLASSES)
    assert summary["convention"]["policy"] == "penalty"
    assert summary["convention"]["tolerance_mm"] == 1.5
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_rows_of_two_conventions_are_not_averaged():
    with pytest.raises(ValueError, match="one convention"):
        summarise([*TABLE, row("c_ED", 0, 0.5, policy="legacy")], CLASSES)


def test_a_missed_structure_is_counted_beside_the_distance_it_leaves_out():
    good, bad = FULL, np.roll(FULL, 2, axis=2)
    rows = one_class(bad, good), one_class(NOTHING, good)
    summary = summarise([entry | {"class": 0} for entry in rows], ["structure"])
    part = summary["classes"]["structure"]
    assert part["hd95_vox"]["count"] == 1 and part["counts"]["missed"] == 1


def test_importing_the_metrics_loads_neither_torch_nor_scipy():
    heavy = "{'torch', 'scipy', 'monai'}"
    code = f"import sys, mambaseg.evaluation.metrics; print({heavy} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "set()", answer.stderr


def test_the_background_leaves_out_what_is_unknown():
    reference = np.zeros((1, 8, 8), np.uint8)
    reference[:, 2:6, 2:6] = 1
    prediction, ignored = np.roll(reference, 1, axis=2), np.zeros((1, 8, 8), bool)
    ignored[:, 6:] = True
    row = score_case(prediction, reference, num_classes=2, ignored=ignored)[0]
    other = score_case(1 - prediction, 1 - reference, num_classes=2, ignored=ignored)[1]
    for name in ("dice", "hd95_vox", "assd_vox", "nsd_vox"):
        assert row[name] == other[name], name


def test_a_region_is_found_whichever_of_its_labels_is_predicted():
    reference = np.array([[[1, 1, 2, 2, 0]]], np.uint8)
    prediction = np.array([[[1, 2, 2, 1, 0]]], np.uint8)
    row = score_case(prediction, reference, num_classes=3, regions=[[1, 2], [2]])[1]
    assert row["dice"] == row["hd95_vox"] + 1 == 1.0
