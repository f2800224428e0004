"""The packed data set: what it keeps, how exact it is, and what becomes of a damaged one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_acdc import write_patient

from mambaseg.data.check import check_dataset
from mambaseg.data.datamodule import SegmentationDataModule
from mambaseg.data.fingerprint import digest_of
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.pack import main, pack, quantise
from mambaseg.data.readers.acdc import find_cases
from mambaseg.data.readers.packed import INDEX
from mambaseg.errors import UserError
from mambaseg.storage.run_folder import file_digest
from payload import armed, claiming_npy, npz, object_npy

CASE = "patient002_ED.npz"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    for number in (1, 2, 3, 4):
        write_patient(root / f"patient00{number}", seed=number)
    return root


@pytest.fixture(scope="module")
def sound(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("packs") / "pack"
    pack(source, out)
    return out


@pytest.fixture
def packed(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "pack"))


def test_a_pack_holds_the_same_cases_labels_and_voxel_sizes(source, sound):
    before, after = find_cases(source), find_cases(sound)
    assert [c.id for c in after] == [c.id for c in before]
    for one, other in zip(before, after, strict=True):
        assert (other.patient, other.phase, other.group) == (one.patient, one.phase, one.group)
        was, now = one.read(4), other.read(4)
        assert np.array_equal(now.label, was.label)
        assert now.spacing == pytest.approx(was.spacing)
        scale = Preprocessing("paper", 8).scale_intensity
        off = np.abs(scale(now.image) - scale(was.image))
        assert off.max() <= 0.5 / 255 + 1e-6
        assert off.max() > 0  # a thousand levels do not fit into 256


def test_the_stated_error_is_the_one_that_is_made(source, sound):
    stated = json.loads((sound / INDEX).read_text())["error"]
    scale = Preprocessing("paper", 8).scale_intensity
    off = np.concatenate([
        np.abs(scale(after.read().image) - scale(before.read().image)).ravel()
        for before, after in zip(find_cases(source), find_cases(sound), strict=True)
    ])  # fmt: skip
    assert stated["max"] == pytest.approx(off.max(), abs=1e-6)
    assert stated["mean"] == pytest.approx(off.mean(), abs=1e-6)


def test_levels_span_the_range_and_a_constant_image_is_zero():
    levels, off = quantise(np.array([[[-5.0, 0.0, 5.0]]], np.float32))
    assert levels.tolist() == [[[0, 128, 255]]] and off.max() <= 0.5 / 255 + 1e-7
    assert not quantise(np.full((1, 2, 2), 7.0, np.float32))[0].any()


def test_the_same_data_make_the_same_bytes(source, sound, tmp_path):
    again = tmp_path / "again"
    pack(source, again)
    names = sorted(path.name for path in sound.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((sound / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_training_and_data_check_read_a_pack(sound, tmp_path):
    data = SegmentationDataModule(
        name="acdc", find_cases=find_cases, root=sound, cache_dir=tmp_path, split="random",
        class_names=["background", "RV", "MYO", "LV"], num_classes=4, size=8, batch_size=2, steps=1,
    )  # fmt: skip
    data.load()
    assert sum(counts["cases"] for counts in data.counts.values()) == 8
    case = data.cases["train"][0]
    image = data.cache.image(data.cache.position(case.id))
    assert image.dtype == np.float32 and (image.min(), image.max()) == (0, 1)
    report = check_dataset(sound)
    assert report.ok and (report.patients, report.cases) == (4, 8)


def test_the_command_says_how_large_and_exact_it_came_out(source, tmp_path, caplog):
    caplog.set_level("INFO")
    main([str(source), str(tmp_path / "out")])
    assert "8 cases" in caplog.text and "off by at most 0.0019" in caplog.text
    with pytest.raises(UserError, match="exists"):
        main([str(source), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing half-made


# ---- damage


def rewrite(folder, change, *, sign=True):
    """Changes the index, with the digest that belongs to it or without."""
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index)
    if sign:
        index["digest"] = digest_of(index["cases"])
    path.write_text(json.dumps(index))


def first(**fields):
    return lambda index: index["cases"][0].update(fields)


def replace(folder, content):
    """Puts other bytes in place of a case, and lets the index know them."""
    (folder / CASE).write_bytes(content)

    def entry(index):
        (one,) = (case for case in index["cases"] if case["id"] == "patient002_ED")
        one["digest"] = file_digest(folder / CASE)

    rewrite(folder, entry)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.update(format="other"), "format is 'other'"),
        (lambda index: index.update(cases=[]), "was changed"),
        (first(id="../../../etc/passwd"), "entry is damaged"),
        (first(id=["patient001_ED"]), "entry is damaged"),
        (first(id="patient002_ED"), "stands in it twice"),
        (first(spacing=[1, 0, 1]), "entry is damaged"),
        (first(spacing="abc"), "entry is damaged"),
        (first(digest=7), "entry is damaged"),
        (first(group={"a": 1}), "entry is damaged"),
        (lambda index: index["cases"][0].pop("group"), "entry is damaged"),
    ],
)
def test_an_index_that_lies_is_refused(packed, change, says):
    rewrite(packed, change)
    with pytest.raises(UserError, match=says) as error:
        find_cases(packed)
    assert INDEX in str(error.value) and "Pack the data again" in str(error.value)


def test_an_index_changed_by_hand_is_refused(packed):
    rewrite(packed, first(group="NOR"), sign=False)
    with pytest.raises(UserError, match="was changed"):
        find_cases(packed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe"])
def test_an_index_that_is_none_is_refused(packed, content):
    (packed / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=INDEX):
        find_cases(packed)


def test_a_case_that_is_missing_cut_or_flipped_is_refused(packed):
    case = next(case for case in find_cases(packed) if case.image_path.name == CASE)
    content = (packed / CASE).read_bytes()
    (packed / CASE).unlink()
    with pytest.raises(UserError, match="missing"):
        case.read(4)
    for damaged in (content[:-9], content[:80] + bytes([content[80] ^ 4]) + content[81:]):
        (packed / CASE).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{CASE}: holds other bytes"):
            case.read(4)
    assert not check_dataset(packed).ok


def test_a_case_with_a_matching_digest_still_cannot_harm(packed, tmp_path):
    payload = armed(tmp_path / "marker")
    volume = claiming_npy((1, 2, 2), b"\0" * 4)
    contents = {
        "claims another shape": {"image": claiming_npy((9999, 9999, 9999)), "label": volume},
        "not numbers": {"image": object_npy(payload), "label": volume},
        "uint8": {"image": claiming_npy((4,), b"\0" * 4), "label": volume},
        "holds no label": {"image": volume},
        "shape": {"image": volume, "label": claiming_npy((1, 2, 1), b"\0" * 2)},
        "value 7": {"image": volume, "label": claiming_npy((1, 2, 2), b"\7" * 4)},
    }
    for says, members in contents.items():
        replace(packed, npz(members))
        case = next(case for case in find_cases(packed) if case.image_path.name == CASE)
        with pytest.raises(UserError, match=says):
            case.read(4)
    replace(packed, b"no zip at all")
    case = next(case for case in find_cases(packed) if case.image_path.name == CASE)
    with pytest.raises(UserError, match="no case of a pack"):
        case.read(4)
    assert not (tmp_path / "marker").exists()
