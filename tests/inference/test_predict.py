"""Label maps of images without a reference: same labels as in evaluation, same geometry."""

import json
import shutil
import sys
import warnings

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from mambaseg.app.console import main
from mambaseg.app.ensemble import restore_predictor
from mambaseg.data.formats.images import find_images
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.volume import unsliced
from mambaseg.errors import UserError
from mambaseg.evaluation.case_scores import CaseScores
from mambaseg.evaluation.largest import keep_largest
from mambaseg.inference.folder_scores import score_folders
from mambaseg.inference.segment import Member, segment
from payload import armed
from runs import trained
from small_disk import fill, no_space, small_disk
from tiny_checkpoints import CLASSES, WIDTHS, original_unet, tiny_unet, write_checkpoint

GRID = (
    "dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c",
    "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "tiny.ckpt")


def write_image(path, shape=(21, 34, 5), *, seed=0):
    """An oblique scan whose two transforms, their codes and its units differ from any default."""
    data = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(data, None, header)
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (1.37, 1.41, 9.6), (-81.3, 40.7, 12.9)
    image.set_qform(affine, code=1)
    affine[:3, 3] += 0.25
    image.set_sform(affine, code=2)
    image.header.set_zooms((1.37, 1.41, 9.6, 0.031)[: len(shape)])
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Jane Doe"
    nibabel.save(image, path)
    return path


def predict(checkpoints, place, output, **options):
    paths = checkpoints if isinstance(checkpoints, list) else [checkpoints]
    predictor = restore_predictor(paths, device="cpu", **options)
    return predictor.predict(find_images(str(place), outside=output), output)


def labels_of(path):
    return np.asarray(nibabel.load(path).dataobj)


# ---- the same labels, the same place -------------------------------------------------------------


def test_prediction_is_what_evaluation_of_the_same_checkpoint_predicts(
    checkpoint, small_run, phantom_root, tmp_path, monkeypatch
):
    evaluated, original = {}, CaseScores.update

    def recording(self, case, prediction, reference, **more):
        evaluated[case.image_path] = prediction.numpy()
        original(self, case, prediction, reference, **more)

    monkeypatch.setattr(CaseScores, "update", recording)
    run = trained(f"checkpoint={checkpoint}", *small_run, script="evaluate")
    monkeypatch.setattr(CaseScores, "update", original)
    predict(checkpoint, phantom_root, tmp_path / "labels")
    assert evaluated
    for path, labels in evaluated.items():
        name = path.relative_to(phantom_root)
        assert len(np.unique(labels)) > 1
        assert np.array_equal(labels_of(tmp_path / "labels" / name).T, labels)
        reference = path.with_name(path.name.replace(".nii", "_gt.nii"))
        for folder, file in (("maps", tmp_path / "labels" / name), ("truth", reference)):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / folder / path.name)
    places = tmp_path / "maps", tmp_path / "truth"
    how = {
        "class_names": CLASSES,
        "evaluation": run.config["evaluation"],
        "outputs": tmp_path / "scored",
    }
    folder, _ = score_folders(*places, **how)
    assert folder.summary["foreground"] == run.folder.summary["foreground"]


@pytest.mark.parametrize("shape", [(21, 34, 5), (21, 34, 5, 3), (21, 34, 5, 1)], ids=str)
def test_a_label_map_lies_where_its_image_lies_bit_for_bit(checkpoint, tmp_path, shape):
    path = write_image(tmp_path / "scan.nii.gz", shape)
    predict(checkpoint, path, tmp_path / "out")
    image, labels = nibabel.load(path), nibabel.load(tmp_path / "out" / "scan.nii.gz")
    for name in GRID:
        assert image.header[name].tobytes() == labels.header[name].tobytes(), name
    assert labels.shape == shape and labels.get_data_dtype() == np.uint8
    assert np.array_equal(image.affine, labels.affine)
    assert labels.header.get_intent()[0] == "label"
    assert np.isnan(labels.header["scl_slope"]) or labels.dataobj.slope == 1
    about = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert about["labels"] == {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    text = labels.header.binaryblock + (tmp_path / "out" / "scan.json").read_bytes()
    assert b"Jane" not in text


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((21, 34, 5), "paper"), ((21, 34, 5, 3), "paper"),
        ((21, 34, 5), Preprocessing("spacing", 16, spacing=1.0)),
    ],
)  # fmt: skip
def test_a_volume_with_another_axis_last_is_cut_and_labelled_as_the_usual_one(tmp_path, shape, how):
    """Thick slices stacked along z, and the same voxels with z stored first."""
    network = write_checkpoint(tmp_path / "tiny.ckpt", slicing="spacing", preprocessing=how)
    usual, turned = tmp_path / "in" / "usual.nii.gz", tmp_path / "in" / "turned.nii.gz"
    usual.parent.mkdir()
    image = nibabel.load(write_image(usual, shape))
    moved = np.asarray(image.dataobj).transpose(2, 0, 1, *range(3, len(shape)))
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    other = nibabel.Nifti1Image(moved, image.affine[:, [2, 0, 1, 3]], header)
    other.header.set_xyzt_units("mm", "sec")
    nibabel.save(other, turned)
    outcome = predict(network, usual.parent, tmp_path / "out", probabilities=True, overlay=True)
    assert not outcome.failed and outcome.slices == 2 * 5 * (shape[3:] or (1,))[0]
    for kind in (".nii.gz", "_probabilities.nii.gz"):
        labels = nibabel.load(tmp_path / "out" / f"usual{kind}")
        found = nibabel.load(tmp_path / "out" / f"turned{kind}")
        axes = (2, 0, 1, *range(3, labels.ndim))
        assert np.array_equal(np.asarray(found.dataobj), np.asarray(labels.dataobj).transpose(axes))
    found, header = nibabel.load(tmp_path / "out" / "turned.nii.gz"), nibabel.load(turned).header
    assert all(found.header[name].tobytes() == header[name].tobytes() for name in GRID)
    assert len(np.unique(labels_of(tmp_path / "out" / "turned.nii.gz"))) > 1
    pictures = [
        Pillow.open(tmp_path / "out" / f"{name}_overlay.png") for name in ("usual", "turned")
    ]
    assert pictures[0].size == pictures[1].size
    with pytest.raises(UserError, match="has slicing stored, those before it slicing"):
        restore_predictor([network, write_checkpoint(tmp_path / "other.ckpt")], device="cpu")
    with pytest.raises(UserError, match=r"unknown .*'thick'"):
        restore_predictor([write_checkpoint(tmp_path / "o.ckpt", slicing="thick")], device="cpu")


def test_another_library_sees_the_same_geometry(checkpoint, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    path = write_image(tmp_path / "scan.nii.gz")
    predict(checkpoint, path, tmp_path / "out")
    image, labels = (sitk.ReadImage(str(p)) for p in (path, tmp_path / "out" / "scan.nii.gz"))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(image, what)() == getattr(labels, what)()


def test_a_meta_image_gives_a_nifti_label_map_at_its_place(checkpoint, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(write_image(tmp_path / "scan.nii.gz")))
    sitk.WriteImage(image, str(tmp_path / "same.mha"))
    predict(checkpoint, tmp_path, tmp_path / "out")
    labels = [
        sitk.ReadImage(str(tmp_path / "out" / name)) for name in ("scan.nii.gz", "same.nii.gz")
    ]
    assert np.array_equal(*map(sitk.GetArrayFromImage, labels))
    for what in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(image, what)(), getattr(labels[1], what)(), atol=1e-4)


def test_every_frame_of_a_cine_is_predicted_as_if_alone(checkpoint, tmp_path):
    cine = write_image(tmp_path / "cine.nii.gz", (21, 34, 5, 3))
    whole = nibabel.load(cine)
    for t in range(3):
        frame = np.asarray(whole.dataobj)[..., t]
        nibabel.save(nibabel.Nifti1Image(frame, whole.affine), tmp_path / f"frame{t}.nii.gz")
    predict(checkpoint, tmp_path, tmp_path / "out")
    together = labels_of(tmp_path / "out" / "cine.nii.gz")
    for t in range(3):
        alone = labels_of(tmp_path / "out" / f"frame{t}.nii.gz")
        assert np.array_equal(together[..., t], alone)
    assert not np.array_equal(together[..., 0], together[..., 1])


# ---- ensembles and views -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "modern"])
@pytest.mark.parametrize("shape", [(45, 70), (17, 9), (32, 32), (216, 256)], ids=str)
def test_native_logits_decide_as_native_labels_do(preset, shape):
    logits = torch.randn(2, 4, 32, 32)
    preprocessing = Preprocessing(preset, 32)
    native = preprocessing.logits_to_native(logits, shape)
    assert native.shape == (2, 4, *shape) and native.dtype == torch.float32
    published = preprocessing.logits_to_native(logits, shape, as_published=True)
    expected = preprocessing.labels_to_native(logits, shape)
    assert torch.equal(published.argmax(1).to(torch.uint8), expected)
    inside = published.any(1)  # not a last row or column that reads as zero
    assert torch.equal(native.movedim(1, -1)[inside], published.movedim(1, -1)[inside])
    assert native.any(1).all() and (preset == "paper" or inside.all())


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def views_of(network, image):
    """Class probabilities of a square volume in its eight views, turned back; with NumPy."""
    for mirrored in (False, True):
        for turns in range(4):
            seen = np.rot90(image[..., ::-1] if mirrored else image, turns, (2, 3))
            with torch.no_grad():
                logits = network(torch.from_numpy(seen.copy())).numpy()
            back = np.rot90(softmax(logits), -turns, (2, 3))
            yield back[..., ::-1] if mirrored else back


def test_views_and_networks_are_averaged_in_probability():
    image = np.random.default_rng(0).random((3, 1, 32, 32), dtype=np.float32)
    networks = [tiny_unet(0), tiny_unet(1)]
    members = [Member(network, Preprocessing("paper", 32), "all") for network in networks]
    found = segment(members, [torch.from_numpy(image)] * 2, probabilities=True, batch_size=2)
    views = [view for network in networks for view in views_of(network, image)]
    assert len(views) == 16
    mean = np.mean(views, axis=0)
    assert np.abs(found.probabilities.numpy() / 255 - mean).max() < 0.5 / 255 + 1e-5
    assert (found.labels.numpy() == mean.argmax(1)).mean() > 0.999  # ties within rounding
    single = segment([members[0]._replace(views="none")], [torch.from_numpy(image)])
    assert (single.labels != found.labels).any()


def test_with_all_views_a_turned_image_gives_turned_labels():
    image = torch.rand(2, 1, 32, 32)
    member = Member(tiny_unet(), Preprocessing("paper", 32), "all")
    labels = segment([member], [image]).labels
    turned = segment([member], [image.rot90(1, (-2, -1))]).labels
    assert (turned == labels.rot90(1, (1, 2))).float().mean() > 0.995  # ties within rounding


def test_an_unknown_scan_backend_is_refused_though_the_network_scans_nothing(checkpoint):
    with pytest.raises(UserError, match=r"Unknown scan backend 'nonsense'.*'numba'"):
        restore_predictor([checkpoint], scan_backend="nonsense")


def test_an_ensemble_of_one_network_twice_says_what_it_says_alone(checkpoint, tmp_path):
    path = write_image(tmp_path / "scan.nii.gz")
    predict(checkpoint, path, tmp_path / "one")
    predict([checkpoint, checkpoint], path, tmp_path / "two")
    one, two = (labels_of(tmp_path / name / "scan.nii.gz") for name in ("one", "two"))
    assert (one == two).mean() > 0.999


def test_networks_of_other_grids_meet_at_native_resolution(checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "b.ckpt", seed=1, preprocessing="modern", size=48)
    path = write_image(tmp_path / "scan.nii.gz")
    predict([checkpoint, other], path, tmp_path / "out", probabilities=True)
    about = json.loads((tmp_path / "out" / "scan.json").read_text())
    used = [network["preprocessing"] for network in about["made_by"]["networks"]]
    assert [(one["name"], one["size"]) for one in used] == [("paper", 32), ("modern", 48)]


def test_a_network_of_a_spacing_sees_all_of_a_larger_image(checkpoint, tmp_path):
    preprocessing = Preprocessing("spacing", 32, spacing=1.0, window=[100, 700])
    path = write_checkpoint(tmp_path / "a.ckpt", preprocessing=preprocessing)
    images = tmp_path / "images"
    images.mkdir()
    native = nibabel.load(write_image(images / "scan.nii.gz", (64, 70, 3)))
    Pillow.fromarray(np.zeros((40, 40), np.uint8)).save(images / "picture.png")
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 9, 2), np.int16), None), images / "bare.nii.gz")
    outcome = predict(path, images, tmp_path / "out", tta=True)
    assert outcome.done == ["scan"] and set(outcome.failed) == {"picture", "bare"}
    assert all("voxel size is unknown" in reason for reason in outcome.failed.values())

    written = nibabel.load(tmp_path / "out" / "scan.nii.gz")
    for key in GRID:
        assert np.array_equal(written.header[key], native.header[key], equal_nan=True), key
    about = json.loads((tmp_path / "out" / "scan.json").read_text())
    used = about["made_by"]["networks"][0]["preprocessing"]
    assert used["spacing"] == 1.0 and used["window"] == [100.0, 700.0]

    volume = np.asarray(native.dataobj).transpose(2, 1, 0)[:, None].astype(np.float32)
    scaled = torch.from_numpy(((volume - 100) / 600).clip(0, 1))
    member = Member(tiny_unet(), Preprocessing("spacing", 32, spacing=1.0), "all")
    spacing = tuple(map(float, native.header.get_zooms()[::-1]))
    expected = segment([member], [scaled], spacing=spacing).labels
    labels = labels_of(tmp_path / "out" / "scan.nii.gz")
    assert np.mean(expected.numpy() == labels.T) > 0.999
    assert set(np.unique(expected)) == {0, 1, 2, 3}

    both = predict([path, checkpoint], images / "scan.nii.gz", tmp_path / "both")
    assert both.done == ["scan"]


def test_networks_of_other_classes_are_no_ensemble(checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "b.ckpt", classes=["background", "LV", "MYO", "RV"])
    with pytest.raises(UserError, match=r"b\.ckpt has .*those before it"):
        restore_predictor([checkpoint, other])


# ---- what else is written ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(21, 34, 5), (21, 34, 5, 2)], ids=str)
def test_probabilities_lie_on_the_same_grid_and_decide_the_labels(checkpoint, tmp_path, shape):
    path = write_image(tmp_path / "scan.nii.gz", shape)
    predict(checkpoint, path, tmp_path / "out", probabilities=True)
    image = nibabel.load(tmp_path / "out" / "scan_probabilities.nii.gz")
    assert image.shape == (*shape, len(CLASSES)) and image.get_data_dtype() == np.uint8
    for name in set(GRID) - {"dim"}:
        assert image.header[name].tobytes() == nibabel.load(path).header[name].tobytes(), name
    values = image.get_fdata()
    assert values.min() >= 0 and values.max() <= 1 + 1e-6
    assert np.abs(values.sum(-1) - 1).max() < len(CLASSES) / 255
    labels = labels_of(tmp_path / "out" / "scan.nii.gz")
    chosen = np.take_along_axis(values, labels[..., None].astype(int), -1)[..., 0]
    assert np.all(chosen > values.max(-1) - 1.5 / 255)


def test_the_largest_component_is_kept_frame_by_frame(checkpoint, tmp_path):
    path = write_image(tmp_path / "scan.nii.gz", (21, 34, 5, 2))
    predict(checkpoint, path, tmp_path / "all")
    predict(checkpoint, path, tmp_path / "kept", keep_largest=True)
    every, kept = (labels_of(tmp_path / name / "scan.nii.gz") for name in ("all", "kept"))
    for t in range(2):
        each = {name: (label,) for label, name in enumerate(CLASSES) if label}
        expected = keep_largest(every[..., t].T.copy(), each)
        assert np.array_equal(kept[..., t].T, expected)
    assert (every != kept).any()


def test_a_picture_is_drawn_on_demand(checkpoint, tmp_path):
    predict(checkpoint, write_image(tmp_path / "scan.nii"), tmp_path / "out", overlay=True)
    with Pillow.open(tmp_path / "out" / "scan_overlay.png") as picture:
        assert min(picture.size) > 200
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "scan.json", "scan.nii.gz", "scan_overlay.png",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), [
    ("a.png", "L"), ("a.png", "I;16"), ("a.tif", "F"), ("a.tiff", "RGB"), ("a.png", "RGBA"),
])  # fmt: skip
def test_a_grey_picture_gives_a_picture_of_labels(checkpoint, tmp_path, name, mode):
    grey = np.random.default_rng(0).integers(0, 255, (40, 28), dtype=np.uint8)
    pixels = {"I;16": grey.astype(np.uint16) * 200, "F": grey.astype(np.float32) / 7}.get(
        mode, grey
    )
    picture = Pillow.fromarray(pixels)
    (picture.convert(mode) if mode.startswith("RGB") else picture).save(tmp_path / name)
    predict(checkpoint, tmp_path / name, tmp_path / "out", probabilities=True)
    with Pillow.open(tmp_path / "out" / "a.png") as labels:
        found = np.asarray(labels)
    nibabel.save(nibabel.Nifti1Image(grey.T[..., None], np.eye(4)), tmp_path / "volume.nii.gz")
    predict(checkpoint, tmp_path / "volume.nii.gz", tmp_path / "out")
    assert found.dtype == np.uint8 and found.shape == (40, 28) and len(np.unique(found)) > 1
    assert (labels_of(tmp_path / "out" / "volume.nii.gz")[..., 0] == found.T).mean() > 0.99


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: Pillow.new("RGB", (9, 9), "red").save(path), "colours"),
    (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50), "not a readable PNG"),
    (lambda path: path.write_bytes(b""), "empty"),
    (lambda path: path.write_text("%!PS-Adobe"), "not a readable PNG"),
])  # fmt: skip
def test_a_picture_that_is_none_is_refused(tmp_path, write, message):
    write(tmp_path / "x.png")
    with pytest.raises(UserError, match=message):
        find_images(str(tmp_path / "x.png"), outside=tmp_path / "out")[0].read()


def test_a_stack_of_pages_and_nan_are_refused(tmp_path):
    page = Pillow.new("L", (9, 9))
    page.save(tmp_path / "x.tif", save_all=True, append_images=[page])
    holes = np.full((9, 9), np.nan, np.float32)
    Pillow.fromarray(holes).save(tmp_path / "y.tif")
    stack, nan = find_images(str(tmp_path), outside=tmp_path / "out")
    with pytest.raises(UserError, match="2 pages"):
        stack.read()
    with pytest.raises(UserError, match="81 of 81 voxels are NaN"):
        nan.read()


# ---- which images, and what became of them -------------------------------------------------------


def test_inputs_are_found_by_folder_and_pattern_and_never_among_the_results(tmp_path):
    for name in ("a.nii.gz", "sub/b.NII", "sub/c.png", "sub/notes.txt", "out/d.nii.gz", ".e.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / "out"
    names = [source.name for source in find_images(str(tmp_path), outside=out)]
    assert names == ["a", "sub/b", "sub/c"]
    found = find_images(str(tmp_path / "**" / "*.[nNp]*"), outside=out)
    assert [source.name for source in found if not source.name.startswith(".")] == names
    (tmp_path / "sub" / "c.tif").touch()
    with pytest.raises(UserError, match=r"c\.png and .*c\.tif would both give sub/c"):
        find_images(str(tmp_path), outside=out)


@pytest.mark.parametrize(("place", "message"), [
    ("absent", "no file or folder"),
    ("*.nii.gz", "holds no image"),
    ("x.txt", "none of the endings"),
])  # fmt: skip
def test_an_input_that_is_none_is_said(tmp_path, place, message):
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match=message):
        find_images(str(tmp_path / place), outside=tmp_path / "out")


def test_finished_images_are_skipped_until_the_networks_change(checkpoint, tmp_path):
    write_image(tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    assert predict(checkpoint, tmp_path / "a.nii.gz", out).done == ["a"]
    before = (out / "a.nii.gz").stat().st_mtime_ns
    again = predict(checkpoint, tmp_path / "a.nii.gz", out)
    assert (again.done, again.skipped) == ([], ["a"])
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    assert predict(checkpoint, tmp_path / "a.nii.gz", out, overlay=True).done == ["a"]
    (out / "a.json").write_text("{")  # an interrupted prediction writes its .json whole
    with pytest.raises(UserError, match=r"a\.json was not made by this command"):
        predict(checkpoint, tmp_path / "a.nii.gz", out)
    assert predict(checkpoint, tmp_path / "a.nii.gz", out, rerun=True).done == ["a"]
    other = write_checkpoint(tmp_path / "other.ckpt", seed=1)
    for change in ({"tta": True}, {}):
        with pytest.raises(UserError, match=r"a\.nii\.gz was made by other networks"):
            predict(other if not change else checkpoint, tmp_path / "a.nii.gz", out, **change)
    assert predict(other, tmp_path / "a.nii.gz", out, rerun=True).done == ["a"]


def test_one_bad_image_does_not_stop_the_others_and_leaves_nothing(checkpoint, tmp_path):
    for name in "ac":
        write_image(tmp_path / f"{name}.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:-900])
    outcome = predict(checkpoint, tmp_path, tmp_path / "out")
    assert outcome.done == ["a", "c"] and outcome.slices == 10
    assert list(outcome.failed) == ["b"] and "truncated" in outcome.failed["b"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.json", "a.nii.gz", "c.json", "c.nii.gz",
    ]  # fmt: skip


def test_a_full_disk_ends_the_command_rather_than_each_image(checkpoint, tmp_path):
    for name in "abc":
        write_image(tmp_path / f"{name}.nii.gz")
    predictor = restore_predictor([checkpoint], device="cpu")
    sources = find_images(str(tmp_path), outside=tmp_path / "out")
    segmented, whole = [], predictor.segment
    predictor.segment = lambda image: segmented.append(1) or whole(image)
    with small_disk(tmp_path / "disk", kibibytes=64) as disk:
        fill(disk)
        with no_space(disk, "output="):
            predictor.predict(sources, disk)
    assert len(segmented) == 1


def test_probabilities_of_a_single_frame_are_not_copied():
    """They may fill the memory; only another cut changes their order."""
    array = np.zeros((1, 3, 4, 5, 6), np.uint8)
    assert unsliced(array, 0, 2) is array
    assert unsliced(array, 1, 2).flags.c_contiguous


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_lack_of_memory_names_the_number_of_slices(checkpoint, tmp_path, monkeypatch, kind):
    def too_much(*_, **__):
        raise kind("out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("mambaseg.inference.predictor.segment", too_much)
    image = write_image(tmp_path / "a.nii.gz")
    outcome = predict(checkpoint, image, tmp_path / "out", batch_size=7)
    assert "2 GiB\nA smaller batch_size needs less; it is 7 slices" in outcome.failed["a"]


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mambaseg"])  # which the command replaces
    with warnings.catch_warnings():
        main(["predict", *map(str, words)])


def test_the_command_predicts_and_its_status_tells_of_failures(
    checkpoint, tmp_path, monkeypatch, capsys
):
    write_image(tmp_path / "in a.nii.gz")
    words = [f"run={checkpoint}", f"input='{tmp_path}/*.nii.gz'", f"output={tmp_path}/out"]
    command(monkeypatch, *words, "device=cpu", "batch_size=2", "data.size=64")
    assert (tmp_path / "out" / "in a.nii.gz").is_file()
    said = capsys.readouterr().out
    assert "data.size=64: not used; the checkpoint says" in said.replace("\n", " ")
    assert "share of the voxels: background " in said and ", LV " in said
    assert "values 0..3 look black" in said and "nothing but background" not in said
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *words, "device=cpu")
    assert ended.value.code == 1
    assert "1 of 2 failed:\n  bad:" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["run=x", "ensemble=[y]"], "as ensemble=[...], not both"),
    ([], "give run="),
    (["run=absent.ckpt"], "or bundle absent.ckpt"),
    (["device=gpu"], "device=gpu cannot be used: choose auto, cpu, cuda"),
    (["device=cuda:77"], "device=cuda:77 cannot be used ("),
    (["precision=16-mixed"], "precision=16-mixed"),
])  # fmt: skip
def test_a_command_that_cannot_start_says_why(
    checkpoint, tmp_path, monkeypatch, capsys, words, message
):
    write_image(tmp_path / "a.nii.gz")
    words = [*words, f"input={tmp_path}", f"output={tmp_path}/out"]
    if any("device" in word or "precision" in word for word in words):
        words.append(f"run={checkpoint}")
    with pytest.raises(SystemExit):
        command(monkeypatch, *words)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "/labels"])
def test_a_file_as_the_folder_of_results_is_refused_before_networks_are_loaded(
    checkpoint, tmp_path, monkeypatch, capsys, below
):
    image = write_image(tmp_path / "a.nii.gz")
    monkeypatch.setattr("mambaseg.app.ensemble.restore_network", pytest.fail)
    with pytest.raises(SystemExit):
        command(monkeypatch, f"run={checkpoint}", f"input={image}", f"output={image}{below}")
    assert f"output={image}{below}: {image} is a file. Name a folder" in capsys.readouterr().err


def test_weights_of_the_original_repository_predict_with_the_network_that_is_named(
    checkpoint, tmp_path, monkeypatch
):
    path = write_image(tmp_path / "a.nii.gz")
    torch.save(original_unet(tiny_unet()), tmp_path / "unet.pth")
    named = ["model=unet", f"model.widths={WIDTHS}", "model.dropout=[0,0]", "data.size=32"]
    words = [f"run={tmp_path}/unet.pth", *named, f"input={path}", "device=cpu"]
    command(monkeypatch, *words, f"output={tmp_path}/original")
    predict(checkpoint, path, tmp_path / "ours")
    assert np.array_equal(*(labels_of(tmp_path / n / "a.nii.gz") for n in ("original", "ours")))


# ---- checkpoints of others -----------------------------------------------------------------------


def test_a_strangers_checkpoint_runs_nothing(tmp_path):
    payload = armed(tmp_path / "ran")
    path = write_checkpoint(tmp_path / "evil.ckpt", evil=payload)
    with pytest.raises(UserError, match="only plain weights"):
        restore_predictor([path])
    touch = {"_target_": "os.system", "_args_": [f"touch {payload.marker}"]}
    arguments = {"num_classes": 4, "in_channels": 1, "widths": [2, 4], "dropout": [0.0, 0.0]}
    for more in ({"_target_": "os.system"}, {"dropout": touch}, {"name": "${oc.env:HOME}"}):
        model = {"name": "unet", "_target_": "os.system", "arguments": {**arguments, **more}}
        path = write_checkpoint(tmp_path / "evil.ckpt", model=model)
        try:
            member = restore_predictor([path], device="cpu").members[0]
        except UserError:
            pass
        else:
            assert type(member.network).__name__ == "AnySize"
        assert not payload.marker.exists()


def test_a_run_folders_configuration_is_not_even_read(checkpoint, tmp_path):
    payload = armed(tmp_path / "ran")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.ckpt").write_bytes(checkpoint.read_bytes())
    evil = f"model: !!python/object/apply:os.system ['touch {payload.marker}']\n"
    (run / "config.yaml").write_text(evil)
    predict(run, write_image(tmp_path / "a.nii.gz"), tmp_path / "out")
    assert (tmp_path / "out" / "a.nii.gz").is_file() and not payload.marker.exists()


def test_a_network_that_gives_no_labels_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "clear.ckpt", task="restoration")
    with pytest.raises(UserError, match="trained for restoration"):
        restore_predictor([path], device="cpu")


def test_an_image_without_the_networks_channels_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "rgb.ckpt", channels=3)
    outcome = predict(path, write_image(tmp_path / "scan.nii.gz", (21, 34, 5)), tmp_path / "out")
    assert "has 1 channels, the networks take 3" in outcome.failed["scan"]


def test_labels_of_another_order_of_post_processing_are_not_taken_for_finished(
    checkpoint, tmp_path
):
    write_image(tmp_path / "a.nii.gz")
    out, parts = tmp_path / "out", {"core": [1], "whole": [1, 2, 3]}
    assert predict(checkpoint, tmp_path / "a.nii.gz", out, keep_largest=parts).done == ["a"]
    assert predict(checkpoint, tmp_path / "a.nii.gz", out, keep_largest=parts).skipped == ["a"]
    other = dict(reversed(parts.items()))
    with pytest.raises(UserError, match="with other options"):
        predict(checkpoint, tmp_path / "a.nii.gz", out, keep_largest=other)
