import dataclasses
import importlib
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mambaseg.data.case import Case
from mambaseg.data.readers.nnunet import read
from mambaseg.data.validation import DataError, as_label, checked_label_map
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError

SHAPE = (3, 5, 6)
IMAGE = (3, 1, 5, 6)


def read_zeros(case: Case) -> Volume:
    return Volume(np.zeros(IMAGE, np.float32), np.zeros(SHAPE, np.uint8))


def read_nan(case: Case) -> Volume:
    return Volume(np.full(IMAGE, np.nan, np.float32), None)


def validate(case: Case, volume: Volume, num_classes: int | None = None) -> None:
    """What `Case.read` does with what it has loaded."""
    dataclasses.replace(case, reader=lambda _: volume).read(num_classes)


def make_case(reader=read_zeros, label_path: Path | None = Path("gt.nii.gz")) -> Case:
    return Case("patient007_ED", "patient007", "ED", "DCM", Path("im.nii.gz"), label_path, reader)


def test_a_sound_volume_passes():
    label = np.full(SHAPE, 3, np.uint8)
    validate(make_case(), Volume(np.zeros(IMAGE, np.float32), label), 4)


def test_reading_a_case_validates_it():
    assert make_case().read(4).image.shape == IMAGE
    with pytest.raises(UserError, match=r"im\.nii\.gz: 90 of 90 voxels.*NaN"):
        make_case(read_nan).read()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_not_finite_is_an_error(bad):
    image = np.zeros(IMAGE, np.float32)
    image[1, 0, 2, 3] = bad
    with pytest.raises(UserError, match="1 of 90 voxels"):
        validate(make_case(), Volume(image, None))


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 3, 1, 5, 6)])
def test_an_image_that_is_not_three_dimensional_is_an_error(shape):
    with pytest.raises(UserError, match=rf"shape \({shape[0]}, .*frame"):
        validate(make_case(), Volume(np.zeros(shape, np.float32), None))


def test_an_empty_image_is_an_error():
    with pytest.raises(UserError, match="empty"):
        validate(make_case(), Volume(np.zeros((0, 1, 5, 6), np.float32), None))


def test_image_and_label_of_different_shape_are_an_error_that_names_the_label_file():
    volume = Volume(np.zeros(IMAGE, np.float32), np.zeros((3, 6, 5), np.uint8))
    with pytest.raises(UserError, match=r"gt\.nii\.gz: .*\(3, 6, 5\).*\(3, 5, 6\)"):
        validate(make_case(), volume)


def test_a_label_outside_the_classes_is_an_error_that_names_the_value():
    label = np.zeros(SHAPE, np.uint8)
    label[0, 0, 0] = 7
    volume = Volume(np.zeros(IMAGE, np.float32), label)
    with pytest.raises(UserError, match=r"gt\.nii\.gz: .*value 7 .*; allowed are 0\.\.3") as told:
        validate(make_case(), volume, 4)
    assert f"(in {1 / label.size:.2%} of it)" in str(told.value)
    assert "'data.label_map={0: 0, 7: ?}'" in str(told.value)
    validate(make_case(), volume, 8)
    validate(make_case(), volume)


def test_a_missing_label_is_an_error_only_where_a_label_is_needed():
    volume = Volume(np.zeros(IMAGE, np.float32), None)
    validate(make_case(label_path=None), volume)
    with pytest.raises(UserError, match="has no label"):
        validate(make_case(label_path=None), volume, 4)


def test_whole_numbers_of_any_type_become_uint8_labels():
    for dtype in (np.uint8, np.int16, np.float32, np.float64, np.uint16):
        label = as_label(np.array([0, 1, 2, 3], dtype), Path("gt"))
        assert label.dtype == np.uint8
        assert label.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.0, 1.5], "value 1.5"),
        ([0.0, np.nan], "value nan"),
        ([0.0, np.inf], "value inf"),
        ([-1, 0], "value -1"),
        ([0, 256, 300], "values 256, 300"),
        ([1j], "data type complex128"),
    ],
)
def test_what_is_no_class_number_is_an_error(values, told):
    with pytest.raises(UserError, match=f"^gt: the label .*{told}"):
        as_label(np.array(values), Path("gt"))


def test_sources_name_each_file_once():
    case = make_case()
    assert case.sources() == (Path("im.nii.gz"), Path("gt.nii.gz"))
    assert make_case(label_path=None).sources() == (Path("im.nii.gz"),)
    assert make_case(label_path=case.image_path).sources() == (Path("im.nii.gz"),)


def test_cases_and_their_errors_survive_pickling():
    case = make_case()
    assert pickle.loads(pickle.dumps(case)) == case
    error = DataError("it is broken", Path("a b"), "Mend it.")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a b: it is broken. Mend it."
    assert (copy.problem, copy.path, copy.remedy) == ("it is broken", Path("a b"), "Mend it.")


# ---- labels in another order


def with_labels(values, **options):
    def reader(case):
        label = np.resize(np.array(values, np.uint8), SHAPE)
        return Volume(np.zeros(IMAGE, np.float32), label)

    return dataclasses.replace(make_case(reader), **options)


def test_a_label_map_gives_each_value_its_class():
    case = with_labels([0, 1, 2, 3, 85], label_map=((0, 0), (1, 3), (2, 2), (3, 1), (85, 0)))
    assert case.read(4).label.ravel()[:5].tolist() == [0, 3, 2, 1, 0]
    assert case.read(4).label.dtype == np.uint8


def test_a_value_that_the_map_does_not_name_is_an_error_that_names_it():
    case = with_labels([0, 1, 7], label_map=((0, 0), (1, 1)))
    with pytest.raises(UserError, match=r"gt\.nii\.gz: .*value 7.*label_map.*mapped to 0"):
        case.read(2)


@pytest.mark.parametrize("mapping", [{"1": 0}, {256: 1}, {-1: 1}, {1: 2}, {1: -1}, {1: 0.5}])
def test_a_label_map_that_cannot_be_is_a_clear_error(mapping):
    with pytest.raises(UserError, match=r"data\.label_map"):
        checked_label_map(mapping, num_classes=2)


def test_a_label_map_travels_with_its_case_in_any_order():
    assert checked_label_map({255: 1, 0: 0}, 2) == ((0, 0), (255, 1))
    assert checked_label_map(None, 2) is None


def test_the_recipe_names_reader_keywords_and_label_map_and_no_address():
    plain, mapped = make_case(), dataclasses.replace(make_case(), label_map=((0, 0),))
    axis = dataclasses.replace(plain, reader=partial(read_zeros, axis=1))
    assert plain.recipe == make_case().recipe
    assert len({plain.recipe, mapped.recipe, axis.recipe}) == 3
    assert "read_zeros" in axis.recipe and "axis" in axis.recipe and " at 0x" not in axis.recipe


def test_a_reader_of_ones_own_is_known_by_its_file_and_ours_by_its_name(tmp_path, monkeypatch):
    """Else the decoded cache of a reader with a fault would outlive its mending."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    recipes, file = [], tmp_path / "hers.py"
    for value in (1, 2, 2):
        file.write_text(f"value = {value}\n\n\ndef read(case):\n    return value\n")
        sys.modules.pop("hers", None)
        importlib.invalidate_caches()
        module = importlib.import_module("hers")
        recipes.append(make_case(module.read).recipe)
        file.write_text("this is not what was imported")
        assert make_case(module.read).recipe == recipes[-1]
    sys.modules.pop("hers")
    assert recipes[0] != recipes[1] == recipes[2]
    assert recipes[0].startswith("hers.read [] None None True stored ")
    assert make_case(read).recipe == "mambaseg.data.readers.nnunet.read [] None None True stored"


def test_all_channels_are_sources():
    case = dataclasses.replace(make_case(), more_images=(Path("t2.nii.gz"),))
    assert case.sources() == (Path("im.nii.gz"), Path("t2.nii.gz"), Path("gt.nii.gz"))
