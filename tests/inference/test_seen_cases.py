"""Nobody is scored by a network that has learnt from them, unless that is asked for and marked."""

import json
import runpy
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from mambaseg.app.ensemble import restore_predictor
from mambaseg.app.entry import CONF
from mambaseg.data.formats.images import find_images
from mambaseg.errors import UserError
from mambaseg.inference.folder_scores import score_folders
from mambaseg.inference.trained import read_checkpoint
from mambaseg.reporting.report import write_report
from mambaseg.reporting.tables import table_of
from runs import built, trained
from tiny_pictures import blob, mask, save

OTHER = "+data.split_seed=1"  # draws others for the test part
UNET = "model=unet", "model.widths=[4,8,8,8,8]"


@pytest.fixture(scope="module")
def finished(shared_run):
    return trained(*UNET, *shared_run)


def evaluated(checkpoint, *overrides):
    path = getattr(getattr(checkpoint, "folder", None), "path", checkpoint)
    return trained(f"checkpoint={path}", *overrides, script="evaluate")


def cases_tested(*overrides):
    """The cases of the test part under these overrides, and whose they are."""
    return {case.id: case.patient for case in built(*overrides).data.cases["test"]}


def learnt_from(run):
    return {case.id for part in ("train", "val") for case in run.data.cases[part]}


def test_its_own_test_part_is_scored(finished, small_run):
    run = evaluated(finished, *small_run)
    assert run.folder.summary["seen"] == {"checked": True, "cases": {}}
    assert finished.folder.summary["seen"] == {"checked": True, "cases": {}}
    assert "SEEN" not in str(table_of(run.folder.summary, run.config).caption)


def test_patients_that_trained_are_refused_by_name(finished, small_run, tmp_path):
    overlap = cases_tested(*small_run, OTHER).keys() & learnt_from(finished)
    assert overlap
    with pytest.raises(UserError, match=r"evaluation\.allow_seen=true") as refused:
        evaluated(finished, *small_run, OTHER)
    assert all(case in str(refused.value) for case in overlap)
    assert not (tmp_path / "outputs" / "evaluate").exists()


def test_seen_cases_are_scored_when_asked_for_and_marked_everywhere(finished, small_run):
    run = evaluated(finished, *small_run, OTHER, "evaluation.allow_seen=true")
    overlap = cases_tested(*small_run, OTHER).keys() & learnt_from(finished)
    seen = json.loads((run.folder.path / "metrics.json").read_text())["seen"]
    assert seen["cases"].keys() == overlap
    assert f"SEEN CASES: the network was trained or chosen on {len(overlap)} of the" in str(
        table_of(run.folder.summary, run.config).caption
    )
    page = write_report(run.folder.path.parent)
    for file in ("table.md", page.name):
        assert "SEEN CASES" in (page.parent / file).read_text(encoding="utf-8")
    # scored once, and not to be had afterwards without saying it again
    with pytest.raises(UserError, match="allow_seen"):
        evaluated(finished, *small_run, OTHER)


def resaved(root, folder):
    """The same patients renamed: flipped, as floats, not compressed, at another place."""
    for old in sorted(root.glob("patient*")):
        number = int(old.name.removeprefix("patient"))
        new = folder / f"patient{500 - number}"
        new.mkdir(parents=True)
        for file in old.iterdir():
            name = file.name.replace(old.name, new.name).removesuffix(".gz")
            if file.suffix == ".cfg":
                (new / name).write_bytes(file.read_bytes())
                continue
            image = nib.load(file)
            array = np.asarray(image.dataobj)[::-1, :, ::-1]
            array = array if "_gt" in name else (array * np.float64(0.37)).astype(np.float64)
            affine = image.affine.copy()
            affine[:3, 3] += 11
            made = nib.Nifti1Image(array, affine)
            made.header.set_zooms(image.header.get_zooms())
            nib.save(made, new / name)
    return folder


def test_the_same_images_under_other_names_and_headers_are_recognised(
    finished, small_run, phantom_root, tmp_path
):
    root = resaved(phantom_root, tmp_path / "elsewhere")
    words = [word for word in small_run if not word.startswith("data")]
    words += [word for word in small_run if "size" in word or "cache_dir" in word]
    words += ["data=acdc", f"data.root={root}", "data.split=random"]
    pictures = {500 - int(p.removeprefix("patient")) for p in cases_tested(*words).values()}
    seen = {int(case[7:10]) for case in learnt_from(finished)} & pictures
    assert seen
    with pytest.raises(UserError, match="allow_seen") as refused:
        evaluated(finished, *words)
    assert all(f"patient{500 - number}_ED" in str(refused.value) for number in seen)


def test_a_checkpoint_names_nobody(finished):
    about = read_checkpoint(finished.folder.path).about
    assert set(about["seen"]) == {"train", "val", "test", "earlier", "complete"}
    cases = finished.data.cases
    assert {part: len(about["seen"][part]) for part in cases} == {
        part: len(of_part) for part, of_part in cases.items()
    }
    about["supervision"] = [*about["supervision"].values()]  # its key `patients` is no name
    text = json.dumps(about)
    assert "patient" not in text and str(finished.data.root) not in text


def test_a_checkpoint_from_before_is_scored_with_a_note(finished, small_run, tmp_path, caplog):
    content = torch.load(
        finished.folder.path / "checkpoints" / "best.ckpt", weights_only=True, map_location="cpu"
    )
    del content["mambaseg"]["seen"]
    path = tmp_path / "old.ckpt"
    torch.save(content, path)
    run = evaluated(path, *small_run, OTHER)
    assert run.folder.summary["seen"] == {"checked": False, "cases": {}}
    assert caplog.text.count("cannot be checked") == 1


def test_what_its_parent_has_seen_is_seen_by_a_network_that_goes_on_from_it(
    finished, small_run, tmp_path
):
    warm = f"+checkpoint={finished.folder.path}", *small_run, "data.prepare=null"
    with pytest.raises(UserError, match="allow_seen"):
        built(*UNET, *warm, OTHER)
    child = trained(*UNET, *warm)
    earlier = read_checkpoint(child.folder.path).seen.earlier
    seen = read_checkpoint(finished.folder.path).seen
    assert earlier == seen.train | seen.val
    assert evaluated(child, *small_run).folder.summary["seen"]["cases"] == {}


@pytest.fixture(scope="module")
def validated_on_test(tmp_path_factory):
    """A data set that publishes a training and a test part, and a run of it."""
    place = tmp_path_factory.mktemp("given")
    for number in range(6):
        pixels, disc = blob(number)
        part = "train" if number < 4 else "test"
        save(place / "data" / part / "images" / f"a{number}.png", pixels)
        save(place / "data" / part / "masks" / f"a{number}.png", mask(disc))
    words = [
        "data=folder", f"data.root={place / 'data'}", f"data.cache_dir={place / 'cache'}",
        f"outputs={place / 'outputs'}", "data.size=32", "data.batch_size=2", "data.steps=2",
        "data.val_every=2",
    ]  # fmt: skip
    return trained(*UNET, *words), words


def test_validation_on_the_test_part_is_excused_in_its_own_published_split_only(validated_on_test):
    run, words = validated_on_test
    again = evaluated(run, *words)
    assert "Validation = test" in again.folder.summary["split"]["note"]
    assert again.folder.summary["seen"]["cases"] == {}
    with pytest.raises(UserError, match=r"chose its checkpoint|trained it"):
        evaluated(run, *words, "data.split=random")


def test_a_training_image_with_the_name_of_a_test_image_is_not_excused(validated_on_test):
    run, words = validated_on_test
    root = run.data.root
    other = root.with_name("exchanged")
    for number in range(6):
        part = "train" if number < 4 else "test"
        for kind in ("images", "masks"):
            name = f"a{(number + 4) % 6}.png"
            source = next(root.glob(f"*/{kind}/{name}"))
            target = other / part / kind / f"a{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    with pytest.raises(UserError, match="2 trained it"):
        evaluated(run, *words, f"data.root={other}")


def predicted(checkpoints, cases, place):
    """Label maps of cases, and their references, in two folders."""
    for case in cases:
        for kind, path in (("images", case.image_path), ("truth", case.label_path)):
            (place / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place / kind / f"{case.id}.nii.gz")
    predictor = restore_predictor(checkpoints, device="cpu")
    outcome = predictor.predict(
        find_images(str(place / "images"), outside=place / "labels"), place / "labels"
    )
    assert len(outcome.done) == len(cases)
    return place / "labels", place / "truth"


def scored(folders, place, **evaluation):
    evaluation = {"empty": "strict", "tolerance_mm": 2.0, "keep_largest": False, **evaluation}
    return score_folders(*folders, class_names=None, evaluation=evaluation, outputs=place)[0]


def test_label_maps_say_whether_their_network_has_seen_the_image(finished, tmp_path):
    cases = finished.data.cases
    fresh = predicted([finished.folder.path], cases["test"], tmp_path / "fresh")
    assert scored(fresh, tmp_path).summary["seen"] == {"checked": True, "cases": {}}

    # ED of a training patient renamed, and somebody else's label map of his ES
    known = [replace(case, id=f"anna_{case.phase}") for case in cases["train"][:2]]
    assert cases["train"][0].patient == cases["train"][1].patient
    folders = predicted([finished.folder.path], [*known, *cases["test"]], tmp_path / "seen")
    (folders[0] / "anna_ES.json").unlink()
    with pytest.raises(UserError, match=r"2 trained it \(anna_ED, anna_ES\)"):
        scored(folders, tmp_path)
    run = scored(folders, tmp_path, allow_seen=True)
    assert run.summary["seen"]["cases"] == {"anna_ED": "trained", "anna_ES": "trained"}
    assert "SEEN CASES" in write_report(run.path.parent).read_text(encoding="utf-8")


def test_of_an_ensemble_one_network_that_has_seen_an_image_is_enough(finished, small_run, tmp_path):
    other = trained(*UNET, *small_run, OTHER)
    case = next(case for case in finished.data.cases["test"] if case.id in learnt_from(other))
    folders = predicted([finished.folder.path, other.folder.path], [case], tmp_path / "both")
    with pytest.raises(UserError, match=f"1 (trained it|chose its checkpoint) .{case.id}"):
        scored(folders, tmp_path)


def test_label_maps_of_a_published_test_part_are_scored_with_its_note(validated_on_test, tmp_path):
    run, _ = validated_on_test
    images, truth = run.data.root / "test" / "images", tmp_path / "truth"
    restore_predictor([run.folder.path], device="cpu").predict(
        find_images(str(images), outside=tmp_path / "labels"), tmp_path / "labels"
    )
    truth.mkdir()
    for label in (run.data.root / "test" / "masks").iterdir():
        save(truth / label.name, (np.asarray(Image.open(label)) > 0).astype(np.uint8))
    summary = scored((tmp_path / "labels", truth), tmp_path).summary
    assert "2 cases validated the network too" in summary["split"]["note"]
    assert summary["seen"] == {"checked": True, "cases": {}}


def test_an_exported_network_takes_its_lists_along(finished, tmp_path, monkeypatch):
    output = tmp_path / "network.pt2"
    words = f"run={finished.folder.path}", "format=torch", f"output={output}"
    monkeypatch.setattr("sys.argv", ["export.py", *words])
    runpy.run_path(str(CONF.parent / "src" / "export.py"), run_name="__main__")
    about = json.loads(output.with_name("network.pt2.json").read_text())
    assert about["seen"] == read_checkpoint(finished.folder.path).about["seen"]
