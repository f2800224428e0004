"""Label maps in a folder are scored as a run's test part is, and make the same page."""

import csv
import json
import sys

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from scipy import ndimage

from mambaseg.app.console import main
from mambaseg.app.ensemble import restore_predictor
from mambaseg.data.formats.images import find_images
from mambaseg.errors import UserError
from mambaseg.evaluation import largest
from mambaseg.evaluation.metrics import score_case
from mambaseg.evaluation.summary import summarise
from mambaseg.inference.folder_scores import score_folders
from mambaseg.inference.label_pairs import find_pairs
from mambaseg.reporting.reading import read_run
from mambaseg.reporting.report import write_report
from reporting.fake_runs import heart, predicted
from runs import built
from tiny_checkpoints import CLASSES, WIDTHS, original_unet, tiny_unet, write_checkpoint

SPACING = (10.0, 1.5, 1.25)  # z, y, x
EACH = {"RV": (1,), "MYO": (2,), "LV": (3,)}
EVALUATION = {"empty": "penalty", "tolerance_mm": 3.0, "keep_largest": False}
CASES = ["p1_ED", "p1_ES", "p2_ED", "p2_ES"]


def write_labels(path, labels, *, origin=(0.0, 0.0, 0.0)):
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    affine[:3, 3] = origin
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(labels.T, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


@pytest.fixture
def folders(tmp_path):
    """Folders of predictions (with what their labels mean) and of references, and the arrays."""
    arrays, rng = {}, np.random.default_rng(0)
    for case in CASES:
        truth = heart(int(case[1]), case[-2:])
        labels = predicted(truth, 0.5, rng)
        if case == "p2_ES":
            labels[labels == 1] = 0
        write_labels(tmp_path / "labels" / f"{case}.nii.gz", labels)
        write_labels(tmp_path / "truth" / f"{case}_gt.nii.gz", truth)
        about = {"labels": {name: index for index, name in enumerate(CLASSES)}}
        (tmp_path / "labels" / f"{case}.json").write_text(json.dumps(about))
        arrays[case] = labels, truth
    return tmp_path / "labels", tmp_path / "truth", arrays


def scored(folders, **changes):
    labels, truth, _ = folders
    arguments = {"class_names": None, "evaluation": EVALUATION, "outputs": labels.parent / "runs"}
    return score_folders(labels, truth, **{**arguments, **changes})[0]


@pytest.mark.parametrize("keep_largest", [False, True])
def test_every_row_is_what_the_metrics_say_of_the_arrays(folders, keep_largest):
    folder = scored(folders, evaluation={**EVALUATION, "keep_largest": keep_largest})
    run = read_run(folder.path)
    expected = []
    for case, (labels, truth) in folders[2].items():
        labels = largest.keep_largest(labels, EACH) if keep_largest else labels
        rows = score_case(
            labels, truth, num_classes=4, spacing=SPACING, policy="penalty", tolerance_mm=3.0
        )
        identity = {"case": case, "patient": case[:2], "phase": case[-2:], "group": None}
        expected += [{**identity, "class_name": CLASSES[row["class"]], **row} for row in rows]
    assert list(run.rows) == expected
    outcomes = {row["outcome"] for row in run.rows}
    assert outcomes == {"scored", "missed"}
    summary = summarise(expected, CLASSES)
    assert folder.summary["foreground"] == summary["foreground"]
    assert folder.summary["by_phase"].keys() == {"ED", "ES"}
    assert (run.model, run.summary["data"]) == ("labels", "truth")


def test_two_views_of_a_heart_are_of_one_patient(tmp_path, caplog):
    """As CAMUS names them: each view counted as a patient, without a word."""
    for patient in ("patient0001", "patient0002"):
        for view in ("2CH", "4CH"):
            for place, mark in (("labels", ""), ("truth", "_gt")):
                write_labels(tmp_path / place / f"{patient}_{view}_ED{mark}.nii.gz",
                             heart(1, "ED"))  # fmt: skip
    folders = (tmp_path / "labels", tmp_path / "truth", None)
    run = read_run(scored(folders, class_names=CLASSES).path)
    assert len({row["patient"] for row in run.rows}) == 4
    assert "patient_pattern=" in caplog.text and "each case counts as a patient" in caplog.text
    caplog.clear()
    run = read_run(scored(folders, class_names=CLASSES, patient_pattern="^([^_]+)").path)
    assert {row["patient"] for row in run.rows} == {"patient0001", "patient0002"}
    assert {row["phase"] for row in run.rows} == {"ED"} and "patient_pattern" not in caplog.text
    with pytest.raises(UserError, match="finds no patient in patient0001_2CH_ED"):
        scored(folders, class_names=CLASSES, patient_pattern="heart")


def test_frames_that_a_cines_reference_leaves_open_are_not_scored(tmp_path, caplog):
    """As M&Ms labels ED and ES: perfect predictions of a whole cine had a Dice of 0.17."""
    frames = np.stack([heart(1, "ED"), heart(1, "ED"), heart(1, "ES")])
    write_labels(tmp_path / "labels" / "A_sa.nii.gz", frames)
    frames[1] = 0
    write_labels(tmp_path / "truth" / "A_sa_gt.nii.gz", frames)
    folder = scored((tmp_path / "labels", tmp_path / "truth", None), class_names=CLASSES)
    assert {row["case"] for row in read_run(folder.path).rows} == {"A_sa_frame01", "A_sa_frame03"}
    assert folder.summary["foreground"]["dice"]["mean"] == 1.0
    assert folder.summary["split"]["note"].startswith("1 frames of cines")
    assert "1 frames left out" in caplog.text


def test_a_pattern_for_label_maps_is_refused_beside_a_run(monkeypatch, capfd, tmp_path):
    (file := tmp_path / "some.ckpt").touch()
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, f"run={file}", "patient_pattern=p")
    assert "with run= give data.patient_pattern=" in capfd.readouterr().err


def test_a_label_map_is_no_training(folders):
    """It stood beside the paper's fully supervised table, with a seed."""
    run = read_run(scored(folders).path)
    assert run.rescored and run.supervision == "not recorded"


def test_it_makes_the_same_page(folders):
    folder = scored(folders)
    page = write_report(folder.path.parent).read_text(encoding="utf-8")
    assert "labels" in page and "truth, split all files" in page


def test_the_same_files_are_scored_once_and_other_files_anew(folders):
    first = scored(folders)
    record = first.record
    assert scored(folders).record == record
    write_labels(folders[0] / "p1_ED.nii.gz", heart(1, "ED"))
    assert scored(folders).path != first.path
    assert scored(folders, evaluation={**EVALUATION, "empty": "strict"}).path != first.path


def test_names_may_be_given_and_lie_in_subfolders_without_a_mark(tmp_path):
    truth = heart(1, "ED")
    for place in ("labels", "truth"):
        write_labels(tmp_path / place / "p1" / "p1_frame01.nii.gz", truth)
    (pair,) = find_pairs(tmp_path / "labels", tmp_path / "truth")
    assert (pair.case.id, pair.case.patient, pair.case.phase) == ("p1/p1_frame01", "p1/p1", None)
    folder = scored((tmp_path / "labels", tmp_path / "truth", None), class_names=list("ABCD"))
    assert folder.summary["classes"]["D"]["dice"]["mean"] == 1.0
    with pytest.raises(UserError, match="C, c is there more than once"):
        scored((tmp_path / "labels", tmp_path / "truth", None), class_names=[*"ABC", "c"])


def test_label_maps_are_not_scored_against_themselves(folders, tmp_path):
    (other := tmp_path / "linked").symlink_to(folders[0])
    for references in (folders[0], other):
        with pytest.raises(UserError, match=r"hold the same files \(p1_ED"):
            find_pairs(folders[0], references)


def test_probabilities_beside_the_labels_are_not_scored(folders):
    (folders[0] / "p1_ED_probabilities.nii.gz").write_bytes(b"whatever")
    assert scored(folders).summary["cases"] == 4


def predicted_files(tmp_path, name, write):
    """A folder of all that predict.py writes for what `write` made, and an empty one."""
    checkpoint = write_checkpoint(tmp_path / "tiny.ckpt")
    write(tmp_path / name)
    output, truth = tmp_path / "labels", tmp_path / "truth"
    sources = find_images(str(tmp_path / name), outside=output)
    restore_predictor([checkpoint], device="cpu", overlay=True, probabilities=True).predict(
        sources, output
    )
    truth.mkdir()
    return output, truth


def rows_of(arrays, spacing):
    """Dice and surface columns of (case, prediction, reference), straight from the metrics."""
    return [
        {"case": case, **row}
        for case, labels, truth in arrays
        for row in score_case(
            labels, truth, num_classes=4, spacing=spacing, policy="penalty", tolerance_mm=3.0
        )
    ]


def test_every_frame_of_a_predicted_cine_is_a_case(tmp_path):
    def write(path):
        voxels = np.random.default_rng(0).integers(0, 900, (21, 18, 3, 4)).astype(np.int16)
        image = nibabel.Nifti1Image(voxels, np.diag([1.25, 1.5, 10.0, 1.0]))
        image.header.set_xyzt_units("mm", "sec")
        nibabel.save(image, path)

    output, truth = predicted_files(tmp_path, "p1.nii.gz", write)
    predicted = nibabel.load(output / "p1.nii.gz")
    labels = np.asarray(predicted.dataobj)
    reference = np.roll(labels, 1, axis=0)
    nibabel.save(nibabel.Nifti1Image(reference, predicted.affine, predicted.header),
                 truth / "p1.nii.gz")  # fmt: skip
    run = read_run(scored((output, truth, None)).path)
    frames = [(f"p1_frame{t + 1:02d}", labels[..., t].T, reference[..., t].T) for t in range(4)]
    expected = rows_of(frames, SPACING)
    assert [{key: row[key] for key in expected[0]} for row in run.rows] == expected
    assert {row["patient"] for row in run.rows} == {"p1"}
    write_labels(output / "p1_frame02.nii.gz", labels[..., 1].T)
    write_labels(truth / "p1_frame02.nii.gz", labels[..., 1].T)
    with pytest.raises(UserError, match="two cases of the name p1_frame02"):
        scored((output, truth, None), rerun=True)


def test_predicted_pictures_are_scored_one_by_one(tmp_path):
    def write(path):
        path.mkdir()
        for name in "ab":
            pixels = np.random.default_rng(ord(name)).integers(0, 255, (23, 31))
            Pillow.fromarray(pixels.astype(np.uint8)).save(path / f"{name}.png")

    output, truth = predicted_files(tmp_path, "images", write)
    assert (output / "a_overlay.png").is_file()
    arrays = []
    for name in "ab":
        labels = np.asarray(Pillow.open(output / f"{name}.png"))
        reference = np.roll(labels, 2, axis=0)
        picture = Pillow.fromarray(reference)
        if name == "b":  # as other programs save theirs: indices of a palette
            picture = picture.convert("P")
            picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
        picture.save(truth / f"{name}_gt.png")
        arrays.append((name, labels[None], reference[None]))
    folder = scored((output, truth, None))
    expected = rows_of(arrays, None)
    run = read_run(folder.path)
    assert [{key: row.get(key) for key in expected[0]} for row in run.rows] == expected
    assert folder.summary["cases"] == 2
    Pillow.new("RGB", (31, 23), (9, 200, 70)).save(truth / "b_gt.png")
    with pytest.raises(UserError, match=r"b_gt\.png: .*colours"):
        scored((output, truth, None))


def damage(what, labels, truth):
    volume = heart(1, "ED")
    if what == "a prediction is missing":
        (labels / "p1_ES.nii.gz").unlink()
    elif what == "a reference is missing":
        (truth / "p1_ES_gt.nii.gz").unlink()
    elif what == "another shape":
        write_labels(labels / "p1_ED.nii.gz", volume[:4])
    elif what == "another place":
        write_labels(labels / "p1_ED.nii.gz", volume, origin=(0, 0, 5))
    elif what == "an unknown label":
        write_labels(labels / "p1_ED.nii.gz", volume + np.uint8(7))
    elif what == "other names":
        (labels / "p2_ED.json").write_text('{"labels": {"background": 0, "LV": 1}}')
    elif what == "no names":
        for path in labels.glob("*.json"):
            path.unlink()
    elif what == "names that are none":
        (labels / "p1_ED.json").write_text('{"labels": {"background": 0, "LV": [1]}}')
    elif what == "unfinished":
        about = json.loads((labels / "p2_ED.json").read_text())
        (labels / "p2_ED.json").write_text(json.dumps({**about, "unfinished": True}))
    elif what == "twice":
        write_labels(labels / "p1_ED.nii", volume)


@pytest.mark.parametrize(("what", "message"), [
    ("a prediction is missing", r"labels holds no partner of 1 .*\(p1_ES\)"),
    ("a reference is missing", r"truth holds no partner of 1 .*\(p1_ES\)"),
    ("another shape", r"p1_ED\.nii\.gz: the prediction has \d+ × .*voxels.*p1_ED_gt.*voxels"),
    ("another place", r"p1_ED\.nii\.gz: the prediction has the affine"),
    ("an unknown label", r"p1_ED\.nii\.gz: the label map holds the value 10"),
    ("other names", r"p2_ED\.json names the classes"),
    ("no names", "give class_names"),
    ("names that are none", r"p1_ED\.json names no classes"),
    ("unfinished", r"1 of 4 predictions were interrupted \(.*labels/p2_ED\.nii\.gz\)"),
    ("twice", "there twice"),
])  # fmt: skip
def test_what_does_not_belong_together_is_said_and_nothing_is_written(folders, what, message):
    damage(what, *folders[:2])
    with pytest.raises(UserError, match=message):
        scored(folders)
    assert not (folders[0].parent / "runs").exists()


def test_predictions_of_several_networks_are_warned_of(folders, caplog):
    for index, path in enumerate(sorted(folders[0].glob("*.json"))):
        path.write_text(json.dumps({**json.loads(path.read_text()), "made_by": {"tta": index > 2}}))
    scored(folders)
    assert "different networks" in caplog.text


def test_a_folder_that_is_missing_or_empty_is_said(folders, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*absent"):
        scored((tmp_path / "absent", *folders[1:]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no label map"):
        scored((folders[0], tmp_path / "empty", None))


# ---- the command ---------------------------------------------------------------------------------


def evaluate(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mambaseg"])  # which the command replaces
    main(["evaluate", *map(str, words)])


def test_the_command_prints_the_table_and_keeps_the_scores(folders, monkeypatch, capsys):
    words = [f"predictions={folders[0]}", f"references={folders[1]}"]
    evaluate(monkeypatch, *words, f"outputs={folders[0].parent}/outputs", "evaluation.empty=legacy")
    assert "labels · truth" in capsys.readouterr().out
    (path,) = (folders[0].parent / "outputs" / "evaluate").glob("*/cases.csv")
    assert "legacy" in path.read_text()


EXCESS = """
from mambaseg.evaluation.metrics import Metric

class Excess(Metric):
    def __init__(self, limit):
        super().__init__("excess", "excess")
        self.limit = limit

    def measure(self, prediction, reference, spacing):
        return max(0, int(prediction.sum()) - self.limit)
"""


def test_the_command_takes_further_metrics(folders, monkeypatch):
    words = [f"predictions={folders[0]}", f"references={folders[1]}"]
    outputs = folders[0].parent / "outputs"
    evaluate(monkeypatch, *words, f"outputs={outputs}")
    evaluate(monkeypatch, *words, f"outputs={outputs}", "metric=volumetric_similarity")
    heads = [path.read_text().splitlines()[0] for path in outputs.glob("evaluate/*/cases.csv")]
    assert len(heads) == 2  # not taken for the same result
    assert sum("volumetric_similarity" in head for head in heads) == 1
    (outputs / "excess_metric.py").write_text(EXCESS)
    monkeypatch.syspath_prepend(outputs)
    for limit in (1, 10**9):  # nor with another argument
        own = f"+metric.excess={{_target_: excess_metric.Excess, limit: {limit}}}"
        evaluate(monkeypatch, *words, f"outputs={outputs}", own)
    found = [path.read_text() for path in outputs.glob("evaluate/*/cases.csv")]
    assert len(found) == len(set(found)) == 4


def contour_hd95(*masks):
    """HD95 in mm of masks that go on beyond the last column; None where one has no surface."""
    if not all(mask.any() for mask in masks):
        return None
    borders = []
    for mask in masks:
        longer = np.pad(mask, ((0, 0), (0, 0), (0, 1)), mode="edge")
        borders.append(mask & ~ndimage.binary_erosion(longer)[..., :-1])
    away = [ndimage.distance_transform_edt(~border, sampling=SPACING) for border in borders]
    return np.percentile(np.concatenate([away[1][borders[0]], away[0][borders[1]]]), 95)


def test_pixels_without_a_label_are_left_out(folders, monkeypatch):
    labels, truth, arrays = folders
    known = dict.fromkeys(CASES)
    for case in CASES:
        open_ = arrays[case][1].copy()
        known[case] = open_.shape[2] // 2
        open_[..., known[case] :] = 200
        write_labels(truth / f"{case}_gt.nii.gz", open_)
    words = [f"predictions={labels}", f"references={truth}", f"outputs={labels.parent}/outputs"]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, *words)
    evaluate(monkeypatch, *words, "ignore_label=200")
    (path,) = (labels.parent / "outputs" / "evaluate").glob("*/cases.csv")
    with path.open() as file:
        found = {(row["case"], int(row["class"])): row for row in csv.DictReader(file)}
    for case in CASES:
        parts = [np.ascontiguousarray(one[..., : known[case]]) for one in arrays[case]]
        for row in score_case(*parts, num_classes=len(CLASSES), spacing=SPACING):
            own = found[case, row["class"]]
            for key in ("dice", "accuracy", "specificity", "reference_voxels"):
                assert own[key] == ("" if row[key] is None else str(row[key])), key
            distance = contour_hd95(*(part == row["class"] for part in parts))
            told = float(own["hd95_mm"]) if own["hd95_mm"] else None
            assert told == pytest.approx(distance), row["class_name"]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, *words, "ignore_label=2")


@pytest.mark.parametrize(
    "words", [[], ["predictions=x"], ["run=x", "predictions=x", "references=y"]]
)
def test_half_a_question_is_answered_with_the_whole_one(monkeypatch, capsys, words, tmp_path):
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, *words, f"outputs={tmp_path}")
    error = capsys.readouterr().err
    assert "give run=" in error and "references=" in error


# ---- weights of the original repository ----------------------------------------------------------


UNET = ["model=unet", f"model.widths={WIDTHS}", "model.dropout=[0,0]"]


def test_an_original_state_dict_is_scored_with_the_network_that_is_named(small_run, tmp_path):
    network = tiny_unet()
    torch.save(original_unet(network), tmp_path / "unet.pth")
    with built(f"run={tmp_path}/unet.pth", *UNET, *small_run, script="evaluate") as run:
        loaded = run.task.network.state_dict()
        assert loaded.keys() == network.state_dict().keys()
        assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
        run.evaluate()
    assert run.folder.summary["checkpoint"].endswith("unet.pth")
    assert not {"run", "predictions", "references", "class_names"} & run.config.keys()


@pytest.mark.parametrize(("words", "message"), [
    (UNET[:1], "not one of UNet"),
    (["model=segresnet"], "cannot be read for this"),
    ([], "load_original_state_dict"),
])  # fmt: skip
def test_an_original_state_dict_of_another_network_is_refused(small_run, tmp_path, words, message):
    torch.save(original_unet(tiny_unet()), tmp_path / "unet.pth")
    with pytest.raises(UserError, match=message):
        built(f"run={tmp_path}/unet.pth", *words, *small_run, script="evaluate")


@pytest.mark.parametrize("where", ["class_names", "reference"])
def test_labels_that_mean_something_else_on_the_other_side_are_refused(folders, where):
    exchanged = ["background", "LV", "MYO", "RV"]
    assert exchanged != list(CLASSES) and sorted(exchanged) == sorted(CLASSES)
    if where == "reference":
        about = {"labels": {name: index for index, name in enumerate(exchanged)}}
        (folders[1] / "p1_ED_gt.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="mean the same"):
        scored(folders, class_names=exchanged if where == "class_names" else None)
    assert not (folders[0].parent / "runs").exists()
