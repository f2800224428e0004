"""Pictures with masks: which belong together, what their numbers mean, and what is refused."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.ndimage import minimum_filter

from mambaseg.data.check import check_dataset
from mambaseg.data.check.proposal import propose
from mambaseg.data.datamodule import SegmentationDataModule
from mambaseg.data.formats.pictures import read_pixels, reduced, reduced_labels
from mambaseg.data.readers.folder import find_cases
from mambaseg.data.readers.unlabelled import find_unlabelled
from mambaseg.errors import UserError
from tiny_pictures import (
    LAYOUTS,
    SIZE,
    blob,
    mask,
    save,
    write_busi,
    write_glas,
    write_nuclei,
    write_parts,
    write_parts_inside,
    write_two_folders,
)


def load(root, cache, **options):
    """What training does before its first step."""
    reading = {key: options.pop(key) for key in ("masks", "longest_side") if key in options}
    channels = options.setdefault("in_channels", 3)
    data = SegmentationDataModule(
        name="folder",
        find_cases=partial(find_cases, channels=channels, num_classes=2, **reading),
        root=root,
        cache_dir=cache,
        class_names=["background", "foreground"],
        num_classes=2,
        split="auto",
        preprocessing="modern",
        window=(0, 255),
        size=16,
        batch_size=2,
        steps=1,
        longest_side=reading.get("longest_side"),
        **options,
    )
    data.load()
    return data


# ---- layouts


@pytest.mark.parametrize(("write", "ids"), [
    (write_two_folders, ["a0", "a1", "a2", "a3"]),
    (write_parts, ["test-a0", "test-a1", "train-a0", "train-a1", "train-a2", "val-a0"]),
    (write_parts_inside, ["test-a0", "test-a1", "train-a0", "train-a1", "train-a2"]),
    (write_busi, ["benign (1)", "benign (2)", "malignant (1)", "normal (1)"]),
    (write_glas, ["testA_1", "testB_1", "train_1", "train_2", "train_3"]),
    (write_nuclei, ["f0c0", "f1c1", "f2c2", "f3c3"]),
])  # fmt: skip
def test_images_find_their_masks_in_every_layout(write, ids, tmp_path):
    cases = find_cases(write(tmp_path), masks="instances")
    assert [case.id for case in cases] == [case.patient for case in cases] == ids
    for case in cases:
        volume = case.read(2, 3)
        assert volume.image.shape == (1, 3, *SIZE) and volume.label.shape == (1, *SIZE)
        expected = 0 if case.id.startswith("normal") else 1
        assert volume.label.max() == expected and case.phase is None
        inside = volume.image[0, 0][volume.label[0] == 1]
        assert expected == 0 or inside.mean() > 150  # the disc is the reddest there is


def test_parts_come_from_folders_or_from_names(tmp_path):
    parts = {case.id: case.part for case in find_cases(write_parts(tmp_path / "a"))}
    assert parts == {
        "train-a0": "train", "train-a1": "train", "train-a2": "train",
        "val-a0": "val", "test-a0": "test", "test-a1": "test",
    }  # fmt: skip
    names = [c.part for c in find_cases(write_glas(tmp_path / "b"), masks="instances")]
    assert names == ["test", "test", "train", "train", "train"]
    assert {c.part for c in find_cases(write_two_folders(tmp_path / "c"))} == {None}


def test_patients_are_found_by_a_pattern_and_belong_in_one_part(tmp_path):
    pattern = r"\((\d)\)"
    cases = find_cases(write_busi(tmp_path / "a"), patient_pattern=pattern)
    assert [case.patient for case in cases] == ["1", "2", "1", "1"]
    with pytest.raises(UserError, match=r"a0 is in train and in test\."):
        find_cases(write_parts(tmp_path / "b"), patient_pattern=r"a\d")


def test_the_split_is_the_folders_where_they_say_it(tmp_path):
    given = load(write_parts(tmp_path / "a"), tmp_path / "cache").split
    assert given.name == "given" and given.test == ("test-a0", "test-a1")
    drawn = load(write_two_folders(tmp_path / "b"), tmp_path / "cache").split
    assert drawn.name == "random-seed0"


def test_a_class_folder_is_the_group_and_all_masks_of_an_image_are_joined(tmp_path):
    cases = {case.id: case for case in find_cases(write_busi(tmp_path))}
    assert cases["malignant (1)"].group == "malignant"
    two = cases["benign (2)"]
    assert [path.name for path in two.sources()] == [
        "benign (2).png", "benign (2)_mask.png", "benign (2)_mask_1.png",
    ]  # fmt: skip
    assert np.array_equal(two.read(2, 3).label[0], blob(2)[1])


def test_nuclei_are_joined(tmp_path):
    for number, case in enumerate(find_cases(write_nuclei(tmp_path))):
        assert np.array_equal(case.read(2, 3).label[0], blob(number)[1]) and case.group is None


def test_a_part_without_masks_is_left_out_and_said(tmp_path, caplog):
    write_two_folders(tmp_path / "train")
    save(tmp_path / "test" / "images" / "x.png", blob(0)[0])
    cases = find_cases(tmp_path)
    assert len(cases) == 4 and "test holds no images with masks" in caplog.text
    assert load(tmp_path, tmp_path / "cache").split.name == "random-seed0"


def test_a_folder_of_data_sets_is_none_and_told_where_they_are(tmp_path):
    for name in "ab":
        write_two_folders(tmp_path / name)
    with pytest.raises(UserError, match=f"Did you mean {tmp_path / 'a'}?"):
        find_cases(tmp_path)
    (error,) = check_dataset(tmp_path).of("error")
    assert f"such as {tmp_path / 'a'}." in error.remedy and "2 data sets" in error.problem


def test_names_that_begin_alike_hidden_files_and_empty_folders_confuse_nothing(tmp_path):
    for number, name in enumerate(("1", "10", "11", "1_1", "a.b.c")):
        pixels, disc = blob(number)
        save(tmp_path / "images" / f"{name}.jpg", pixels)
        save(tmp_path / "masks" / f"{name}_mask.png", mask(disc))
    for folder in ("images", "masks"):
        (tmp_path / folder / "1").mkdir()
        (tmp_path / folder / "._10.png").write_bytes(b"Mac OS X")
    found = {case.id: (case.image_path.stem, case.label_path.stem) for case in find_cases(tmp_path)}
    assert found == {name: (name, f"{name}_mask") for name in ("1", "10", "11", "1_1", "a.b.c")}


# ---- what the numbers of a mask mean


def one(root, numbers, *, ending=".png", size=SIZE, **options):
    """The label of the only image of a data set whose mask holds `numbers`."""
    save(root / "images" / "a.png", blob(0, size)[0])
    picture = numbers if isinstance(numbers, Image.Image) else Image.fromarray(numbers)
    (root / "masks").mkdir(exist_ok=True)
    picture.save(root / "masks" / f"a{ending}")
    options = {"num_classes": 2, **options}
    (case,) = find_cases(root, **options)
    return case.read(options["num_classes"], 3).label[0]


DISC = blob(0)[1]


@pytest.mark.parametrize("numbers", [
    mask(DISC),
    DISC.astype(np.uint8),
    DISC,
    mask(DISC).astype(np.uint16) * 257,
    np.repeat(mask(DISC)[..., None], 3, axis=2),
    np.concatenate([np.repeat(mask(DISC)[..., None], 3, 2), np.full((*SIZE, 1), 255, np.uint8)], 2),
], ids=["0/255", "0/1", "1 bit", "16 bit", "rgb", "rgba"])  # fmt: skip
def test_a_binary_mask_of_any_kind_is_foreground_where_it_is_white(numbers, tmp_path):
    assert np.array_equal(one(tmp_path, numbers), DISC)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_mask_that_jpeg_has_blurred_is_divided_at_half(mode, tmp_path):
    label = one(tmp_path, Image.fromarray(mask(DISC)).convert(mode), ending=".jpg")
    with Image.open(tmp_path / "masks" / "a.jpg") as picture:
        stored = np.asarray(picture.convert("L"))
    assert len(np.unique(stored)) > 2
    assert np.array_equal(label, stored > 127) and (label == DISC).mean() > 0.99


def test_a_softened_border_is_divided_at_half(tmp_path):
    soft = np.asarray(Image.fromarray(mask(DISC)).resize((SIZE[1] * 2, SIZE[0] * 2)).resize(
        (SIZE[1], SIZE[0]), Image.Resampling.BILINEAR))  # fmt: skip
    assert len(np.unique(soft)) > 2
    assert np.array_equal(one(tmp_path, soft), soft > 127)


def test_noise_of_jpeg_saved_as_png_and_a_few_odd_pixels_are_divided_at_half(tmp_path):
    Image.fromarray(mask(DISC)).save(tmp_path / "noisy.jpg", quality=60)
    with Image.open(tmp_path / "noisy.jpg") as picture:
        noisy = np.asarray(picture).copy()
    assert len(np.unique(noisy)) > 16
    assert np.array_equal(one(tmp_path / "a", noisy), noisy > 127)
    halved = np.asarray(Image.fromarray(mask(DISC)).reduce(2)).repeat(2, 0).repeat(2, 1)
    assert set(np.unique(halved)) - {0, 255}  # blocks of 2 × 2 along the border
    assert np.array_equal(one(tmp_path / "b", halved), halved > 127)
    odd = mask(DISC)
    odd[0, :3], odd[1, :3] = (1, 2, 254), 254
    assert np.array_equal(one(tmp_path / "c", odd), odd > 127)


def test_an_empty_mask_is_background(tmp_path):
    assert not one(tmp_path, np.zeros(SIZE, np.uint8)).any()
    noise = np.random.default_rng(0).integers(0, 6, SIZE).astype(np.uint8)
    assert not one(tmp_path / "jpeg", noise, ending=".jpg").any()


GREYS = np.repeat(np.array([0, 85, 170, 255], np.uint8), SIZE[1] // 4)[None].repeat(SIZE[0], 0)


WITH_MARGIN = mask(DISC)  # as Pascal VOC has it: the object is 1, 255 its margin
WITH_MARGIN[minimum_filter(DISC, 3)] = 1
SMALL_CLASS = mask(DISC)
SMALL_CLASS[:9, :8] = 85  # 3 % of the mask
TINY_CLASS = mask(DISC)
TINY_CLASS[:4, :9] = 2


@pytest.mark.parametrize(
    "numbers",
    [GREYS // 85, GREYS, DISC.astype(np.uint8) * 17, WITH_MARGIN, SMALL_CLASS, TINY_CLASS],
    ids=["0..3", "greys", "17", "margin", "small class", "tiny class"],
)
def test_numbers_of_classes_or_objects_are_never_taken_for_black_and_white(numbers, tmp_path):
    with pytest.raises(UserError, match=r"a\.png: .*not black and white.*data\.masks=instances"):
        one(tmp_path, numbers)
    assert np.array_equal(one(tmp_path, numbers, masks="instances"), numbers > 0)


def test_numbers_of_classes_are_taken_as_they_are_or_mapped(tmp_path):
    classes = GREYS // 85
    assert np.array_equal(one(tmp_path, classes, num_classes=4), classes)
    palette = Image.fromarray(classes).convert("P")
    palette.putdata(classes.ravel().tolist())
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    assert np.array_equal(one(tmp_path, palette, num_classes=4), classes)
    with pytest.raises(UserError, match=r"holds values 85, 170, 255 .*; allowed"):
        one(tmp_path, GREYS, num_classes=4)
    save(tmp_path / "masks" / "a.png", GREYS)
    options = {"label_map": {0: 0, 85: 1, 170: 2, 255: 3}, "num_classes": 4}
    data = load_mapped(tmp_path, options)
    assert np.array_equal(data.label[0], classes)


def load_mapped(root, options):
    from dataclasses import replace

    from mambaseg.data.validation import checked_label_map

    (case,) = find_cases(root, **options)
    mapping = checked_label_map(options["label_map"], options["num_classes"])
    return replace(case, label_map=mapping).read(options["num_classes"], 3)


def test_several_masks_of_classes_are_not_joined(tmp_path):
    case = {c.id: c for c in find_cases(write_busi(tmp_path), masks="classes")}["benign (2)"]
    with pytest.raises(UserError, match="one of 2 masks"):
        case.read(2, 3)


# ---- colours, bits, orientation, size


def test_grey_is_repeated_for_three_channels_and_colour_is_refused_for_one(tmp_path):
    write_two_folders(tmp_path, 1)
    save(tmp_path / "images" / "a0.jpg", blob(0)[0][..., 0], quality=95)
    grey = find_cases(tmp_path)[0].read(2, 3).image
    assert grey.shape == (1, 3, *SIZE) and (grey == grey[:, :1]).all()
    (case,) = find_cases(tmp_path, channels=1)
    assert np.array_equal(case.read(2, 1).image[:, 0], grey[:, 0])
    save(tmp_path / "images" / "a0.jpg", blob(0)[0])
    with pytest.raises(UserError, match=r"a0\.jpg: the picture has colours.*in_channels=3"):
        case.read(2, 1)


def test_sixteen_bits_and_eight_are_on_one_scale(tmp_path):
    grey = blob(0)[0][..., 0]
    eight = read_pixels(save(tmp_path / "a.png", grey))
    sixteen = read_pixels(save(tmp_path / "b.png", grey.astype(np.uint16) * 257))
    assert np.array_equal(eight, sixteen) and eight.max() > 150


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_turned_by_exif_is_read_as_it_is_shown(orientation, tmp_path):
    from PIL import ImageOps

    pixels, disc = blob(0)
    exif = Image.Exif()
    exif[274] = orientation
    place = save(tmp_path / "images" / "a.jpg", pixels, exif=exif, quality=95)
    with Image.open(place) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(read_pixels(place, 3), shown.transpose(2, 0, 1))
    save(tmp_path / "masks" / "a.png", mask(disc))  # as stored
    (case,) = find_cases(tmp_path)
    if orientation < 5:  # the same shape: cannot be told
        case.read(2, 3)
    else:
        with pytest.raises(UserError, match=r"a\.png: .*turned by its EXIF orientation"):
            case.read(2, 3)
        save(tmp_path / "masks" / "a.png", mask(disc.T))
        assert case.read(2, 3).image.shape == (1, 3, SIZE[1], SIZE[0])


def test_larger_images_are_reduced_with_their_masks(tmp_path):
    pixels, disc = blob(3, (120, 90))
    save(tmp_path / "images" / "a.png", pixels)
    save(tmp_path / "masks" / "a.png", mask(disc))
    (case,) = find_cases(tmp_path, longest_side=40)
    volume = case.read(2, 3)
    assert volume.image.shape == (1, 3, 40, 30) and volume.label.shape == (1, 40, 30)
    # a third: each pixel of the label is the centre of nine
    assert np.array_equal(volume.label[0], disc[1::3, 1::3])
    centre = pixels.reshape(40, 3, 30, 3, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(volume.image[0] - centre)[:, 2:-2, 2:-2].mean() < 5
    (native,) = find_cases(tmp_path, longest_side=120)
    assert np.array_equal(native.read(2, 3).image[0], pixels.transpose(2, 0, 1))
    assert case.recipe != native.recipe


def test_reduced_images_and_labels_lie_on_one_grid():
    ramp = np.tile(np.arange(200, dtype=np.float32), (100, 1))
    small, labels = reduced(ramp, 64), reduced_labels(ramp.astype(np.uint8), 64)
    assert small.shape == labels.shape == (32, 64)
    assert np.abs(small - labels)[:, 2:-2].max() < 1.6  # half of 200 / 64


# ---- what is refused


def broken(name, content):
    def harm(root):
        (root / name).write_bytes(content((root / name).read_bytes()))

    return harm


def pipe(root):
    (root / "masks" / "a1.png").unlink()
    os.mkfifo(root / "masks" / "a1.png")


def coloured_mask(root):
    save(root / "masks" / "a1.png", blob(1)[0])


def transparent(root):
    pixels = np.dstack([blob(1)[0], np.full(SIZE, 9, np.uint8)])
    (root / "images" / "a1.jpg").unlink()
    save(root / "images" / "a1.png", pixels)


def of_other_size(root):
    save(root / "masks" / "a1.png", mask(blob(1, (50, 60))[1]))


def save_as_tiff(root, numbers):
    (root / "masks" / "a1.png").unlink()
    save(root / "masks" / "a1.tif", numbers)


def negative(root):
    """White on black as `Image.quantize` stores it: index 0 is white."""
    picture = Image.fromarray(mask(DISC)).quantize(2)
    picture.putdata([1 - one for one in (np.ravel(DISC) * 1).tolist()])
    picture.putpalette([255] * 3 + [0] * 3)
    picture.save(root / "masks" / "a1.png")


HARMS = {
    "a truncated image": (broken("images/a1.jpg", lambda data: data[:-300]), "a1.jpg", "again"),
    "a truncated mask": (broken("masks/a1.png", lambda data: data[:40]), "a1.png", "again"),
    "text for an image": (broken("images/a1.jpg", lambda _: b"%!PS"), "a1.jpg", "readable"),
    "an empty file": (broken("masks/a1.png", lambda _: b""), "a1.png", "empty"),
    "a flipped bit": (
        broken("masks/a1.png", lambda d: d[:60] + bytes([d[60] ^ 8]) + d[61:]), "a1.png", "again",
    ),
    "no mask": (lambda root: (root / "masks" / "a1.png").unlink(), "a1.jpg", "has no mask"),
    "two images of a name": (
        lambda root: save(root / "images" / "a1.png", blob(1)[0]), "a1.png", "a1.jpg too",
    ),
    "two masks": (
        lambda root: save(root / "masks" / "a1_mask.png", mask(DISC)), "a1_mask.png", "numbered",
    ),
    "a mask in colours": (coloured_mask, "a1.png", "grey values"),
    "a transparent image": (transparent, "a1.png", "alpha channel"),
    "a mask of another size": (of_other_size, "a1.png", "60 × 50 pixels.*56 × 40"),
    "a mask of negative numbers": (
        lambda root: save_as_tiff(root, -DISC.astype(np.int32)), "a1.tif", "holds the number -1",
    ),
    "a palette of a negative": (negative, "a1.png", "shows 0 brighter"),
    "a pipe": (pipe, "a1.png", "a pipe"),
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HARMS)
def test_a_damaged_data_set_is_refused_with_file_and_remedy(name, tmp_path):
    harm, file, says = HARMS[name]
    root = write_two_folders(tmp_path / "data")
    harm(root)
    with pytest.raises(UserError, match=says) as refused:
        load(root, tmp_path / "cache")
    assert file in str(refused.value)
    assert not list((tmp_path / "cache").rglob("*.npy"))
    errors = [f"{p.where}: {p.problem} {p.remedy}" for p in check_dataset(root).of("error")]
    assert len(errors) == 1 and file in errors[0]


@pytest.mark.parametrize("options", [{"masks": "grey"}, {"longest_side": 0}], ids=str)
def test_an_option_that_cannot_be_is_said(options, tmp_path):
    with pytest.raises(UserError, match=rf"data\.{next(iter(options))}\b"):
        load(write_two_folders(tmp_path / "data"), tmp_path / "cache", **options)


@pytest.mark.parametrize("make", [lambda root: None, lambda root: root.mkdir(),
                                  lambda root: save(root / "a.png", blob(0)[0])])  # fmt: skip
def test_a_folder_without_masks_says_what_is_expected(make, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(UserError, match="images/ and masks/"):
        find_cases(tmp_path / "data")


def test_an_empty_images_folder_is_said(tmp_path):
    write_two_folders(tmp_path, 1)
    (tmp_path / "images" / "a0.jpg").unlink()
    with pytest.raises(UserError, match="masks: holds masks without images"):
        find_cases(tmp_path)


# ---- data-check


def test_data_check_tells_numbers_of_classes_from_black_and_white(tmp_path):
    """Also where some masks hold the first and the last number only."""
    write_two_folders(tmp_path)
    save(tmp_path / "masks" / "a2.png", np.resize(np.uint8([0, 128, 255]), SIZE))
    values = np.array([one.label_counts for one in check_dataset(tmp_path).examined]).sum(0)
    assert np.flatnonzero(values).tolist() == [0, 128, 255]


def test_data_check_proposes_how_masks_of_objects_are_read(tmp_path):
    """One file per object, none of them black and white."""
    for number in range(4):
        pixels, disc = blob(number)
        save(tmp_path / f"n{number}" / "images" / f"n{number}.png", pixels)
        for index, half in enumerate((np.s_[:, :28], np.s_[:, 28:])):
            one = np.zeros(SIZE, np.uint8)
            one[half] = disc[half] * (7 + index)
            save(tmp_path / f"n{number}" / "masks" / f"m{index}.png", one)
    report = check_dataset(tmp_path)
    assert report.ok and "masks: instances" in propose(report, "own", memory=(2**30, ""))


def test_data_check_tells_of_images_that_are_flat_in_the_window(tmp_path):
    write_two_folders(tmp_path)
    (tmp_path / "images" / "a1.jpg").unlink()
    save(tmp_path / "images" / "a1.tif", blob(1)[0][..., 0].astype(np.float32) / 255)
    (warning,) = [one for one in check_dataset(tmp_path).of("warning") if "flat" not in one.where]
    assert warning.where == "a1"
    assert warning.problem == "1 image with less than 13% of data.window=[0, 255]"
    assert "window" not in propose(check_dataset(tmp_path), "own", memory=(2**30, ""))


def test_twelve_bits_in_sixteen_are_told_and_proposed_with_their_own_range(tmp_path):
    for number in range(3):
        image = (blob(number)[0][..., 0].astype(np.uint16) * 16).clip(0, 4095)
        save(tmp_path / "images" / f"a{number}.png", image)
        save(tmp_path / "masks" / f"a{number}.png", mask(DISC))
    report = check_dataset(tmp_path)
    (warning,) = [one for one in report.of("warning") if "window" in one.problem]
    assert warning.where == "all" and warning.problem.startswith("3 images with less than 13%")
    config = yaml.safe_load(propose(report, "own", memory=(2**30, "")))
    assert config["window"] is None and config["in_channels"] == 1  # all are grey
    assert config["class_names"] == ["background", "foreground"]


def test_a_file_of_a_number_is_named_after_its_folder_of_another_number(tmp_path):
    files = [f"{place}/{number}.png" for place in (1, 2, 10) for number in (1, 2, 10)]
    for name in files:
        save(tmp_path / name, blob(0)[0])
        save((tmp_path / name).with_stem(f"{Path(name).stem}_mask"), mask(DISC))
    ids = {case.id for case in find_cases(tmp_path)}
    assert len(ids) == 9 and {"1", "1-2", "1-10", "10-1", "10"} <= ids


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_check_recognises_every_layout_and_finds_nothing_wrong(layout, tmp_path):
    report = check_dataset(LAYOUTS[layout](tmp_path / "data"))
    assert report.layout.name == "folder" and report.ok and report.cases >= 4, report.problems
    said = [one for one in report.of("info") if one.where == "masks"]
    assert bool(said) == (layout == "glas")


def in_two_folders(root, *names, images="images", masks="masks"):
    """Black pictures."""
    for name in names:
        for kind in (images, masks):
            save(root / kind / f"{name}.png", np.zeros(SIZE, np.uint8))
    return root


@pytest.mark.parametrize("places", [("test/images", "test/masks"), ("images/test", "masks/test")])
def test_a_part_beside_images_of_no_part_is_not_left_out_in_silence(places, tmp_path, caplog):
    in_two_folders(tmp_path, "a", "b", "c")
    in_two_folders(tmp_path, "x", "y", images=places[0], masks=places[1])
    assert len(find_cases(tmp_path)) == 3
    said = "test: 2 images with masks, not used: others lie in no part"
    assert said in caplog.text and said in [
        f"{one.where}: {one.problem}" for one in check_dataset(tmp_path).of("warning")
    ]
    for kind in ("images", "masks"):  # what the remedy says
        (tmp_path / "train").mkdir(exist_ok=True)
        for path in (tmp_path / kind).glob("*.png"):
            (tmp_path / "train" / kind).mkdir(exist_ok=True)
            path.rename(tmp_path / "train" / kind / path.name)
    assert len(find_cases(tmp_path)) == 5


def test_images_to_predict_beside_images_of_no_part_need_no_word(tmp_path, caplog):
    in_two_folders(tmp_path, "a", "b", "c")
    save(tmp_path / "test" / "images" / "x.png", np.zeros(SIZE, np.uint8))
    assert len(find_cases(tmp_path)) == 3 and not caplog.text


def test_files_beside_the_case_of_a_folder_are_told(tmp_path, caplog):
    in_two_folders(tmp_path / "g", "a")
    for name in ("b", "b_mask"):
        save(tmp_path / "g" / f"{name}.png", np.zeros(SIZE, np.uint8))
    assert [case.id for case in find_cases(tmp_path)] == ["a"]
    assert "g/b.png, g/b_mask.png: 2 files beside the cases, not used" in caplog.text


def test_unlabelled_frames_are_no_channels_where_the_data_set_has_one_file_per_image(tmp_path):
    for number in range(3):
        save(tmp_path / f"video_{number:04d}.png", np.full((8, 9), 40 * number, np.uint8))
    cases = find_unlabelled(tmp_path, channels=3, longest_side=512)
    assert [case.id for case in cases] == [f"unlabelled/video_{n:04d}" for n in range(3)]
    for number, case in enumerate(cases):
        assert (case.load().image == 40 * number).all()
    (case,) = find_unlabelled(tmp_path, channels=3, longest_side=None)
    assert case.id == "unlabelled/video" and len(case.sources()) == 3
