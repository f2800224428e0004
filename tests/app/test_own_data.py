"""What data-check proposes can be trained with; channels in files; what a data set says itself."""

import logging
import shutil

import nibabel
import numpy as np
import pytest
import yaml
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from mambaseg.app.commands.check import main
from mambaseg.app.ensemble import restore_predictor
from mambaseg.app.entry import explained_errors
from mambaseg.data.check.dataset import check_dataset
from mambaseg.data.check.proposal import _yaml, propose
from mambaseg.data.formats.images import find_images, group_channels
from mambaseg.data.readers import nnunet
from mambaseg.errors import UserError
from mambaseg.reporting.report import write_report
from runs import UNET, built, composed, own_overrides, trained
from tiny_checkpoints import write_checkpoint
from tiny_nnunet import LABELS, arrays, write_nnunet, write_volume

MEMORY = (2**30, "1 GiB")


# ---- channels of images to predict --------------------------------------------------------------


def names_of(folder, channels):
    found = group_channels(find_images(str(folder), outside=folder / "labels"), channels)
    return {source.name: len(source.further) for source in found}


def test_files_of_one_image_are_one_image_where_the_network_has_channels(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "c", "d_0000", "d"):
        (tmp_path / f"{name}.nii.gz").touch()
    assert names_of(tmp_path, 2) == {"a": 1, "b": 0, "c": 0, "d": 0, "d_0000": 0}
    assert names_of(tmp_path, 1) == {"a_0000": 0, "a_0001": 0, "b": 0, "c": 0, "d": 0, "d_0000": 0}


def test_channels_in_files_and_along_the_fourth_axis_give_the_same_labels(tmp_path):
    network = write_checkpoint(tmp_path / "two.ckpt", channels=2, classes=LABELS)
    place, zooms = tmp_path / "in", (1.5, 1.25, 8.0)
    place.mkdir()
    image, _ = arrays(0, channels=2)
    write_volume(place / "one.nii.gz", np.moveaxis(image, 0, -1), zooms)
    write_volume(place / "two_0000.nii.gz", image[0], zooms)
    write_volume(place / "two_0001.nii.gz", image[1], zooms)
    write_volume(place / "moved_0000.nii.gz", image[0], zooms)
    write_volume(place / "moved_0001.nii.gz", image[1], (1.5, 1.25, 5.0))
    write_volume(place / "alone_0000.nii.gz", image[0], zooms)
    predictor = restore_predictor([network], device="cpu")
    sources = group_channels(find_images(str(place), outside=tmp_path / "out"), 2)
    outcome = predictor.predict(sources, tmp_path / "out")
    assert sorted(outcome.done) == ["one", "two"]
    assert "voxel size (5.0" in outcome.failed["moved"]
    assert "the image has 1 channels, the networks take 2" in outcome.failed["alone"]
    one, two = (nibabel.load(tmp_path / "out" / f"{name}.nii.gz") for name in ("one", "two"))
    assert one.shape == two.shape == image.shape[1:] and np.array_equal(one.affine, two.affine)
    labels = np.asarray(one.dataobj)
    assert np.array_equal(labels, np.asarray(two.dataobj)) and len(np.unique(labels)) > 1


# ---- what is proposed ---------------------------------------------------------------------------


def proposed(root, **words):
    return yaml.safe_load(propose(check_dataset(root), "own", memory=MEMORY, **words))


@pytest.mark.parametrize("name", ["1e4", "2E+3", "no", "null", "0x1", "1_0", "a: b", "12", "1.5"])
def test_a_name_in_a_proposed_config_stays_text(name):
    for loaded in (yaml.safe_load, OmegaConf.create):
        assert list(loaded(f"names: {_yaml(['background', name])}")["names"])[1] == name


def test_what_is_proposed_follows_the_stated_rules(tmp_path):
    root = write_nnunet(tmp_path / "Dataset001_Own", splits=[{"train": ["case_000"], "val": []}])
    config = proposed(root)
    assert config == {
        "defaults": ["nnunet", "_self_"], "name": "own", "title": "Dataset001_Own",
        "root": str(root), "split": "given", "class_names": list(LABELS), "num_classes": 3,
        "label_map": None, "in_channels": 1,
        "size": 64,  # of 18 rows and 20 columns: the smallest
        "batch_size": 24,
    }  # fmt: skip
    text = propose(check_dataset(root), "own", memory=MEMORY)
    assert "between slices 8/8/8, rows 1.25/1.25/1.25" in text
    assert "4/4/4 slices, 18/18/18 rows, 20/20/20 columns" in text
    truth = np.stack([arrays(seed)[1] for seed in range(5)])
    assert f"1 cavity: {(truth == 1).mean():.2%}, 100%" in text
    assert propose(check_dataset(root), "own", memory=(10_000 * 64 * 64 * 7, "")).count("h_size: 7")


def test_numbers_that_nobody_named_are_classes_in_their_order(tmp_path, monkeypatch):
    root = write_nnunet(tmp_path / "a", channels=2)
    for path in (root / "labelsTr").glob("case*"):
        label = np.asarray(nibabel.load(path).dataobj)
        write_volume(path, np.uint8([0, 255, 7])[label], (1.5, 1.25, 8.0))
    monkeypatch.setattr(nnunet.find_cases, "class_names", lambda root: None)
    config = proposed(root)
    assert config["label_map"] == {0: 0, 7: 1, 255: 2} and config["num_classes"] == 3
    assert config["class_names"] == ["background", "class_1", "class_2"]
    assert config["split"] == "random" and config["in_channels"] == 2
    conf = tmp_path / "conf" / "data"
    assert main([str(root), "--write", str(conf / "own.yaml")]) == 0
    run = trained(*own_overrides(tmp_path), "data=own", configs=conf.parent)  # as it is, 2 steps
    assert run.data.counts["train"]["cases"] == 3


def test_a_name_or_a_path_is_only_a_name_or_a_path(tmp_path):
    root = write_nnunet(
        tmp_path / "no: [x] #'${oc.env:HOME}", labels={"background": 0, "no": 1, "null: #1": 2}
    )
    (conf := tmp_path / "conf" / "data").mkdir(parents=True)
    (conf / "own.yaml").write_text(propose(check_dataset(root), "own", memory=MEMORY))
    cfg = composed("data=own", "model=unet", configs=conf.parent)
    assert list(cfg.data.class_names) == ["background", "no", "null: #1"]
    assert cfg.data.root == str(root)


def test_a_config_is_not_written_over_another_or_under_a_name_that_is_none(tmp_path, capsys):
    root = write_nnunet(tmp_path / "a")
    (tmp_path / "data").mkdir()
    (there := tmp_path / "data" / "own.yaml").write_text("kept")
    assert main([str(root), "--write", str(there)]) == 1
    assert "is there already" in capsys.readouterr().out and there.read_text() == "kept"
    assert main([str(root), "--write", str(tmp_path / "data" / "acdc.yaml")]) == 1
    assert "has the name of a config of mambaseg" in capsys.readouterr().out
    assert main([str(root), "--write", str(tmp_path / "my own.yml")]) == 1
    assert "name it like conf/data/hearts.yaml" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere"), "--write", str(there)]) == 1
    assert "is there already" in capsys.readouterr().out  # said before minutes of reading
    (file := tmp_path / "a" / "data").touch()
    assert main([str(root), "--write", str(file / "hearts.yaml")]) == 1
    assert "another place with --write" in capsys.readouterr().out
    assert main([str(root), "--write", str(tmp_path / "hearts.yaml")]) == 1  # data= finds no such
    assert f"Write it to {tmp_path}/data/hearts.yaml" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(root / "labelsTr")
    assert main([str(root)]) == 1
    assert "no configuration is proposed" in capsys.readouterr().out


def test_channels_that_differ_between_cases_are_an_error(tmp_path):
    root = write_nnunet(tmp_path / "a", whole=True, version=1, channels=2)
    image, label = arrays(3)
    write_volume(root / "imagesTr" / "case_003.nii.gz", image[0], (1.5, 1.25, 8.0))
    (error,) = check_dataset(root).of("error")
    assert error.where == "case_003"
    assert error.problem.endswith("the image has 1 channel, the data set has 2")
    for folder in ("images", "labels"):
        (tmp_path / "b" / folder).mkdir(parents=True)
    for number in range(3):  # where nothing says how many there should be
        both = np.stack([image[0]] * (2 if number < 2 else 1), -1)
        write_volume(tmp_path / f"b/images/a{number}.nii.gz", both, (1.5, 1.25, 8.0))
        write_volume(tmp_path / f"b/labels/a{number}.nii.gz", label, (1.5, 1.25, 8.0))
    (error,) = check_dataset(tmp_path / "b").of("error")
    assert (error.where, error.problem) == ("a2", "1 channel where most cases have 2")


# ---- data=nnunet without a config of one's own --------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"say where the data set is, data\.root="),
        (["data.root={place}/none"], "dataset.json: the file is missing"),
        (["data.root={place}/regions"], "labels is .*all"),
    ],
)
def test_a_data_set_that_does_not_say_what_it_is_ends_in_one_message(tmp_path, words, message):
    write_nnunet(tmp_path / "regions", labels={"background": 0, "all": [1, 3]})
    words = [word.format(place=tmp_path) for word in words]
    with pytest.raises(CompactHydraException, match=message) as raised, explained_errors():
        built(*UNET, "data=nnunet", *words)
    assert "interpolation" not in str(raised.value)
    assert isinstance(raised.value.__cause__, UserError)  # Hydra prints those of OmegaConf


def test_classes_that_the_user_names_replace_those_of_the_file(tmp_path):
    root = write_nnunet(tmp_path / "regions", labels={"background": 0, "all": [1, 2]})
    run = trained(
        *own_overrides(tmp_path), "data=nnunet", f"data.root={root}", "data.num_classes=2",
        "data.class_names=[background,all]", "data.label_map={0:0,1:1,2:1}",
    )  # fmt: skip
    assert list(run.folder.summary["classes"]) == ["background", "all"]


@pytest.mark.parametrize("labels", [None, {"0": "background", "1": "cavity", "2": "wall"}])
def test_classes_named_in_another_order_than_the_data_sets_are_refused(tmp_path, labels):
    root = write_nnunet(tmp_path / "a", **({"labels": labels} if labels else {}))
    words = ["data=nnunet", f"data.root={root}", "data.class_names=[background,wall,cavity]"]
    with pytest.raises(UserError, match=r"calls label 1 'cavity'.*data\.label_map=\{0:0,1:2,2:1\}"):
        trained(*own_overrides(tmp_path), *words)
    run = trained(*own_overrides(tmp_path), *words, "data.label_map={0:0,1:2,2:1}")
    assert list(run.folder.summary["classes"]) == ["background", "wall", "cavity"]


def test_labels_that_are_no_classes_do_not_hide_the_rest_of_the_check(tmp_path):
    root = write_nnunet(tmp_path / "a", labels={"background": 0, "all": [1, 3]})
    (root / "imagesTr" / "case_002_0000.nii.gz").write_bytes(b"")
    report = check_dataset(root)
    assert [one.problem.partition(": ")[0] for one in report.of("error")] == [
        "dataset.json", "imagesTr/case_002_0000.nii.gz",
    ]  # fmt: skip
    config = yaml.safe_load(propose(report, "own", memory=MEMORY))
    assert config["class_names"] == ["background", "class_1", "class_2"]


# ---- whose the cases are, and who is tested -----------------------------------------------------


def test_a_split_by_case_is_called_so_in_log_table_and_report(tmp_path, caplog, capsys):
    ids = [f"p{number}_s{slice_}" for number in range(5) for slice_ in range(2)]
    root = write_nnunet(tmp_path / "Dataset001_Own", ids=ids)
    with caplog.at_level(logging.INFO):
        run = trained(*own_overrides(tmp_path), "data=nnunet", f"data.root={root}", "name=by_case")
    read_first = ("Not a published split: drawn by case with seed 0; 7/1/2 cases. "
                  "The names suggest several cases")  # fmt: skip
    assert read_first in caplog.text
    assert read_first in " ".join(capsys.readouterr().out.split())
    page = write_report(run.folder.path.parent).read_text()
    assert read_first in page[page.index("Read first") : page.index("</ul>")]
    assert "drawn by patient" not in caplog.text + page

    assert main([str(root), "--write", str(tmp_path / "conf" / "data" / "own.yaml")]) == 0
    run = trained(
        *own_overrides(tmp_path), "data=own", "name=by_patient", configs=tmp_path / "conf"
    )
    assert run.folder.summary["split"]["note"].startswith(
        "Not a published split: drawn by patient with seed 0;"
    )
    parts = [getattr(run.data.split, part) for part in ("train", "val", "test")]
    assert sorted(patient for part in parts for patient in part) == [f"p{n}" for n in range(5)]
    assert run.data.counts["train"]["cases"] == 2 * len(parts[0])


def test_an_external_cohort_that_is_all_test_is_scored_and_not_trained_on(tmp_path):
    run = trained(
        *own_overrides(tmp_path), "data=nnunet", f"data.root={write_nnunet(tmp_path / 'own')}"
    )
    cohort = write_nnunet(tmp_path / "cohort", tests=3, ids=["gone"])
    for path in (*cohort.glob("imagesTr/*"), *cohort.glob("labelsTr/*")):
        path.unlink()
    where = ["data=nnunet", f"data.root={cohort}", f"data.cache_dir={tmp_path / 'cache'}"]
    words = [*where, f"checkpoint={run.folder.path}", f"outputs={tmp_path / 'outputs'}"]
    for split, cases in (("given", 3), ("test", 3)):
        scored = trained(*words, f"data.split={split}", script="evaluate")
        assert scored.folder.summary["split"]["name"].partition("-")[0] == split
        assert len({row["case"] for row in scored.task.results["rows"]}) == cases
    everybody = [*words[:1], f"data.root={tmp_path / 'own'}", *words[2:], "data.split=test"]
    with pytest.raises(UserError, match="has seen 4 of the 5 cases"):
        built(*everybody, script="evaluate")
    with pytest.raises(UserError, match="no training patients"):
        trained(*own_overrides(tmp_path), *where, "name=refused")
    assert not (tmp_path / "outputs" / "refused").exists()


@pytest.mark.parametrize("unknown", [None, "Tr/case_000", "Tr/case_002", "Ts/test_000"])
def test_distances_of_a_run_have_one_unit_in_curves_tables_and_report(unknown, tmp_path, capsys):
    """mm where every case that is scored says how large its voxels are."""
    splits = [{"train": ["case_000", "case_001"], "val": ["case_002"]}]
    root = write_nnunet(tmp_path / "own", cases=3, tests=2, splits=splits)
    if unknown:
        part, _, name = unknown.partition("/")
        for path in (root / f"images{part}" / f"{name}_0000", root / f"labels{part}" / name):
            path = path.with_name(f"{path.name}.nii.gz")
            array = np.asarray(nibabel.load(path).dataobj)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)  # no unit, sides of 1
    run = trained(
        *own_overrides(tmp_path), "data=nnunet", f"data.root={root}", "data.slicing=stored",
        "evaluation.val_distances=true",
    )  # fmt: skip
    scored = unknown not in (None, "Tr/case_000")
    unit, other = ("vox", "mm") if scored else ("mm", "vox")
    header = (run.folder.path / "metrics.csv").read_text().partition("\n")[0]
    assert f"val/hd95_{unit}" in header and f"test/hd95_{unit}" in header
    assert f"hd95_{other}" not in header
    table = capsys.readouterr().out
    assert f"HD95 {unit}" in table and f"HD95 {other}" not in table
    page = write_report(run.folder.path.parent).read_text()
    scores = page[page.index("Test scores") :]
    assert f"HD95 {unit}" in scores[: scores.index("</table>")]
    assert f"HD95 {other}" not in scores[: scores.index("</table>")]
    assert not scored or "hd95_mm" not in run.task.results["means"]
