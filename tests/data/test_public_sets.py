"""Synapse and PROMISE12, in the layouts in which they circulate."""

import numpy as np
import pytest

from mambaseg.app.networks import made
from mambaseg.app.schema import EXTRAS
from mambaseg.data.check import check_dataset, find_layout
from mambaseg.data.fingerprint import source_digests
from mambaseg.data.readers import promise12, synapse
from mambaseg.errors import UserError
from runs import composed

h5py = pytest.importorskip("h5py")
SIDE = 16


def volume(depth, classes, seed):
    """A volume in [0, 1] with every class in it, class k in 2k voxels of each slice at least."""
    rng = np.random.default_rng(seed)
    label = np.zeros((depth, SIDE, SIDE), np.uint8)
    for k in range(1, classes):
        label[:, k % SIDE, :3] = k
    return rng.random((depth, SIDE, SIDE), dtype=np.float32), label


def write_h5(path, image, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label.astype(np.float32)


def write_archive(root, train=("0005", "0006"), test=("0001",), depth=3):
    (root / "train_npz").mkdir(parents=True)
    for seed, name in enumerate(train):
        image, label = volume(depth, 9, seed)
        for z in range(depth):
            path = root / "train_npz" / f"case{name}_slice{z:03d}.npz"
            np.savez(path, image=image[z].astype(np.float64), label=label[z].astype(np.float64))
    for name in test:
        write_h5(root / "test_vol_h5" / f"case{name}.npy.h5", *volume(depth, 9, 100 + int(name)))
    return root


def write_btcv(root, names=("0001", "0005")):
    nib = pytest.importorskip("nibabel")
    for folder in ("img", "label"):
        (root / folder).mkdir(parents=True)
    for name in names:
        image, label = volume(3, 14, int(name))
        for kind, array in (("img", image * 1000 - 500), ("label", label)):
            file = nib.Nifti1Image(array.T.astype(np.float32), np.diag([0.8, 0.8, 3.0, 1.0]))
            nib.save(file, root / kind / f"{kind}{name}.nii.gz")
    return root


def write_mhd(folder, name, seed=0, *, origin=(0.0, 0.0, 0.0), label=True):
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(parents=True, exist_ok=True)
    image, truth = volume(4, 2, seed)
    for array, ending in ((image * 1000, ""), (truth, "_segmentation"))[: 1 + label]:
        file = sitk.GetImageFromArray(array.astype(np.int16))
        file.SetSpacing((0.6, 0.6, 3.6))
        file.SetOrigin(origin if ending else (0.0, 0.0, 0.0))
        sitk.WriteImage(file, str(folder / f"{name}{ending}.mhd"))


# ---- Synapse


def test_the_archives_slices_become_volumes_and_its_volumes_are_tested(tmp_path):
    cases = synapse.find_cases(write_archive(tmp_path))
    assert [(case.id, case.part) for case in cases] == [
        ("case0001", "test"), ("case0005", "train"), ("case0006", "train")
    ]  # fmt: skip
    image, label = volume(3, 9, 0)
    read = cases[1].read(9, 1)
    assert np.allclose(read.image[:, 0], image) and np.array_equal(read.label, label)
    assert read.image.dtype == np.float32 and read.spacing is None
    assert np.array_equal(cases[0].read(9, 1).label, volume(3, 9, 101)[1])
    assert len(cases[1].sources()) == 3


def test_a_case_that_lacks_a_slice_or_is_in_both_parts_is_named(tmp_path):
    root = write_archive(tmp_path, test=("0001", "0006"))
    (root / "train_npz" / "case0005_slice001.npz").unlink()
    cases, problems, _ = synapse.find_cases.survey(root)
    assert [case.id for case in cases] == ["case0001", "case0006"]
    assert ["case0005 lacks slice 001" in str(p) for p in problems] == [True, False]
    assert "case0006 is in train_npz too" in str(problems[1])
    with pytest.raises(UserError, match=r"lacks slice 001.*\(1 more like this: mambaseg check"):
        synapse.find_cases(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image": np.zeros((4, 4)), "label": np.zeros((4, 4))}, r"shapes \(4, 4\) and \(16, 16\)"),
        ({"image": np.zeros((16, 16))}, "holds no label"),
        ({"image": np.zeros(3), "label": np.zeros(3)}, "is no slice"),
        ({"image": np.zeros((16, 16)), "label": np.full((16, 16), 0.5)}, "whole class numbers"),
        (None, "is no slice"),
    ],
)
def test_a_damaged_slice_is_a_clear_error(tmp_path, content, message):
    root = write_archive(tmp_path)
    path = root / "train_npz" / "case0005_slice002.npz"
    path.write_bytes(b"PK nothing") if content is None else np.savez(path, **content)
    with pytest.raises(UserError, match=rf"case0005_slice002\.npz: .*{message}"):
        synapse.find_cases(root)[1].read()


def test_btcv_is_read_in_hu_and_the_published_twelve_are_tested(tmp_path):
    root = write_btcv(tmp_path / "RawData" / "Training").parents[1]
    cases = synapse.find_btcv(root)
    assert [(case.id, case.part) for case in cases] == [("img0001", "test"), ("img0005", "train")]
    read = cases[1].read(14, 1)
    image, label = volume(3, 14, 5)
    assert np.allclose(read.image[:, 0], image * 1000 - 500, atol=1e-3)
    assert np.array_equal(read.label, label)
    assert read.spacing == pytest.approx((3.0, 0.8, 0.8))
    (root / "RawData" / "Training" / "label" / "label0005.nii.gz").unlink()
    with pytest.raises(UserError, match=r"label0005\.nii\.gz: the label of img0005"):
        synapse.find_btcv(root)
    for name in ("img0001", "img0005"):
        (root / "RawData" / "Training" / "img" / f"{name}.nii.gz").unlink()
    with pytest.raises(UserError, match=r"label0001\.nii\.gz: img0001, the image of this label"):
        synapse.find_btcv(root)


def test_names_in_another_order_than_the_labels_are_remarked():
    sizes = {"liver": 900.0, "spleen": 90.0, "aorta": 50.0, "gallbladder": 10.0}
    names = ["background", *sizes]
    assert synapse.organ_remarks(names, sizes) == []
    exchanged = {**sizes, "gallbladder": 90.0, "spleen": 10.0}
    assert "spleen is the smallest" in synapse.organ_remarks(names, exchanged)[0]
    exchanged = {**sizes, "liver": 50.0, "aorta": 900.0}
    assert "aorta is the largest" in synapse.organ_remarks(names, exchanged)[0]
    assert synapse.organ_remarks(["background", "tumour"], {"tumour": 3.0}) == []


# ---- PROMISE12


def test_promise12s_own_files_are_found_below_the_root_with_the_published_parts(tmp_path):
    for seed, (folder, name) in enumerate([("Part1", "Case00"), ("Part1", "Case02"),
                                           ("Part2", "Case05")]):  # fmt: skip
        write_mhd(tmp_path / folder, name, seed)
    cases = promise12.find_cases(tmp_path)
    assert [(case.id, case.part) for case in cases] == [
        ("Case00", "train"), ("Case02", "val"), ("Case05", "test")
    ]  # fmt: skip
    read = cases[2].read(2, 1)
    image, label = volume(4, 2, 2)
    assert np.array_equal(read.image[:, 0], (image * 1000).astype(np.int16))
    assert np.array_equal(read.label, label)
    assert read.spacing == pytest.approx((3.6, 0.6, 0.6))
    before = source_digests(cases)
    voxels = tmp_path / "Part2" / "Case05.raw"
    voxels.write_bytes(bytes(voxels.stat().st_size))
    assert source_digests(cases).items() ^ before.items() == {
        ("Case05", digests["Case05"]) for digests in (before, source_digests(cases))
    }


def test_promise12_as_h5_is_read_too(tmp_path):
    write_h5(tmp_path / "data" / "Case16.h5", *volume(4, 2, 7))
    (case,) = promise12.find_cases(tmp_path)
    assert case.part == "test"
    assert np.array_equal(case.read(2, 1).label, volume(4, 2, 7)[1])


def test_what_is_wrong_with_a_case_of_promise12_is_said(tmp_path):
    write_mhd(tmp_path / "a", "Case00")
    write_mhd(tmp_path / "b", "Case00")
    write_mhd(tmp_path / "a", "Case01", label=False)
    write_mhd(tmp_path / "a", "Case03")
    (tmp_path / "a" / "Case03.mhd").unlink()
    cases, problems, _ = promise12.find_cases.survey(tmp_path)
    assert cases == [] and len(problems) == 3
    with pytest.raises(UserError, match=r"Case00 is there twice.*\(2 more like this"):
        promise12.find_cases(tmp_path)
    for problem, words in zip(problems, ("Case00 is there twice", "label Case01_segmentation.mhd",
                                         "there is no Case03.mhd"), strict=True):  # fmt: skip
        assert words in str(problem)


def test_a_label_on_another_grid_is_refused(tmp_path):
    write_mhd(tmp_path, "Case00", origin=(5.0, 0.0, 0.0))
    with pytest.raises(UserError, match=r"Case00_segmentation\.mhd: .*first voxel"):
        promise12.find_cases(tmp_path)[0].read(2)


# ---- both


@pytest.mark.parametrize("find", [synapse.find_cases, synapse.find_btcv, promise12.find_cases])
def test_a_folder_without_them_says_what_is_expected(tmp_path, find):
    with pytest.raises(UserError, match=r"no cases .* here\. Expected: (Synapse|BTCV|PROMISE12)"):
        find(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        find(tmp_path / "gone")


def test_data_check_knows_them(tmp_path):
    write_archive(tmp_path / "archive")
    write_btcv(tmp_path / "btcv")
    write_h5(tmp_path / "promise" / "data" / "Case16.h5", *volume(4, 2, 7))
    for folder, name, count in (("archive", "synapse", 3), ("btcv", "btcv", 2),
                                ("promise", "promise12", 1)):  # fmt: skip
        assert find_layout(tmp_path / folder).name == name
        report = check_dataset(tmp_path / folder)
        assert report.ok and report.cases == count, report.problems


@pytest.mark.parametrize("config", ["synapse", "btcv", "promise12"])
def test_the_config_gives_batches_of_its_classes_and_the_published_parts(tmp_path, config, caplog):
    if config == "synapse":
        root, parts = write_archive(tmp_path / "data"), (2, 1, 1)
    elif config == "btcv":
        root, parts = write_btcv(tmp_path / "data"), (1, 1, 1)
    else:
        root, parts = tmp_path / "data", (1, 1, 1)
        for seed, name in enumerate(("Case00", "Case02", "Case05")):
            write_mhd(root, name, seed)
    places = [f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}"]
    cfg = composed(f"data={config}", *places, "data.size=32")
    module = made(cfg.data, *EXTRAS["data"], steps=2)
    with caplog.at_level("INFO"):
        module.load()
    assert tuple(counts["patients"] for counts in module.counts.values()) == parts
    assert f"median voxels of a case: {cfg.data.class_names[1]}" in caplog.text
    assert ("is the largest of the classes" in caplog.text) == (config != "promise12")
    assert ("optimistic" in module.split.note) == (config != "promise12")
    for case in module.cases["train"]:
        labels = np.unique(module.cache.label(module.cache.position(case.id)))
        assert labels.tolist() == list(range(cfg.data.num_classes))
