"""Which files of a folder are predicted, and what is there already: by content, not by name."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from mambaseg.app.ensemble import restore_predictor
from mambaseg.data.formats.files import content_digest
from mambaseg.data.formats.images import find_images, group_channels
from mambaseg.errors import UserError
from tiny_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "tiny.ckpt")


def write_image(path, seed=0, shape=(21, 34, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.4, 1.4, 9.0, 1.0])), path)
    return path


def predict(checkpoint, place, output, **options):
    predictor = restore_predictor([checkpoint], device="cpu", **options)
    return predictor.predict(find_images(str(place), outside=output), output)


def names_of(place, tmp_path):
    return [source.name for source in find_images(str(place), outside=tmp_path / "results")]


# ---- what is there already -----------------------------------------------------------------------


def test_another_image_of_the_same_name_does_not_keep_the_old_label_map(checkpoint, tmp_path):
    one, other = (write_image(tmp_path / site / "scan.nii.gz", i) for i, site in enumerate("ab"))
    out = tmp_path / "out"
    assert predict(checkpoint, one, out).done == ["scan"]
    before = (out / "scan.nii.gz").read_bytes()
    with pytest.raises(UserError, match=r"scan\.nii\.gz was made from another image than .*b/scan"):
        predict(checkpoint, other, out)
    assert (out / "scan.nii.gz").read_bytes() == before
    shutil.copy(one, tmp_path / "b" / "scan.nii.gz")  # the same content, elsewhere and newer
    assert predict(checkpoint, other, out).skipped == ["scan"]
    write_image(other, 2)
    assert predict(checkpoint, other, out, rerun=True).done == ["scan"]
    assert predict(checkpoint, other, out).skipped == ["scan"]


def test_another_channel_is_another_image(tmp_path):
    network = write_checkpoint(tmp_path / "two.ckpt", channels=2)
    for number in range(2):
        write_image(tmp_path / "in" / f"scan_000{number}.nii.gz", number)
    predictor = restore_predictor([network], device="cpu")

    def again():
        sources = find_images(str(tmp_path / "in"), outside=tmp_path / "out")
        return predictor.predict(group_channels(sources, 2), tmp_path / "out")

    assert again().done == ["scan"] and again().skipped == ["scan"]
    write_image(tmp_path / "in" / "scan_0001.nii.gz", 5)
    with pytest.raises(UserError, match="another image"):
        again()


def test_the_voxels_beside_a_header_belong_to_the_image(checkpoint, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    for ending in ("mhd", "nrrd"):
        header = tmp_path / f"scan.{ending}"
        image = sitk.GetImageFromArray(np.arange(600, dtype=np.int16).reshape(3, 10, 20))
        sitk.WriteImage(image, str(tmp_path / "scan.mhd"))
        if ending == "nrrd":
            lines = ("NRRD0004", "type: int16", "dimension: 3", "sizes: 20 10 3",
                     "encoding: raw", "endian: little", "data file: scan.raw")  # fmt: skip
            header.write_text("\n".join(lines) + "\n")
        (source,) = find_images(str(header), outside=tmp_path / "out")
        before = source.digest()
        raw = bytearray((tmp_path / "scan.raw").read_bytes())
        raw[7] ^= 1
        (tmp_path / "scan.raw").write_bytes(raw)
        assert source.digest() != before
    header = tmp_path / "list.mhd"
    header.write_text("NDims = 3\nElementDataFile = LIST\na.raw\nb.raw\n")
    for name in "ab":
        (tmp_path / f"{name}.raw").write_bytes(b"1")
    before = content_digest([header], "list")
    (tmp_path / "b.raw").write_bytes(b"2")
    assert content_digest([header], "list") != before
    (tmp_path / "b.raw").unlink()
    for names in ("LIST\na.raw\nb.raw", "../a.raw", "s%03d.raw 1 2 1"):
        header.write_text(f"NDims = 3\nElementDataFile = {names}\n")
        with pytest.raises(UserError):
            content_digest([header], "list")


def test_label_maps_that_this_program_did_not_make_are_never_replaced(checkpoint, tmp_path):
    """For example the references, when their folder is given as output by mistake."""
    image, truth = write_image(tmp_path / "images" / "a.nii.gz"), tmp_path / "labels"
    write_image(truth / "a.nii.gz", 9)
    before = (truth / "a.nii.gz").read_bytes()
    with pytest.raises(UserError, match=r"labels/a\.nii\.gz was not made by this command"):
        predict(checkpoint, image, truth)
    assert (truth / "a.nii.gz").read_bytes() == before
    (truth / "a.nii.gz").unlink()
    (truth / "a.json").write_text('{"EchoTime": 0.03}')
    with pytest.raises(UserError, match=r"labels/a\.json was not made by this command"):
        predict(checkpoint, image, truth)


@pytest.mark.parametrize("kind", ["overlay", "probabilities", "uncertainty"])
def test_neither_are_other_files_that_bear_the_name_of_a_result(checkpoint, tmp_path, kind):
    image, out = write_image(tmp_path / "a.nii.gz"), tmp_path / "out"
    assert predict(checkpoint, image, out).done == ["a"]
    mine = out / ("a_overlay.png" if kind == "overlay" else f"a_{kind}.nii.gz")
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"{mine.name} was not made by this command"):
        predict(checkpoint, image, out, **{kind: True})
    predict(checkpoint, image, out, rerun=True)
    assert mine.read_text() == "mine"
    predict(checkpoint, image, out, rerun=True, **{kind: True})
    assert mine.read_bytes()[:4] != b"mine"
    predict(checkpoint, image, out, rerun=True)  # it would belong to earlier labels
    assert not mine.exists()


def test_an_overlay_of_earlier_labels_goes_also_after_a_kill(checkpoint, tmp_path, monkeypatch):
    image, out = write_image(tmp_path / "a.nii.gz"), tmp_path / "out"
    predict(checkpoint, image, out, overlay=True)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        predict(checkpoint, image, out, rerun=True)
    assert (out / "a_overlay.png").exists()
    predict(checkpoint, image, out)
    assert not (out / "a_overlay.png").exists()


def test_a_label_map_beside_an_unreadable_json_is_not_replaced(checkpoint, tmp_path):
    image, out = write_image(tmp_path / "a.nii.gz"), tmp_path / "out"
    write_image(out / "a.nii.gz", 9)
    (out / "a.json").write_bytes('{"InstitutionName": "Universität"}'.encode("latin-1"))
    before = (out / "a.nii.gz").read_bytes()
    with pytest.raises(UserError, match=r"a\.json was not made by this command"):
        predict(checkpoint, image, out)
    assert (out / "a.nii.gz").read_bytes() == before


def test_two_images_whose_results_would_have_one_name_are_refused(checkpoint, tmp_path):
    for name in ("a.png", "a_overlay.bmp"):
        place = tmp_path / "in" / name
        place.parent.mkdir(exist_ok=True)
        Pillow.fromarray(np.arange(999, dtype=np.uint8).reshape(27, 37)).save(place)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"a\.png and .*a_overlay\.bmp would both give .*_overlay"):
        predict(checkpoint, tmp_path / "in", out, overlay=True)
    assert predict(checkpoint, tmp_path / "in", out).done == ["a", "a_overlay"]
    predict(checkpoint, tmp_path / "in" / "a.png", out, rerun=True)
    assert (out / "a_overlay.png").exists()


def test_a_result_that_a_kill_left_unfinished_is_made_again(checkpoint, tmp_path, monkeypatch):
    image, out = write_image(tmp_path / "a.nii.gz"), tmp_path / "out"
    assert predict(checkpoint, image, out).done == ["a"]
    whole = (out / "a.nii.gz").read_bytes(), (out / "a.json").read_bytes()
    shutil.rmtree(out)

    import mambaseg.inference.predictor as module

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "label_map", killed)
        with pytest.raises(KeyboardInterrupt):
            predict(checkpoint, image, out)
    assert json.loads((out / "a.json").read_text())["unfinished"]
    assert predict(checkpoint, image, out).done == ["a"]
    assert ((out / "a.nii.gz").read_bytes(), (out / "a.json").read_bytes()) == whole


def test_other_options_are_refused_also_where_a_file_is_missing(checkpoint, tmp_path):
    image, out = write_image(tmp_path / "a.nii.gz"), tmp_path / "out"
    predict(checkpoint, image, out)
    with pytest.raises(UserError, match="other networks or with other options"):
        predict(checkpoint, image, out, tta="flips", overlay=True)


# ---- which files are images ----------------------------------------------------------------------


def test_of_an_acdc_patient_only_the_images_are_predicted(checkpoint, tmp_path, caplog):
    patient = tmp_path / "patient001"
    for name in ("4d", "frame01", "frame01_gt", "frame01_scribble", "frame12", "frame12_gt"):
        write_image(patient / f"patient001_{name}.nii.gz")
    (patient / "Info.cfg").write_text("ED: 1\nES: 12\n")
    images = [f"patient001_{name}" for name in ("4d", "frame01", "frame12")]
    with caplog.at_level("INFO"):
        assert names_of(patient, tmp_path) == images
    assert "left out: 3 references (patient001_frame01_gt.nii.gz, " in caplog.text
    assert names_of(tmp_path / "**" / "*.nii.gz", tmp_path) == [f"patient001/{n}" for n in images]
    named = patient / "patient001_frame01_gt.nii.gz"
    assert names_of(named, tmp_path) == ["patient001_frame01_gt"]
    with pytest.raises(UserError, match=r"holds no image .*left out: 2 references"):
        find_images(str(patient / "*_gt.nii.gz"), outside=tmp_path / "results")


def test_a_link_in_the_folder_of_the_results_is_no_image(tmp_path):
    """Its label map would take its place."""
    write_image(tmp_path / "store" / "a.nii.gz")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.nii.gz").symlink_to(tmp_path / "store" / "a.nii.gz")
    assert names_of(tmp_path / "links", tmp_path) == ["a"]
    with pytest.raises(UserError, match=r"1 image\(s\) are in the folder of the results"):
        find_images(str(tmp_path / "links"), outside=tmp_path / "links")


def test_results_of_an_earlier_prediction_are_no_images(checkpoint, tmp_path, caplog):
    write_image(tmp_path / "in" / "a.nii.gz")
    Pillow.fromarray(np.arange(999, dtype=np.uint8).reshape(27, 37)).save(tmp_path / "in" / "b.png")
    first = predict(checkpoint, tmp_path / "in", tmp_path / "in" / "labels",
                    probabilities=True, overlay=True)  # fmt: skip
    assert first.done == ["a", "b"]
    with caplog.at_level("INFO"):
        assert names_of(tmp_path / "in", tmp_path) == ["a", "b"]
    assert "6 earlier results" in caplog.text
    with pytest.raises(UserError, match="left out: 6 earlier results"):
        find_images(str(tmp_path / "in" / "labels"), outside=tmp_path / "results")
    with pytest.raises(UserError, match=r"2 image\(s\) are in the folder of the results"):
        find_images(str(tmp_path / "in" / "*.[np]*"), outside=tmp_path / "in")


def test_labels_beside_images_are_no_images(tmp_path):
    for name in ("imagesTr/a_0000", "labelsTr/a", "x", "x_seg", "y_0000", "y_label", "z_mask",
                 "masks/q", "deep/images/1", "deep/masks/1"):  # fmt: skip
        (tmp_path / f"{name}.nii.gz").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    # without an image of its name or a folder of images beside it, a mask may be an image
    images = ["deep/images/1", "imagesTr/a_0000", "x", "y_0000", "z_mask"]
    assert names_of(tmp_path, tmp_path) == images
    assert names_of(tmp_path / "masks", tmp_path) == ["q"]


def test_a_pattern_does_not_match_the_twins_that_macos_leaves(tmp_path):
    for name in ("a.nii.gz", "._a.nii.gz", "sub/._b.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names_of(tmp_path / "**" / "*.nii.gz", tmp_path) == ["a"]
    assert names_of(tmp_path / "._*", tmp_path) == ["._a"]


# ---- names and channels --------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_names_that_begin_or_end_alike_give_results_of_their_own(tmp_path, channels):
    stems = ["a.b", "case_1", "case_10", "test_7572.nii", "x_0000"]
    for stem in stems:
        for number in range(channels):
            write_image(tmp_path / "in" / f"{stem}_000{number}.nii.gz", number)
    network = write_checkpoint(tmp_path / "tiny.ckpt", channels=channels)
    sources = group_channels(find_images(str(tmp_path / "in"), outside=tmp_path / "o"), channels)
    assert [source.name for source in sources] == stems
    outcome = restore_predictor([network], device="cpu").predict(sources, tmp_path / "o")
    assert outcome.done == stems
    assert sorted(path.name for path in (tmp_path / "o").glob("*.nii.gz")) == [
        f"{stem}.nii.gz" for stem in stems
    ]


def test_a_missing_channel_is_not_filled_by_the_next_one(tmp_path):
    for number in (1, 2):
        write_image(tmp_path / "in" / f"scan_000{number}.nii.gz", number)
    sources = group_channels(find_images(str(tmp_path / "in"), outside=tmp_path / "out"), 2)
    network = write_checkpoint(tmp_path / "two.ckpt", channels=2)
    outcome = restore_predictor([network], device="cpu").predict(sources, tmp_path / "out")
    assert not outcome.done and set(outcome.failed) == {"scan_0001", "scan_0002"}
    assert all("has 1 channels, the networks take 2" in why for why in outcome.failed.values())


def test_numbered_colour_pictures_are_images_of_their_own(tmp_path):
    for number in range(5):
        picture = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Pillow.fromarray(picture).save(tmp_path / f"frame_000{number}.png")
    sources = group_channels(find_images(str(tmp_path), outside=tmp_path / "out"), 3)
    assert [source.name for source in sources] == [f"frame_000{n}" for n in range(5)]


# ---- what was found ------------------------------------------------------------------------------


def test_the_share_of_each_class_is_recorded_and_an_empty_result_is_said(tmp_path):
    network = write_checkpoint(tmp_path / "tiny.ckpt")
    write_image(tmp_path / "in" / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 2), np.int16), np.eye(4)),
                 tmp_path / "in" / "flat.nii.gz")  # fmt: skip
    predictor = restore_predictor([network], device="cpu")
    member = predictor.members[0]

    class Nothing(type(member.network)):
        def forward(self, image):
            logits = super().forward(image)
            logits[image.amax((1, 2, 3)) == image.amin((1, 2, 3)), 0] = 1e4
            return logits

    member.network.__class__ = Nothing
    outcome = predictor.predict(
        find_images(str(tmp_path / "in"), outside=tmp_path / "out"), tmp_path / "out"
    )
    assert outcome.done == ["a", "flat"] and outcome.empty == ["flat"]
    about = json.loads((tmp_path / "out" / "a.json").read_text())
    labels = np.asarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj)
    assert list(about["voxels"].values()) == np.bincount(labels.ravel(), minlength=4).tolist()
    assert sum(outcome.voxels.values()) == labels.size + 800


def test_the_current_folder_as_a_series_is_written_into_the_folder_of_results(
    checkpoint, tmp_path, monkeypatch
):
    pytest.importorskip("pydicom")
    from data.tiny_dicom import write_series

    for name in ("one", "two"):
        monkeypatch.chdir(write_series(tmp_path / name, 3))
        assert predict(checkpoint, ".", tmp_path / "out").done == [name]
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == {"one", "two"}
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "out"}
