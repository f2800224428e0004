"""What is averaged together, what is kept apart, and what a reader is told."""

import json
import shutil
from statistics import fmean, stdev

import pytest
import yaml
from fake_runs import NAMES, OPTIMIZERS, write_run

from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import Metric
from mambaseg.evaluation.summary import summarise
from mambaseg.reporting.beside import beside_the_papers
from mambaseg.reporting.cautions import cautions
from mambaseg.reporting.collect import collect
from mambaseg.reporting.labels import differences, labels
from mambaseg.reporting.paired import scored
from mambaseg.reporting.protocol import protocol_grid
from mambaseg.reporting.reading import read_run, training_of
from mambaseg.reporting.scores import (
    best_middle_worst,
    estimate,
    outcomes,
    patient_scores,
)
from mambaseg.reporting.tables import cell, score_grids

DICE, HD95 = Metric("dice", "Dice"), Metric("hd95_mm", "HD95", decimals=2, empty="distance")
FEW = {"patients": (1, 2), "size": 16}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two networks, two seeds each; mamba_unet never finds the right ventricle of patient 2."""
    folder = tmp_path_factory.mktemp("outputs") / "seeds"
    for seed in (1, 2):
        write_run(folder, "unet", seed=seed, **FEW)
        write_run(folder, "mamba_unet", seed=seed, misses=[(2, 1)], **FEW)
    return folder


def test_seeds_are_one_row_and_networks_are_in_the_papers_order(seeds):
    (comparison,), _, problems = collect(seeds)
    assert [entry.label for entry in comparison.entries] == ["unet", "mamba_unet"]
    assert [list(entry.by_seed) for entry in comparison.entries] == [[1, 2], [1, 2]]
    assert comparison.unit == "mm" and problems == []


def test_the_mean_over_cases_is_that_of_each_runs_own_summary(seeds):
    (comparison,), _, _ = collect(seeds)
    for entry in comparison.entries:
        for average, part in (("cases", "foreground"), ("background", "all")):
            for metric in ("dice", "hd95_mm", "precision"):
                means = [run.summary[part][metric]["mean"] for run in entry.runs]
                score = estimate(entry, metric, average=average)
                assert score.mean == pytest.approx(fmean(means))
                assert score.sd == pytest.approx(stdev(means))


def test_missed_structures_are_zero_in_dice_and_counted_out_of_distances(seeds, monkeypatch):
    (comparison,), _, _ = collect(seeds)
    mamba = comparison.entries[1]
    assert outcomes(mamba) == {"scored": 20, "missed": 4, "false_positive": 0, "both_empty": 0}
    assert estimate(mamba, "dice").undefined == 0
    distance = estimate(mamba, "hd95_mm", class_name="RV")
    assert (distance.values, distance.undefined) == (4, 4)
    there = {"scored": 20, "missed": 4, "false_positive": 3, "both_empty": 5}
    monkeypatch.setattr("mambaseg.reporting.cautions.outcomes", lambda _: there)
    assert any(
        "mamba_unet found nothing for 4 of 24 structures and invented 3 of 8 that are not" in said
        for said in cautions(comparison)
    ), "what is not in the reference cannot be missed"


def test_a_mean_over_some_seeds_only_says_so(tmp_path):
    write_run(tmp_path, seed=1, **FEW)
    write_run(tmp_path, seed=2, misses=[(1, 1), (2, 1)], **FEW)
    (comparison,), _, _ = collect(tmp_path)
    score = estimate(comparison.entries[0], "hd95_mm", class_name="RV")
    assert cell(score, HD95).endswith(" (1 of 2 seeds)") and "±" not in cell(score, HD95)
    assert "seeds" not in cell(estimate(comparison.entries[0], "dice"), DICE)


def test_pooled_dice_is_that_of_all_voxels_at_once(seeds):
    (comparison,), _, _ = collect(seeds)
    entry = comparison.entries[1]
    per_seed = []
    for rows in entry.by_seed.values():
        dice = []
        for index in (1, 2, 3):
            own = [row for row in rows if row["class"] == index]
            # the overlap from another column than the one the report uses
            common = sum((row["precision"] or 0) * row["voxels"] for row in own)
            dice.append(2 * common / sum(r["voxels"] + r["reference_voxels"] for r in own))
        per_seed.append(fmean(dice))
    assert estimate(entry, "dice", average="pooled").mean == pytest.approx(fmean(per_seed))
    assert estimate(entry, "iou", average="pooled").mean is None


def test_a_patients_score_is_averaged_over_cases_classes_and_seeds(seeds):
    (comparison,), _, _ = collect(seeds)
    entry = comparison.entries[1]
    per_seed = [
        fmean(r["dice"] for r in rows if r["patient"] == "patient002" and r["class"])
        for rows in entry.by_seed.values()
    ]
    assert patient_scores(entry, "dice")["patient002"] == pytest.approx(fmean(per_seed))
    shown = best_middle_worst(comparison.entries)
    assert shown["worst"] == "patient002" and shown["best"] == "patient001"


def test_where_scores_are_is_told_as_it_is(tmp_path):
    for name, side in (("native", None), ("small", 64)):
        for model, size in (("unet", 32), ("mamba_unet", 16)):
            write_run(tmp_path / name, model, config={"data.longest_side": side, "data.size": size},
                      **FEW)  # fmt: skip
    native, small = (
        " ".join(cautions(collect(tmp_path / name)[0][0])) for name in ("native", "small")
    )
    assert "saw other images. All scores are at native resolution" in native
    assert "native" not in small and "on images of at most 64 pixels a side" in small


def test_a_structure_that_a_seed_misses_has_no_distance_to_compare(seeds):
    (comparison,), _, _ = collect(seeds)
    unet, mamba = (scored(entry, HD95).structures for entry in comparison.entries)
    structure = ("patient002", "patient002_ES", 1)
    assert mamba[structure] is None
    both = [
        row["hd95_mm"]
        for rows in comparison.entries[0].by_seed.values()
        for row in rows
        if (row["case"], row["class"]) == ("patient002_ES", 1)
    ]
    assert len(both) == 2 and sorted(unet[structure]) == pytest.approx(sorted(both))


def test_folds_are_pooled_over_patients_not_averaged(tmp_path):
    folder = tmp_path / "folds"
    runs = [write_run(folder, fold=0, patients=(1, 2, 3), size=16),
            write_run(folder, fold=1, patients=(4,), error=0.9, size=16)]  # fmt: skip
    (comparison,), _, _ = collect(folder)
    (entry,) = comparison.entries
    rows = [row for run in runs for row in read_run(run).rows]
    pooled = summarise(rows, NAMES)["foreground"]["dice"]["mean"]
    assert estimate(entry, "dice").mean == pytest.approx(pooled)
    means = [read_run(run).summary["foreground"]["dice"]["mean"] for run in runs]
    assert abs(pooled - fmean(means)) > 1e-3  # three patients weigh more than one
    assert entry.folds == 2 and estimate(entry, "dice").sd is None


def test_other_settings_are_rows_of_their_own_and_named(tmp_path):
    folder = tmp_path / "optim"
    for optim in ("sgd", "adamw"):
        write_run(folder, optim=optim, **FEW)
    (comparison,), _, _ = collect(folder)
    assert [e.label for e in comparison.entries] == ["unet · AdamW", "unet · SGD"]
    assert any("Only one seed was trained" in said for said in cautions(comparison))
    faster = {"optim.optimizer": OPTIMIZERS["sgd"] | {"lr": 0.1}}
    write_run(folder, optim="sgd", name="fast", config=faster, **FEW)
    (comparison,), _, _ = collect(folder)  # the rate no longer follows from the optimizer
    assert sorted(e.label for e in comparison.entries) == [
        "unet · AdamW lr=0.001", "unet · SGD lr=0.01", "unet · SGD lr=0.1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"policy": "legacy"}, {"fold": 0}, {"spacing": None}],
    ids=["policy", "split", "nothing that matters"],
)
def test_other_protocols_are_other_comparisons(tmp_path, change):
    write_run(tmp_path, "unet", **FEW)
    write_run(tmp_path, "swin_unet", **FEW, **change)
    comparisons, _, _ = collect(tmp_path)
    assert len(comparisons) == (1 if "spacing" in change else 2)
    if "spacing" in change:
        assert comparisons[0].unit == "vox"  # one unit for all


def test_other_data_are_another_comparison(tmp_path):
    write_run(tmp_path, "unet", **FEW)
    path = write_run(tmp_path, "swin_unet", **FEW)
    text = (path / "run.json").read_text().replace("f00d", "beef")
    (path / "run.json").write_text(text)
    path = write_run(tmp_path, "mamba_unet", **FEW)
    scores = json.loads((path / "metrics.json").read_text())
    scores["convention"]["tolerance_mm"] = 1.0
    (path / "metrics.json").write_text(json.dumps(scores))
    titles = [comparison.title for comparison in collect(tmp_path)[0]]
    assert len(titles) == 3
    assert [title for title in titles if "beef" in title and "tolerance mm 2.0" in title]
    assert [title for title in titles if "f00d" in title and "tolerance mm 1.0" in title]


def test_what_trained_may_differ_where_the_same_cases_are_scored(tmp_path):
    data = {"title": "ACDC", "fingerprint": "f00d"}
    write_run(tmp_path, "unet", record={"data": data}, **FEW)  # by an earlier version
    write_run(tmp_path, "swin_unet", record={"data": {**data, "scored": "5c"}}, **FEW)
    few = {"title": "ACDC", "fingerprint": "beef", "scored": "5c"}
    write_run(tmp_path, "mamba_unet", record={"data": few}, **FEW)
    (comparison,), _, _ = collect(tmp_path)
    assert len(comparison.entries) == 3


def test_other_images_for_the_networks_are_said(tmp_path):
    write_run(tmp_path, "unet", **FEW)
    write_run(tmp_path, "swin_unet", config={"data.preprocessing": "modern"}, **FEW,
              record={"hardware": {"cpu": "a CPU", "instructions": "AVX2"}})  # fmt: skip
    write_run(tmp_path, "mamba_unet", record={"hardware": {"gpus": ["a GPU"]}},
              patients=(1,), size=16)  # fmt: skip
    (comparison,), _, _ = collect(tmp_path)
    said = " ".join(cautions(comparison))
    assert "differ in data.preprocessing" in said
    assert "mamba_unet · preprocessing=paper was not tested on 1 of 2 patients" in said
    assert "so times differ: a CPU (AVX2), precision 32-true, a CPU, precision 32-true" in said


def test_a_copy_of_a_run_does_not_count_twice_and_superseded_ones_never(seeds, tmp_path):
    shutil.copytree(seeds, tmp_path / "copy")
    first = tmp_path / "copy" / "unet-sgd-seed1"
    shutil.copytree(first, first.with_name("again"))
    shutil.copytree(first, first.with_name("unet-sgd-seed1.previous"))
    (comparison,), _, problems = collect(tmp_path / "copy")
    assert [len(entry.runs) for entry in comparison.entries] == [2, 2]
    assert len(problems) == 1 and "has the setting, seed and fold of" in problems[0]


def test_a_damaged_run_is_left_out_and_named(seeds, tmp_path):
    shutil.copytree(seeds, tmp_path / "copy")
    (tmp_path / "copy" / "unet-sgd-seed1" / "cases.csv").unlink()
    (tmp_path / "copy" / "unet-sgd-seed2" / "metrics.json").write_text("{")
    (comparison,), _, problems = collect(tmp_path / "copy")
    assert [entry.label for entry in comparison.entries] == ["mamba_unet"]
    assert "unet-sgd-seed1/cases.csv" in problems[0].replace("\\", "/")
    assert "unet-sgd-seed2/metrics.json" in problems[1].replace("\\", "/")


def test_folders_without_results_are_explained(seeds, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        collect(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no run folders.*subfolders seeds do"):
        collect(seeds.parent)
    with pytest.raises(UserError, match=r"single run.*seeds"):
        collect(seeds / "unet-sgd-seed1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "running"}')
    with pytest.raises(UserError, match=r"no finished run.*report status"):
        collect(tmp_path)


def test_runs_that_describe_no_metric_have_the_built_in_ones(seeds, tmp_path):
    shutil.copytree(seeds, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*/metrics.json"):
        summary = json.loads(path.read_text())
        del summary["metrics"]  # as before descriptions were stored
        path.write_text(json.dumps(summary))
    (before,), _, problems = collect(tmp_path / "copy")
    (now,), _, _ = collect(seeds)
    assert not problems
    assert [grid.rows for grid in score_grids(before)] == [grid.rows for grid in score_grids(now)]


def test_labels_say_what_differs_and_nothing_else():
    base = {"model.name": "unet", "model.window": 7, "optim.lr": 0.1, "data.steps": 10,
            "optim.scheduler.total": 10}  # fmt: skip
    settings = [("unet", base), ("unet", {**base, "data.steps": 20, "optim.scheduler.total": 20}),
                ("swin", {**base, "model.name": "swin", "model.window": 8})]  # fmt: skip
    assert labels(settings) == ["unet · steps=10", "unet · steps=20", "swin · steps=10"]
    assert len(differences(settings)) == 1  # the schedule follows the steps
    depths = [("unet", {**base, "model.depth": value}) for value in (2, 3)]
    assert labels(depths) == ["unet · depth=2", "unet · depth=3"]
    assert labels([("unet", base), ("swin", base)]) == ["unet", "swin"]
    both = [("unet", {**base, "evaluation.tta": own, "evaluation.keep_largest": own})
            for own in (False, True)]  # fmt: skip
    assert list(differences(both)) == ["evaluation.keep_largest", "evaluation.tta"]


def test_settings_that_only_some_have_are_named_where_needed():
    plain = {"optim.lr": 0.1}
    assert labels([("unet", plain), ("unet", {**plain, "optim.betas": [0.9, 0.999]})]) == [
        "unet", "unet · betas=[0.9,0.999]",
    ]  # fmt: skip


def test_a_rescored_checkpoint_is_a_row_that_says_so(seeds, tmp_path):
    shutil.copytree(seeds, tmp_path / "copy")
    path = tmp_path / "copy" / "unet-sgd-seed1" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["checkpoint"] = "/far/away/some-run/checkpoints/best.ckpt"
    path.write_text(yaml.safe_dump(config))
    (comparison,), _, _ = collect(tmp_path / "copy")
    labelled = [entry.label for entry in comparison.entries]
    assert "unet · checkpoint=some-run/best.ckpt" in labelled and "unet" in labelled


def test_evaluations_of_the_seeds_of_one_training_are_a_row(tmp_path):
    """As of an external cohort; another training's is another row, also with the same names."""
    trained = {}
    for number, (seed, optim) in enumerate([(1, "sgd"), (2, "sgd"), (1, "adamw")]):
        path = write_run(tmp_path / "runs", "unet", optim=optim, seed=seed, **FEW)
        trained[number] = path.rename(path.with_name(f"unet-acdc-seed{seed}-0000000{number}"))
    found = {}
    for number, folder in trained.items():
        path = write_run(tmp_path / "scored", "unet", seed=number, **FEW)
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["checkpoint"] = str(folder / "checkpoints" / "best.ckpt")
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        found[number] = training_of(config["checkpoint"])
        record = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps({**record, "training": found[number]}))
    assert found[0] == found[1] != found[2]
    assert training_of(str(trained[0] / "checkpoints" / "last.ckpt")) not in ("", found[0])
    assert training_of(str(tmp_path / "best.ckpt")) == training_of(None) == ""
    (comparison,), _, _ = collect(tmp_path / "scored")
    assert {entry.label: len(entry.runs) for entry in comparison.entries} == {
        "unet · checkpoint=unet-acdc-seed*/best.ckpt": 2,
        "unet · checkpoint=unet-acdc-seed1-00000002/best.ckpt": 1,
    }


def test_a_rescored_checkpoint_claims_no_recipe_seed_method_or_labels(tmp_path):
    same = {"size": 16, "title": "ACDC", "split": {"name": "ssl4mis", "hash": "b", "note": ""}}
    way = {"method.name": "cps", "method._target_": "mambaseg.training.methods.x.Peers"}
    write_run(tmp_path, seed=1, **same)
    write_run(tmp_path, seed=2, **same)
    write_run(tmp_path, name="cps", config=way, **same)
    part = {"cases": 4, "patients": 2}
    path = write_run(tmp_path, name="again", optim="adamw", **same,
                     record={"counts": {"train": part, "test": part}})  # fmt: skip
    config = yaml.safe_load((path / "config.yaml").read_text())
    config |= {"checkpoint": "/far/run/checkpoints/best.ckpt", "augmentation": {}}
    config["data"] |= {"batch_size": 24, "steps": 30000}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (comparison,), _, _ = collect(tmp_path)
    own = "unet · checkpoint=run/best.ckpt"
    assert own in [entry.label for entry in comparison.entries]
    rows = dict(protocol_grid(comparison).rows)
    assert own not in rows["seeds"] and "unet · cps: 1" in rows["seeds"]
    assert rows["optimizer"].count("SGD") == 1 and "AdamW" not in rows["optimizer"]
    assert rows["data"] == f"{own}: test 4 cases of 2 patients"
    assert not {"batch", "steps", "augmentation"} & set(rows)
    assert not any(own in said and "seed" in said for said in cautions(comparison))
    labels = {row[0]: row[1] for row in score_grids(comparison)[0].rows}
    assert labels[own] == "not recorded" and labels["unet · cps"] == ""
    (grid,) = beside_the_papers(comparison)
    assert {row[0] for row in grid.rows if "quoted" not in row[0]} == {*labels} - {own}


def test_the_same_weights_at_two_places_are_one_row_and_other_content_is_another(tmp_path):
    for seed, (place, digest) in enumerate((("/a/vm.pth", "1"), ("/b/vm.pth", "1"),
                                            ("/b/vm.pth", "2"))):  # fmt: skip
        write_run(tmp_path, "unet", seed=seed, config={"model.pretrained": place},
                  record={"weights": {"pretrained": digest}})  # fmt: skip
    (comparison,) = collect(tmp_path)[0]
    assert sorted(len(entry.runs) for entry in comparison.entries) == [1, 2]
    assert len({entry.label for entry in comparison.entries}) == 2


def test_what_computes_the_same_is_one_row_and_another_monitor_is_not(tmp_path):
    for seed, backend in enumerate(("numba", "triton")):
        write_run(tmp_path, "unet", seed=seed, config={
            "model.scan_backend": backend, "evaluation.batch_size": 8 * (seed + 1)})  # fmt: skip
    (comparison,) = collect(tmp_path)[0]
    assert len(comparison.entries) == 1
    checkpoint = {
        "_target_": "mambaseg.training.checkpoints.Checkpoints",
        "monitor": "val/dice",
        "mode": "max",
    }
    for seed, monitor in enumerate(("val/dice", "val/hd95_mm"), start=2):
        write_run(tmp_path / "b", "unet", seed=seed,
                  config={"callbacks.checkpoint": {**checkpoint, "monitor": monitor}})  # fmt: skip
    (comparison,) = collect(tmp_path / "b")[0]
    assert [entry.label for entry in comparison.entries] == [
        "unet · monitor=dice", "unet · monitor=hd95_mm"
    ]  # fmt: skip


def test_callbacks_that_are_none_do_not_end_a_report(tmp_path):
    write_run(tmp_path, "unet", seed=1)
    path = tmp_path / "unet-sgd-seed1" / "config.yaml"
    for damage in ([1], {"a": [1], "b": {"_target_": 5}}, "x"):
        config = {**yaml.safe_load(path.read_text()), "callbacks": damage}
        path.write_text(yaml.safe_dump(config))
        assert len(collect(tmp_path)[0]) == 1


def test_folds_that_are_planned_alike_are_one_entry(tmp_path):
    for fold, side in enumerate((1.85, 1.87)):
        config = {"data.spacing": side, "data.preprocessing": "spacing"}
        run = write_run(tmp_path, fold=fold, config=config, patients=(fold + 1,), size=16)
        (run / "config.yaml").open("a").write("planned: [data.spacing]\n")
    ((comparison,), _, _) = collect(tmp_path)
    (entry,) = comparison.entries
    assert entry.folds == 2 and entry.label == "unet"


def test_other_patients_under_the_name_of_a_split_are_another_comparison(tmp_path):
    write_run(tmp_path, "unet", **FEW)
    path = write_run(tmp_path, "swin_unet", **FEW)
    scores = json.loads((path / "metrics.json").read_text())
    scores["split"]["hash"] = "bbbb"
    (path / "metrics.json").write_text(json.dumps(scores))
    assert len(collect(tmp_path)[0]) == 2


def told(scored, **more):
    data = {"title": "ACDC", "fingerprint": "f", "images": "i", "scored": scored, **more}
    return {"record": {"data": data}}


def test_folds_of_the_same_images_are_one_entry(tmp_path):
    for fold in (0, 1):
        data = told(f"s{fold}", fingerprint=f"f{fold}")
        write_run(tmp_path, fold=fold, patients=(fold + 1,), size=16, **data)
    ((comparison,), _, _) = collect(tmp_path)
    assert [entry.folds for entry in comparison.entries] == [2]


def test_of_two_runs_of_one_setting_the_one_that_ended_last_counts(tmp_path):
    for name, started, ended in (("a", "01", "09"), ("b", "02", "03")):
        path = write_run(tmp_path, name=name, **FEW)
        record = json.loads((path / "run.json").read_text())
        record |= {"started": f"2026-01-{started}", "ended": f"2026-01-{ended}"}
        (path / "run.json").write_text(json.dumps(record))
    (comparison,), _, (problem,) = collect(tmp_path)
    assert [run.path.name for run in comparison.runs] == ["a-sgd-seed1"]
    assert problem.startswith("left out: b-sgd-seed1")


def test_folds_whose_cases_have_had_other_labels_are_not_compared(tmp_path):
    write_run(tmp_path, "unet", fold=0, **told("s"), **FEW)
    write_run(tmp_path, "swin_unet", fold=0, **told("other"), **FEW)
    assert len(collect(tmp_path)[0]) == 2
