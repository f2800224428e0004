"""Post-processing chosen on the validation set, and regions scored: from training to report."""

import json
from dataclasses import dataclass

import nibabel
import numpy as np
import pytest
import torch

from mambaseg.app.ensemble import restore_predictor
from mambaseg.errors import UserError
from mambaseg.evaluation.case_scores import CaseScores
from mambaseg.evaluation.largest import candidates, keep_largest, voted
from mambaseg.inference.trained import Checkpoint, read_checkpoint
from mambaseg.reporting.collect import collect
from mambaseg.reporting.reading import read_run
from mambaseg.reporting.report import write_report
from mambaseg.training import post_processing
from mambaseg.training.post_processing import Validated, choose
from runs import QUIET, UNET, built, entered, small_overrides, stop_before, trained

NAMES = ("background", "RV", "LV")


@dataclass(frozen=True)
class FakeCase:
    id: str
    patient: str = "p"
    phase: str | None = None
    group: str | None = None


def case(name, prediction, truth):
    labels = [torch.tensor(one, dtype=torch.uint8) for one in (prediction, truth)]
    return Validated.of({"case": FakeCase(name), "spacing": None, "label": labels[1]}, labels[0])


def row(*labels):
    return [[list(labels)]]


def chosen(cases, regions=None):
    scores = CaseScores(class_names=NAMES, regions=regions)
    structures = regions or {"RV": (1,), "LV": (2,)}
    return choose(cases, candidates(NAMES, structures), scores)


def test_a_class_is_reduced_where_that_helps_and_no_other():
    found = chosen([
        case("a", row(1, 1, 0, 1, 2, 2, 0, 2), row(1, 1, 0, 0, 2, 2, 0, 2)),  # RV gains, LV loses
        case("b", row(1, 1, 0, 0, 2, 2, 0, 0), row(1, 1, 0, 0, 2, 2, 0, 0)),
    ])  # fmt: skip
    assert found.parts == {"RV": (1,)}
    assert found.before < found.after == 1


def test_all_classes_are_reduced_as_one_first_and_only_if_none_loses():
    stray = case("a", row(1, 2, 2, 0, 1, 0, 2), row(1, 2, 2, 0, 0, 0, 0))
    assert chosen([stray]).parts == {"foreground": (1, 2)}
    apart = case("b", row(1, 1, 1, 0, 2, 0, 1, 1), row(1, 1, 1, 0, 2, 0, 0, 0))
    assert chosen([apart]).parts == {"RV": (1,)}


def test_where_nothing_gains_nothing_is_chosen():
    right = case("a", row(1, 0, 1, 2), row(1, 0, 1, 2))
    assert chosen([right]) == ({}, 1.0, 1.0)


def test_regions_are_judged_as_regions():
    # the lone 2 is a component of its own as a class and part of the largest region
    one = case("a", row(2, 2, 1, 2, 0, 1), row(2, 2, 1, 2, 0, 0))
    assert chosen([one], {"heart": (1, 2), "core": (2,)}).parts == {"heart": (1, 2)}


NESTED = {"ET": (3,), "TC": (2, 3), "WT": (1, 2, 3)}  # as BraTS has them, not by size


def test_a_network_is_post_processed_in_the_order_in_which_that_was_chosen():
    """Evaluation takes the order of the choice; another one can leave other labels."""
    choice = candidates(("background", "oedema", "necrosis", "enhancing"), NESTED)
    assert list(choice) == ["WT", "ET", "TC"]
    labels = np.zeros((1, 12, 24), np.uint8)
    labels[:, 1:11, 1:23] = 1
    labels[:, 2:9, 2:9] = 2  # the largest core, of which little is enhancing
    labels[:, 2:4, 2:4] = 3
    labels[:, 3:8, 14:19] = 3  # a smaller one, all of it enhancing
    by_size = dict(sorted(choice.items(), key=lambda part: -len(part[1])))
    scored = keep_largest(labels, choice)
    assert (keep_largest(labels, by_size) != scored).any()
    for networks in (1, 2):
        agreed = voted([choice] * networks)
        assert list(agreed) == list(choice) and (keep_largest(labels, agreed) == scored).all()
    assert list(voted([choice, choice, {}])) == ["WT", "TC", "ET"]


# ---- a run --------------------------------------------------------------------------------------

CLASSES = ("background", "RV", "MYO", "LV")
REGIONS = {"heart": [1, 2, 3], "left": [2, 3]}


@pytest.fixture(scope="module")
def run(tmp_path_factory, phantom_root):
    torch.set_num_threads(1)  # as in the tests, whose numbers are compared
    return trained(*words(phantom_root, tmp_path_factory.mktemp("outputs")))


def words(phantom_root, outputs):
    return [
        *small_overrides(phantom_root, outputs), *UNET, "trainer=cpu", "optim=adamw",
        "data.steps=30", "data.val_every=15", "evaluation.keep_largest=auto",
        "data.regions={heart: [1, 2, 3], left: [2, 3]}", "loss=dice_ce_regions",
    ]  # fmt: skip


def test_the_choice_is_in_the_checkpoint_the_record_and_the_scores(run):
    about = read_checkpoint(run.folder.path)
    record, summary = run.folder.record["post_processing"], run.folder.summary
    assert about.keep_largest and set(about.keep_largest) <= set(REGIONS)
    kept = {name: list(labels) for name, labels in about.keep_largest.items()}
    assert kept == record["keep_largest"] == summary["keep_largest"]
    assert record["val_dice"]["before"] < record["val_dice"]["after"]
    assert run.folder.record["val_dice"] == pytest.approx(record["val_dice"]["before"])


def test_regions_have_a_row_each(run):
    summary, rows = run.folder.summary, (run.folder.path / "cases.csv").read_text().splitlines()
    assert list(summary["classes"]) == ["background", *REGIONS] and summary["regions"] == REGIONS
    assert len(rows) == 1 + 3 * summary["cases"]
    assert "val/dice_left" in (run.folder.path / "metrics.csv").read_text()


def test_the_choice_reads_no_test_case(run, phantom_root, tmp_path, monkeypatch):
    with built(*words(phantom_root, tmp_path), "test=false") as again:
        whole = again.data.evaluation_data

        def no_test(part):
            assert part != "test"
            return whole(part)

        monkeypatch.setattr(again.data, "evaluation_data", no_test)
        again.fit()
    assert again.folder.record["post_processing"] == run.folder.record["post_processing"]


def test_without_the_key_no_number_changes(run, phantom_root, tmp_path):
    plain = trained(*words(phantom_root, tmp_path), "evaluation.keep_largest=false")
    assert plain.key != run.key and "keep_largest" not in plain.folder.summary
    assert "keep_largest" not in read_checkpoint(plain.folder.path).about
    assert plain.folder.record["val_dice"] == run.folder.record["val_dice"]
    assert plain.folder.summary["foreground"] != run.folder.summary["foreground"]


def only_run(experiment):
    (file,) = experiment.glob("*/run.json")
    return read_run(file.parent)


def test_an_evaluation_follows_the_choice_unless_told_otherwise(run, tmp_path):
    own = [f"run={run.folder.path}", f"outputs={tmp_path}", "trainer=cpu", *QUIET]
    assert entered("evaluate.py", *own) == 0
    assert entered("evaluate.py", *own, "evaluation.keep_largest=false", "name=plain") == 0
    again, plain = map(only_run, (tmp_path / "evaluate", tmp_path / "plain"))
    assert again.summary["foreground"] == run.folder.summary["foreground"]
    assert again.summary["keep_largest"] == run.folder.summary["keep_largest"]
    assert plain.summary["foreground"] != run.folder.summary["foreground"]
    assert "keep_largest" not in plain.summary and again.path.name[-8:] != plain.path.name[-8:]


@pytest.fixture(scope="module")
def predicted(run, tmp_path_factory):
    """Label maps of the phantom's first patient, and where they are."""
    output = tmp_path_factory.mktemp("labels")
    image = next(run.data.root.rglob("patient001_frame01.nii.gz"))
    own = [f"run={run.folder.path}", f"input={image}", "device=cpu"]
    assert entered("predict.py", *own, f"output={output}/chosen") == 0
    assert entered("predict.py", *own, f"output={output}/plain", "keep_largest=false") == 0
    return output


def test_predict_follows_the_choice_and_says_so(run, predicted):
    plain, found = (
        nibabel.load(next((predicted / name).glob("*.nii.gz"))).get_fdata().T
        for name in ("plain", "chosen")
    )
    kept = read_checkpoint(run.folder.path).keep_largest
    expected = keep_largest(plain.astype(np.uint8), kept)
    assert (found == expected).all() and (found != plain).any()
    about = json.loads(next((predicted / "chosen").glob("*.json")).read_text())
    assert about["regions"] == REGIONS and about["labels"].keys() == {*CLASSES}
    assert set(about["made_by"]["keep_largest"]) == set(kept)
    plain = json.loads(next((predicted / "plain").glob("*.json")).read_text())
    assert plain["made_by"]["keep_largest"] is False


def test_label_maps_are_scored_by_the_regions_beside_them(predicted, tmp_path):
    (tmp_path / "truth").mkdir()
    for path in (predicted / "chosen").glob("*.nii.gz"):
        (tmp_path / "truth" / path.name).write_bytes(path.read_bytes())
    own = [f"predictions={predicted / 'chosen'}", f"references={tmp_path / 'truth'}"]
    own += [f"outputs={tmp_path / 'out'}", "evaluation.allow_seen=true"]
    assert entered("evaluate.py", *own) == 0
    run = only_run(tmp_path / "out" / "evaluate")
    assert list(run.summary["classes"]) == ["background", *REGIONS]
    assert run.summary["foreground"]["dice"]["mean"] == 1


def test_the_report_shows_regions_and_says_what_was_chosen(run):
    page = write_report(run.folder.path.parent).read_text(encoding="utf-8")
    assert "chosen in validation" in page and "largest component of" in page
    assert ">left<" in page and "Dice per class" in page
    (comparison,) = collect(run.folder.path.parent)[0]
    assert comparison.classes == tuple(REGIONS)


def test_folds_decide_together(run, monkeypatch):
    choices = [{"heart": (1, 2, 3)}, {"heart": (1, 2, 3), "left": (2, 3)}, {}]
    monkeypatch.setattr(Checkpoint, "keep_largest", property(lambda self: choices.pop(0)))
    predictor = restore_predictor([run.folder.path] * 3, device="cpu")
    assert predictor.kept == {"heart": (1, 2, 3)}


def test_a_bundle_takes_the_choice_along(run, tmp_path):
    own = [f"run={run.folder.path}", "format=bundle", f"output={tmp_path / 'b'}"]
    assert entered("export.py", *own) == 0
    bundle = read_checkpoint(tmp_path / "b")
    assert bundle.keep_largest == read_checkpoint(run.folder.path).keep_largest
    assert list(bundle.structures) == list(REGIONS)
    config = tmp_path / "b" / "config.json"
    config.write_text(config.read_text().replace('"left"', '"heart "'))
    with pytest.raises(UserError, match=r"its (regions|post-processing)"):
        read_checkpoint(tmp_path / "b")


def test_a_run_resumes_before_and_after_the_choice(run, phantom_root, tmp_path, monkeypatch):
    own = words(phantom_root, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        stop_before(20, patch)
        trained(*own)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(post_processing, "_gains", lambda *_: 1 // 0)  # while it chooses
        trained(*own)
    again = trained(*own)
    assert again.key == run.key
    for name in ("cases.csv", "metrics.json"):
        assert (again.folder.path / name).read_text() == (run.folder.path / name).read_text()


def test_nothing_is_reduced_that_costs_a_structure_more_for_all():
    one = case(
        "a", row(1, 2, 2, 2, 2, 2, 0, 2, 0, 1, 1, 1, 1), row(1, 2, 2, 2, 2, 2, 0, 2, 0, 0, 0, 0, 0)
    )
    assert chosen([one]).parts == {}  # RV would gain 0.67 and LV lose 0.09
