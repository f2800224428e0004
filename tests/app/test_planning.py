"""nnU-Net's plan applied: every `auto` of experiment=nnunet_2d becomes a value."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml

from mambaseg.app.entry import explained_errors
from mambaseg.app.settle import settle
from mambaseg.data.sizes import pair_of
from mambaseg.data.survey import open_survey
from mambaseg.errors import UserError
from mixed_nnunet import write_mixed
from runs import QUIET, assert_same, built, composed, entered, stop_before, trained

IDS = [f"case{number}" for number in range(6)]
SPLIT = [{"train": IDS[:4], "val": IDS[4:]}]
SMALL = ["model.filters=[4,8,16,16]", "data.steps=3", "data.val_every=2", "trainer=cpu"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """MR and CT with PET of mixed voxel sizes and oblong slices; four of six cases train."""
    place = tmp_path_factory.mktemp("sets")
    for name, channels in (("MR", ("MRI",)), ("CT", ("CT", "PET"))):
        write_mixed(place / name, ids=IDS, channels=channels)
        (place / name / "splits_final.json").write_text(json.dumps(SPLIT))
    return place


def words(root, place, *more):
    return [
        "experiment=nnunet_2d", "data=nnunet", f"data.root={root}", f"outputs={place / 'out'}",
        f"data.cache_dir={place / 'cache'}", *SMALL, *more,
    ]  # fmt: skip


def settled(*overrides):
    """The settled configuration, and the loaded data."""
    with explained_errors(UserError):
        plan, data, _, _ = settle(composed(*QUIET, *overrides))
    return plan.config, data


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    """A planned run on CT with PET, trained and scored."""
    place = tmp_path_factory.mktemp("run")
    return trained(*words(sets / "CT", place, "evaluation.batch_size=4")), place


def test_a_planned_run_trains_on_oblong_patches_with_every_value_in_its_config(run):
    done = run[0]
    config = yaml.safe_load((done.folder.path / "config.yaml").read_text())
    data, model = config["data"], config["model"]
    assert "auto" not in [value for part in (data, model) for key, value in part.items()
                          if key != "on_device"]  # fmt: skip
    rows, columns = data["size"]
    assert rows >= 1.5 * columns and config["augmentation"]["rotate"]["degrees"] == 15
    assert done.data.image_shape == (2, rows, columns)
    assert data["preprocessing"] == "spacing" and data["spacing"][0] < data["spacing"][1]
    assert data["intensity"] is None and data["ct"][1] is None
    low, high, mean, deviation = data["ct"][0]
    assert -650 < low < mean < high < -100 and 50 < deviation < 250
    assert len(model["strides"]) == 4 and model["deep_supr_num"] == 2
    assert done.folder.finished


def test_it_starts_again_as_the_same_run_and_looks_at_no_case(run, sets, monkeypatch, caplog):
    done, place = run
    monkeypatch.setattr("mambaseg.data.case.Case.read", lambda *_: pytest.fail("read a case"))
    with caplog.at_level(logging.INFO), built(*words(sets / "CT", place)) as again:
        assert again.finished and again.folder.path == done.folder.path
    assert "planned from 4 training cases" in caplog.text and "looking at" not in caplog.text


def test_its_checkpoint_predicts_and_exports_with_the_plan(run, sets, tmp_path):
    folder, out = run[0].folder.path, tmp_path / "labels"
    case = sets / "CT" / "imagesTr" / "case4*"
    assert entered("predict.py", f"run={folder}", f"input={case}", f"output={out}", "tta=true",
                   "device=cpu") == 0  # fmt: skip
    assert (out / "case4.nii.gz").is_file()
    made_by = json.loads((out / "case4.json").read_text())
    assert made_by["made_by"]["networks"][0]["preprocessing"]["ct"][1] is None
    file = tmp_path / "network.pt2"
    rows, columns = (side + 16 for side in run[0].config["data"]["size"])
    words = f"run={folder}", "format=torch", f"output={file}", f"size=[{rows},{columns}]"
    assert entered("export.py", *words) == 0
    told = json.loads(file.with_name("network.pt2.json").read_text())
    assert told["input"]["shape"] == [1, 2, rows, columns]


def test_a_stopped_planned_run_ends_as_if_it_had_not_been(sets, tmp_path, monkeypatch):
    whole = trained(*words(sets / "MR", tmp_path / "a", "test=false"))
    with monkeypatch.context() as patch:
        stop_before(2, patch)
        with pytest.raises(ZeroDivisionError):
            trained(*words(sets / "MR", tmp_path / "b", "test=false"))
    resumed = trained(*words(sets / "MR", tmp_path / "b", "test=false"))
    assert resumed.folder.path.name == whole.folder.path.name
    states = [torch.load(one.folder.path / "checkpoints" / "last.ckpt", weights_only=True)
              for one in (whole, resumed)]  # fmt: skip
    assert_same(*(one["state_dict"] for one in states))


def test_only_training_cases_make_the_plan(sets, tmp_path):
    """A validation case of another voxel size and other grey values changes nothing."""
    other = tmp_path / "other"
    write_mixed(other, ids=IDS[:4], channels=("CT", "PET"))
    write_mixed(other, ids=IDS[4:], channels=("CT", "PET"), shape=(90, 90, 9), numTraining=6)
    (other / "splits_final.json").write_text(json.dumps(SPLIT))
    ours, theirs = (settled(*words(root, tmp_path))[0] for root in (sets / "CT", other))
    for part in ("data", "model"):
        for one in (ours, theirs):
            one[part].pop("root", None)
            one[part].pop("title", None)
        assert ours[part] == theirs[part]


def test_what_the_user_gives_stays_and_the_rest_is_planned_for_it(sets, tmp_path):
    given = words(sets / "CT", tmp_path, "data.size=32", "data.batch_size=3", "data.spacing=1.5",
                  "data.window=[-800,0]", "model.strides=[1,2,2]")  # fmt: skip
    config, _ = settled(*given)
    data, model = config["data"], config["model"]
    assert (data["size"], data["batch_size"], data["spacing"]) == (32, 3, 1.5)
    assert data["window"] == [-800, 0] and data["ct"] is None is data["intensity"]
    assert model["kernel_size"] == [3, 3, 3] and model["upsample_kernel_size"] == [2, 2]
    assert (model["deep_supr_num"], model["size_multiple"]) == (1, 4)
    assert config["augmentation"]["rotate"]["degrees"] == 180


def test_planned_preprocessing_plans_the_pixel_that_it_needs(sets, tmp_path):
    planned, _ = settled(*words(sets / "CT", tmp_path, "data.spacing=null"))
    config, _ = settled(*words(sets / "CT", tmp_path))
    assert planned["data"]["preprocessing"] == "spacing"
    assert planned["data"] == config["data"] and planned["planned"] == config["planned"]


def test_images_that_are_brought_to_one_size_leave_the_network_to_plan(sets, tmp_path):
    given = ["data.preprocessing=modern", "data.size=[64,48]", "model.size_multiple=auto"]
    config, _ = settled(*words(sets / "CT", tmp_path, *given, "data.intensity=percentile"))
    assert config["data"]["spacing"] is None
    assert config["model"]["strides"] == [1, 2, 2, 2] and config["model"]["size_multiple"] == 8


def test_any_network_takes_planned_data_and_one_with_a_single_head_says_which_loss(sets, tmp_path):
    small = [word for word in words(sets / "MR", tmp_path) if "filters" not in word]
    small += ["model=unet", "model.widths=[4,8]", "model.dropout=[0,0]"]
    done = trained(*small, "loss=dice_ce_nnunet", "data.steps=1")
    assert done.folder.finished and "deep_supervision" not in done.config["model"]
    with pytest.raises(UserError, match="or another loss, such as dice_ce_nnunet"):
        trained(*small)


def test_pictures_without_a_voxel_size_keep_their_pixels(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number in range(10):
        grey = rng.integers(0, 255, (60, 44, 3), np.uint8)
        Image.fromarray(grey).save(tmp_path / "data" / "images" / f"p{number}.png")
        mask = Image.fromarray((grey[..., 0] > 128).astype(np.uint8) * 255)
        mask.save(tmp_path / "data" / "masks" / f"p{number}.png")
    config, _ = settled("experiment=nnunet_2d", "data=folder", f"data.root={tmp_path / 'data'}",
                        f"data.cache_dir={tmp_path / 'cache'}", "trainer=cpu")  # fmt: skip
    data = config["data"]
    assert (data["preprocessing"], data["spacing"], data["intensity"]) == ("native", None, "zscore")
    assert data["size"] == [64, 48]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.preprocessing=modern"], "brings every image to data.size"),
        (["data.size=8"], "too few for a network of 3 stages"),
        (["data.size=[32,32,32]"], r"data\.size=.*rows, columns"),
        (["data.modality=[CT,PET]"], "name every channel"),
        (["data.ct=[[0,1,2]]", "data.intensity=null"], r"give \[low, high, mean, deviation\]"),
        (["data.ct=[[0,1,0.5,1]]", "data.window=[0,1]"], "choose one of"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_one_message(more, said, sets, tmp_path):
    with pytest.raises(UserError, match=said):
        settled(*words(sets / "MR", tmp_path, *more))


def test_other_kinds_of_data_have_no_plan(tmp_path):
    with pytest.raises(UserError, match="data=haze_phantom has no plan"):
        settled("data=haze_phantom", "model=uvm_net", "loss=l1", "data.size=auto", "trainer=cpu",
                f"data.root={tmp_path / 'haze'}")  # fmt: skip


def test_a_damaged_survey_is_made_again(sets, tmp_path, caplog):
    overrides = words(sets / "MR", tmp_path)
    first, data = settled(*overrides)
    (file,) = (tmp_path / "cache").glob("survey-*.json")
    kept = file.read_text()
    for damage in (kept[:100], kept.replace("[4,", "[5,"), "[]"):
        file.write_text(damage)
        assert settled(*overrides)[0]["data"] == first["data"]
        assert file.read_text() == kept
    assert caplog.text.count("looking at the cases again") == 3
    again = open_survey(data.cases["train"], cache_dir=tmp_path, num_classes=3, channels=1,
                        greys=False)  # fmt: skip
    assert [one.case for one in again] == IDS[:4]


@pytest.mark.parametrize(("name", "channels"), [("MR", ("MRI",)), ("CT", ("CT", "PET"))])
def test_it_is_what_nnunet_itself_plans_from_the_same_cases(
    name, channels, sets, tmp_path, monkeypatch
):
    pytest.importorskip("nnunetv2", reason="the plan's oracle is not installed: make oracles")
    places = {key: str(tmp_path / key) for key in ("nnUNet_raw", "nnUNet_preprocessed")}
    for key, place in {**places, "nnUNet_results": str(tmp_path)}.items():
        monkeypatch.setenv(key, place)
    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    for module in (fingerprint_extractor, default_experiment_planner):  # who have read them before
        for key, place in places.items():
            monkeypatch.setattr(module, key, place)
    root = write_mixed(tmp_path / "nnUNet_raw" / "Dataset001_Made", ids=IDS[:4], channels=channels)
    seen = [
        fingerprint_extractor.DatasetFingerprintExtractor.analyze_case(
            sorted(map(str, root.glob(f"imagesTr/{case}_*"))),
            str(root / "labelsTr" / f"{case}.nii.gz"), SimpleITKIO, 50_000,
        )
        for case in IDS[:4]
    ]  # fmt: skip
    shapes, spacings, drawn, _, kept = zip(*seen, strict=True)
    foreground = {}
    for channel in range(len(channels)):
        values = np.concatenate([one[channel] for one in drawn])
        low, high = np.percentile(values, (0.5, 99.5))
        foreground[channel] = {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "percentile_00_5": float(low),
            "percentile_99_5": float(high),
        }
    numbers = {
        "spacings": [list(map(float, one)) for one in spacings],
        "shapes_after_crop": [list(map(int, one)) for one in shapes],
        "foreground_intensity_properties_per_channel": foreground,
        "median_relative_size_after_cropping": float(np.median(kept)),
    }
    place = tmp_path / "nnUNet_preprocessed" / root.name
    place.mkdir(parents=True)
    (place / "dataset_fingerprint.json").write_text(json.dumps(numbers))
    planner = default_experiment_planner.ExperimentPlanner(1)
    theirs = planner.plan_experiment()["configurations"]["2d"]
    stages = theirs["architecture"]["arch_kwargs"]

    free = [word for word in words(sets / name, tmp_path) if "filters" not in word]
    config, _ = settled(*free)
    data, model = config["data"], config["model"]
    assert data["size"] == list(theirs["patch_size"])
    assert data["batch_size"] == theirs["batch_size"]
    assert data["spacing"] == pytest.approx(theirs["spacing"], abs=1e-6)
    for ours, key in (("strides", "strides"), ("kernel_size", "kernel_sizes")):
        assert [list(pair_of(one)) for one in model[ours]] == [list(one) for one in stages[key]]
    assert model["filters"] == list(stages["features_per_stage"])
    schemes = ["CTNormalization" if one else "ZScoreNormalization" for one in data["ct"] or [None]]
    assert schemes == theirs["normalization_schemes"]
    if data["ct"]:
        names = ("percentile_00_5", "percentile_99_5", "mean", "std")
        drawn = [foreground[0][one] for one in names]  # at random, hence the tolerance
        assert data["ct"][0] == pytest.approx(drawn, abs=0.02 * drawn[3])
