"""Calibration and uncertainty, from a finished run to maps, flags and the report."""

import csv
import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torchmetrics.functional.classification import multiclass_calibration_error

from mambaseg.app.ensemble import _mean, restore_predictor
from mambaseg.data.classes import IGNORED
from mambaseg.data.formats.images import Source, find_images
from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from mambaseg.evaluation.calibration import read_calibration
from mambaseg.inference import calibration
from mambaseg.inference.calibration import calibrate
from mambaseg.inference.segment import Member, segment
from mambaseg.inference.uncertainty import _flag
from mambaseg.reporting.calibration import calibration_grid, reliability
from mambaseg.reporting.collect import Comparison, Entry, collect
from mambaseg.reporting.plots import _figures
from mambaseg.reporting.report import section_of
from runs import UNET, entered, trained
from tiny_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def calibrated(shared_run):
    """A finished run that `calibration=true` has measured, and its evaluation's folder."""
    run = trained(*UNET, *shared_run)
    words = (f"run={run.folder.path}", *shared_run, "logger=csv", "callbacks.progress=null")
    assert entered("evaluate.py", *words, "calibration=true") == 0
    (evaluation,) = run.folder.path.parents[1].glob("evaluate/*/run.json")
    return run, evaluation.parent


def predict(paths, place, output, **options):
    predictor = restore_predictor(paths, device="cpu", **options)
    return predictor.predict(find_images(str(place), outside=output), output)


def table(output):
    with (output / "uncertainty.csv").open() as file:
        return list(csv.DictReader(file))


def voxels(path):
    return np.asarray(nibabel.load(path).dataobj, np.float64)


def write_scan(path, shape=(21, 34, 5)):
    scan = np.random.default_rng(0).integers(0, 900, shape).astype(np.int16)
    affine = np.diag([1.3, 1.4, 9.0, 1])
    affine[:3, 3] = -7, 8, 9
    nibabel.save(nibabel.Nifti1Image(scan, affine), path)
    return path


def test_the_temperature_is_stored_beside_the_checkpoint_and_the_errors_are_torchmetrics(
    calibrated,
):
    run, evaluation = calibrated
    stored = read_calibration(run.folder.path / "checkpoints" / "best.calibration.json")
    assert stored == read_calibration(evaluation / "calibration.json")
    assert stored["fitted_on"]["cases"] == len(run.data.cases["val"])
    # the probabilities that predict.py would write, of every test case
    shares, truth = [], []
    predictor = restore_predictor([run.folder.path], device="cpu", probabilities=True)
    for case in run.data.cases["test"]:
        volume = case.read()
        found = predictor.segment(predictor.read(Source("a", case.image_path)))
        shares.append(found.probabilities[0].reshape(4, -1).T / 255)
        truth.append(volume.label.ravel())
    expected = multiclass_calibration_error(
        torch.from_numpy(np.concatenate(shares)),
        torch.from_numpy(np.concatenate(truth).astype(int)),
        num_classes=4, n_bins=15, norm="l1",
    )  # fmt: skip
    # rounded to bytes there
    assert stored["test"]["all"]["plain"]["ece"] == pytest.approx(float(expected), abs=5e-3)


def test_evaluating_without_it_writes_the_same_scores(calibrated, shared_run):
    run, evaluation = calibrated
    before = json.loads((evaluation / "metrics.json").read_text())
    assert before["foreground"] == run.folder.summary["foreground"]
    assert "calibration" not in (evaluation / "config.yaml").read_text()


def test_other_data_are_measured_with_the_stored_temperature(calibrated, shared_run, tmp_path):
    run, _ = calibrated
    words = (*shared_run, "logger=csv", "callbacks.progress=null", "calibration=true",
             f"outputs={tmp_path}", "data.split=test", "evaluation.allow_seen=true")  # fmt: skip
    place = run.folder.path / "checkpoints"
    before = (place / "best.calibration.json").read_bytes()
    assert entered("evaluate.py", f"run={run.folder.path}", *words) == 0
    other = read_calibration(next(tmp_path.glob("evaluate/*/calibration.json")))
    stored = read_calibration(place / "best.calibration.json")
    assert (place / "best.calibration.json").read_bytes() == before
    assert other["temperature"] == stored["temperature"]
    assert other["test"] != stored["test"]
    # a checkpoint without one
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes((place / "best.ckpt").read_bytes())
    words = (*words, "data=phantom", f"outputs={tmp_path / 'refused'}")
    assert entered("evaluate.py", f"run={bare}", *words) != 0
    assert not (tmp_path / "refused").exists()  # nothing was scored for it


def test_scores_stand_whatever_comes_of_the_calibration(
    calibrated, shared_run, tmp_path, monkeypatch
):
    run, evaluation = calibrated
    monkeypatch.setattr("mambaseg.inference.calibration.calibrate", None)
    words = (*shared_run, "logger=csv", "callbacks.progress=null", f"outputs={tmp_path}")
    assert entered("evaluate.py", f"run={run.folder.path}", *words, "calibration=true") != 0
    (again,) = tmp_path.glob("evaluate/*/run.json")
    assert json.loads(again.read_text())["status"] == "done"
    assert (again.parent / "cases.csv").read_text() == (evaluation / "cases.csv").read_text()


def test_no_more_slices_go_through_the_network_than_are_asked_for():
    sizes = []

    class Recorded(torch.nn.Conv2d):
        def forward(self, image):
            sizes.append(len(image))
            return super().forward(image)

    member = Member(Recorded(1, 4, 1), Preprocessing("paper", 16))
    case = {"image": torch.rand(7, 1, 16, 16), "spacing": None,
            "label": torch.randint(0, 4, (7, 16, 16), dtype=torch.uint8)}  # fmt: skip
    calibrate(member, [case], [case], batch_size=3)
    assert max(sizes) == 3


def test_the_report_shows_it(calibrated):
    run, evaluation = calibrated
    for folder in (run.folder.path.parent, evaluation.parent):
        (comparison,), _, _ = collect(folder)
        section = section_of(comparison)
        (grid,) = [grid for grid in section.grids if grid.title == "Calibration"]
        assert grid.rows[0][0].startswith("unet") and "foreground ECE with T" in grid.header
    (make,) = [make for name, _, _, make in _figures(comparison) if name == "reliability"]
    assert [len(axis.get_lines()) for axis in make().axes] == 4 * [2]  # and the diagonal
    assert calibration_grid(replace(comparison, entries=())) is None


def test_the_errors_of_all_and_of_the_foreground_by_hand():
    network = torch.nn.Conv2d(1, 2, 1)  # odds of the class: 9 where the image is 1, else 1/25
    network.weight.data = torch.tensor([0, math.log(225)]).reshape(2, 1, 1, 1)
    network.bias.data = torch.tensor([0, -math.log(25)])
    image, label = torch.zeros(256), torch.zeros(256, dtype=torch.uint8)
    image[:160] = 1  # found: 100 rightly and 60 wrongly
    label[:100] = label[160:180] = 1  # missed: 20 of the other 96
    case = {"image": image.view(1, 1, 16, 16), "label": label.view(1, 16, 16), "spacing": None}
    fitted = {"temperature": 2.0, "fitted_on": {}, "flag": {}}  # odds 3 and 1/5
    member = Member(network, Preprocessing("paper", 16))
    test = calibrate(member, [], [case], fitted=fitted)["test"]
    for how, found, other in (("plain", 9 / 10, 25 / 26), ("calibrated", 3 / 4, 5 / 6)):
        error = abs(100 - 160 * found)
        expected = (error + abs(76 - 96 * other)) / 256
        assert test["all"][how]["ece"] == pytest.approx(expected, rel=1e-5)
        expected = (error + 20 * other) / 180
        assert test["foreground"][how]["ece"] == pytest.approx(expected, rel=1e-5)


def test_the_table_and_the_diagram_by_hand():
    keys = list(product(("all", "foreground"), ("plain", "calibrated")))

    def run(number):
        scores = {region: {} for region in ("all", "foreground")}
        for place, (region, how) in enumerate(keys):
            value = 0.1 * (place + 1) + 0.02 * number
            bins = [[0, 0, 0], [4 * (place + 1), 3 - number, 1 + number]]
            scores[region][how] = {"ece": value, "nll": 1 + value, "bins": bins}
        return SimpleNamespace(calibration={"temperature": 1.5 + 0.2 * number, "test": scores})

    entry = Entry("a network", (run(0), run(1), SimpleNamespace(calibration=None)))
    grid = calibration_grid(Comparison({}, (entry,)))
    (row,) = grid.rows
    assert dict(zip(grid.header, row, strict=True)) == {
        "network": "a network", "temperature": "1.60 ± 0.14", "runs": "2",
        "ECE": "0.1100 ± 0.0141", "ECE with T": "0.2100 ± 0.0141",
        "foreground ECE": "0.3100 ± 0.0141", "foreground ECE with T": "0.4100 ± 0.0141",
        "NLL": "1.1100 ± 0.0141", "NLL with T": "1.2100 ± 0.0141",
    }  # fmt: skip
    for place, key in enumerate(keys):  # confidence, accuracy
        (point,) = reliability(entry, *key)
        assert point == pytest.approx([5 / 8 / (place + 1), 3 / 8 / (place + 1)])


def test_a_damaged_calibration_is_named(calibrated, tmp_path):
    run, _ = calibrated
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes((run.folder.path / "checkpoints" / "best.ckpt").read_bytes())
    stored = tmp_path / "best.calibration.json"
    with pytest.raises(UserError, match="calibration=true makes it"):
        restore_predictor([checkpoint], device="cpu", calibrated=True)
    good = json.loads((run.folder.path / "checkpoints" / stored.name).read_text())
    for damage in ({"temperature": 0}, {"temperature": "1"}, {"test": {}}, {"flag": None}):
        stored.write_text(json.dumps({**good, **damage}))
        with pytest.raises(UserError, match=r"best\.calibration\.json cannot be read"):
            restore_predictor([checkpoint], device="cpu", calibrated=True)
    stored.write_text(json.dumps({**good, "checkpoint": "0" * 32}))
    with pytest.raises(UserError, match="another checkpoint"):
        restore_predictor([checkpoint], device="cpu", uncertainty=True)


# ---- maps and flags ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tta": "flips"}, {"ensemble": True}], ids=str)
def test_the_map_is_the_entropy_of_the_written_probabilities(options, tmp_path):
    paths = [write_checkpoint(tmp_path / "a.ckpt", size=16)]
    options = dict(options)
    if options.pop("ensemble", None):
        paths.append(write_checkpoint(tmp_path / "b.ckpt", seed=1, preprocessing="native"))
    scan, output = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    outcome = predict(paths, scan, output, uncertainty=True, probabilities=True, **options)
    assert outcome.done == ["scan"]
    image = nibabel.load(scan)
    found = nibabel.load(output / "scan_uncertainty.nii.gz")
    assert found.shape == image.shape and np.array_equal(found.affine, image.affine)
    shares = voxels(output / "scan_probabilities.nii.gz")
    shares /= shares.sum(-1, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy = -(shares * logs).sum(-1) / np.log(4)
    assert abs(voxels(output / "scan_uncertainty.nii.gz") - entropy).max() < 0.04
    inside = voxels(output / "scan.nii.gz") > 0
    (row,) = table(output)
    assert float(row["uncertainty"]) == pytest.approx(entropy[inside].mean(), abs=5e-3)
    assert row["flag"] == "unknown"  # these networks are not calibrated
    # nothing else changes
    plain = tmp_path / "plain"
    predict(paths, scan, plain, **options)
    assert (plain / "scan.nii.gz").read_bytes() == (output / "scan.nii.gz").read_bytes()


def test_of_a_picture_the_map_is_a_picture(tmp_path):
    names = ["background", "polyp"]
    path = write_checkpoint(tmp_path / "a.ckpt", channels=3, classes=names, preprocessing="modern")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 27, 3), np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    predict([path], tmp_path / "a.png", tmp_path / "out", uncertainty=True)
    with Pillow.open(tmp_path / "out" / "a_uncertainty.png") as picture:
        assert picture.size == (27, 40) and picture.mode == "L"
        assert np.asarray(picture).std() > 0
    # and is no image to predict, nor a label map to score
    assert [one.name for one in find_images(str(tmp_path), outside=tmp_path / "x")] == ["a"]


def test_flags_follow_the_threshold_of_the_validation_cases(calibrated, tmp_path):
    run, _ = calibrated
    checkpoint = tmp_path / "best.ckpt"
    source = run.folder.path / "checkpoints"
    checkpoint.write_bytes((source / "best.ckpt").read_bytes())
    stored = json.loads((source / "best.calibration.json").read_text())
    scan, output = run.data.cases["test"][0].image_path, tmp_path / "out"
    for low, flag in ((0.0, "look"), (1.0, "ok")):
        stored["flag"]["thresholds"] = {"plain": low, "calibrated": None}
        (tmp_path / "best.calibration.json").write_text(json.dumps(stored))
        outcome = predict([checkpoint], scan, output, uncertainty=True)  # once, then it is there
        (row,) = table(output)
        expected = "look" if row["uncertainty"] == "" else flag
        assert (row["flag"], float(row["threshold"])) == (expected, low)
        assert bool(outcome.flagged) == (expected == "look")
    assert outcome.skipped


def test_probabilities_are_those_of_the_temperature(calibrated, tmp_path):
    run, _ = calibrated
    place, scan = run.folder.path, run.data.cases["test"][0].image_path
    with_it, without = (
        predict([place], scan, tmp_path / str(how), probabilities=True, calibrated=how)
        for how in (True, False)
    )
    assert with_it.done == without.done
    name = with_it.done[0]
    warm, plain = (
        voxels(tmp_path / how / f"{name}_probabilities.nii.gz") for how in ("True", "False")
    )
    value = read_calibration(place / "checkpoints" / "best.calibration.json")["temperature"]
    expected = plain ** (1 / value)
    expected /= expected.sum(-1, keepdims=True)
    assert abs(warm - expected).max() < 0.005 and abs(warm - plain).max() > 0.015
    labels = [(tmp_path / how / f"{name}.nii.gz").read_bytes() for how in ("True", "False")]
    assert labels[0] == labels[1]
    about = json.loads((tmp_path / "True" / f"{name}.json").read_text())
    assert about["made_by"]["temperature"] == [round(value, 6)]


def test_maps_of_other_networks_are_never_served_beside_new_labels(tmp_path):
    one, other = (write_checkpoint(tmp_path / f"{i}.ckpt", seed=i) for i in (0, 1))
    scan, output, alone = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out", tmp_path / "alone"
    both = {"uncertainty": True, "probabilities": True}
    predict([one], scan, output, **both)
    predict([other], scan, output, rerun=True)
    assert sorted(path.name for path in output.iterdir()) == [
        "scan.json", "scan.nii.gz", "uncertainty.csv",
    ]  # fmt: skip
    assert table(output) == []
    assert predict([other], scan, output, **both).done == ["scan"]
    predict([other], scan, alone, **both)
    for path in alone.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_what_is_asked_for_later_comes_beside_what_is_there(tmp_path):
    place = write_checkpoint(tmp_path / "a.ckpt")
    scan, output = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    predict([place], scan, output, uncertainty=True)
    before = table(output)
    assert predict([place], scan, output, probabilities=True).done == ["scan"]
    for options in ({"uncertainty": True}, {"probabilities": True}, {}):
        assert predict([place], scan, output, **options).skipped == ["scan"]
        assert table(output) == before and before[0]["uncertainty"]
    # an earlier version did not say which maps belong to the labels
    about = json.loads((output / "scan.json").read_text())
    del about["beside"]
    (output / "scan.json").write_text(json.dumps(about))
    assert predict([place], scan, output).skipped == ["scan"]
    assert predict([place], scan, output, probabilities=True).done == ["scan"]


def test_the_table_has_all_images_of_the_folder(tmp_path):
    place, output = write_checkpoint(tmp_path / "a.ckpt"), tmp_path / "out"
    for name in ("b", "a"):
        predict([place], write_scan(tmp_path / f"{name}.nii.gz"), output, uncertainty=True)
    assert [row["case"] for row in table(output)] == ["a", "b"]
    assert table(output)[0]["uncertainty"] == table(output)[1]["uncertainty"] != ""


def test_a_table_of_somebody_else_is_kept(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "uncertainty.csv").write_text("mine\n")
    with pytest.raises(UserError, match=r"uncertainty\.csv was not made by this command"):
        predict([path], write_scan(tmp_path / "s.nii.gz"), tmp_path / "out", uncertainty=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["uncertainty.csv"]


def test_voxels_without_a_label_do_not_calibrate():
    member = Member(torch.nn.Conv2d(1, 2, 1), Preprocessing("paper", 16))
    label = torch.randint(2, (2, 16, 16), dtype=torch.uint8)
    label[:, :12] = IGNORED
    case = {"image": torch.rand(2, 1, 16, 16), "label": label, "spacing": None}
    found = calibrate(member, [case], [case])
    assert found["fitted_on"]["voxels"] == 2 * 4 * 16
    assert np.sum(found["test"]["all"]["plain"]["bins"], axis=0)[0] == 2 * 4 * 16
    with pytest.raises(UserError, match="no voxel of the validation set has a label"):
        calibrate(member, [{**case, "label": torch.full_like(label, IGNORED)}], [case])


def test_a_threshold_that_one_network_lacks_is_none_of_the_ensemble():
    assert _mean([0.2, 0.4]) == 0.30000000000000004 and _mean([0.2, None]) is _mean([]) is None


def test_a_score_at_its_threshold_is_none_to_look_at():
    assert [_flag(score, 0.5) for score in (0.4, 0.5, 0.6, None)] == ["ok", "ok", "look", "look"]


class Certain(torch.nn.Module):
    """Class 1 where the image is bright, without a doubt."""

    def forward(self, image):
        return 50 * torch.cat([-image, image], dim=1)


def test_a_certain_network_is_certain_up_to_the_border():
    """From 224 to 216 rows the published index map ends beyond the last row."""
    image = torch.full((1, 1, 216, 256), -1.0)
    image[..., 90:130, 100:150] = 1
    member = Member(Certain(), Preprocessing("paper", 224))
    found = segment([member], [image], probabilities=True, uncertainty=True)
    assert not found.uncertainty.any()
    assert set(found.probabilities.unique().tolist()) == {0, 255}
    case = {"image": image, "label": found.labels, "spacing": None}
    scores = calibrate(member, [case], [case])["test"]["all"]["plain"]
    assert scores["ece"] == pytest.approx(0, abs=1e-6)


def test_what_fits_the_temperature_keeps_no_more_than_promised(monkeypatch):
    image = torch.randn(9, 1, 32, 32, generator=torch.Generator().manual_seed(0)) / 50
    case = {"image": image, "label": (image[:, 0] > 0).to(torch.uint8), "spacing": None}
    monkeypatch.setattr(calibration, "LARGEST", 512)
    held, cat = [], torch.cat

    def spy(parts, *more, **how):
        parts = list(parts)
        if len(parts) == 3 and parts[0].ndim == 2:  # batches of three slices
            held.append(sum(one.untyped_storage().nbytes() for one in parts))
        return cat(parts, *more, **how)

    monkeypatch.setattr(torch, "cat", spy)
    calibrate(Member(Certain(), Preprocessing("native", 32)), [case], [case], batch_size=3)
    assert held and max(held) <= 4 * 512
