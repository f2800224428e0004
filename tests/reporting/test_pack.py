"""Small copies of runs: without images, weights and names of folders, and good for a report."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_runs import write_run

from mambaseg.app.commands import report
from mambaseg.errors import UserError
from mambaseg.evaluation.calibration import BINS, REGIONS
from mambaseg.reporting.calibration import calibration_grid
from mambaseg.reporting.collect import collect
from mambaseg.reporting.pack import FILES, without_folders
from mambaseg.reporting.tables import score_grids

ROOT = Path(__file__).parents[2]
MEDICAL = re.compile(r"\.(nii|gz|h5|hdf5|hdr|img|mha|mhd|nrrd|dcm|ima|npy|mat|zip|tar)$")
PICTURES = re.compile(r"\.(png|jpe?g|gif|webp|tiff?|bmp|pdf|svg)$")
OF_THE_PHANTOM = {"docs/demo.png", "docs/overlay.png", "docs/report.png"}

MEASURED = {"ece": 0.1, "nll": 0.2, "bins": [[1.0, 0.5, 0.5]] * BINS}
CALIBRATION = {
    "temperature": 1.5,
    "checkpoint": "best.ckpt",
    "flag": {"thresholds": {"plain": 0.4, "calibrated": 0.5}},
    "test": {region: dict.fromkeys(("plain", "calibrated"), MEASURED) for region in REGIONS},
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "hearts"
    words = ["model=unet", f"outputs={folder.parent}", "data.root=/home/somebody/ACDC"]
    record = {"host": "pc-of-somebody", "overrides": words}
    for seed in (1, 2):
        path = write_run(folder, seed=seed, patients=(1, 2), size=16, record=record)
    (path / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    (path / "checkpoints" / "best.calibration.json").write_text(json.dumps(CALIBRATION))
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["checkpoint"] = "/home/somebody/run/checkpoints/best.ckpt"  # of mambaseg evaluate
    (path / "metrics.json").write_text(json.dumps(metrics))
    (folder / "crashed").mkdir()
    (folder / "crashed" / "run.json").write_text('{"status": "failed"}')
    return folder


def test_a_copy_has_the_small_files_and_gives_the_same_report(experiment, tmp_path):
    place = tmp_path / "results" / "hearts"
    for _ in range(2):  # again replaces
        report.main(["pack", str(experiment), "--to", str(place)])
    found = sorted(
        path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()
    )
    assert found == sorted(
        f"unet-sgd-seed{seed}/{name}" for seed in (1, 2)
        for name in (*FILES, *(("checkpoints/best.calibration.json",) if seed == 2 else ()))
    )  # fmt: skip
    for grids in (score_grids, calibration_grid):
        first, second = (grids(collect(folder)[0][0]) for folder in (experiment, place))
        assert first == second and first
    report.main(["--no-images", str(place)])
    assert "data:image" not in (place / "report" / "index.html").read_text()


def test_a_copy_tells_nothing_of_the_machine(experiment, tmp_path):
    report.main(["pack", str(experiment), "--to", str(tmp_path)])
    text = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for told in (str(experiment.parent), "/home", "somebody", "/somewhere"):
        assert told not in text
    record = json.loads((tmp_path / "unet-sgd-seed1" / "run.json").read_text())
    assert record["overrides"] == ["model=unet", f"outputs={experiment.parent.name}",
                                   "data.root=ACDC"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("sqlite:////home/me/study.db", "sqlite:///study.db"),
        ("sqlite:///study.db", None),
        ("roots=[/home/me/a b/x,/data/me/y]", "roots=[x,y]"),
        ("+r={a:/home/me/x,b: [~/me/y, 'D:\\me\\z'],c:rel/u}", "+r={a:x,b: [y, 'z'],c:rel/u}"),
        ("data.root=/home/me/lr=0.1/x", "data.root=x"),
        ("data.root='/home/me/x'", "data.root='x'"),
        ("/home/me/Data (copy), old/x", "x"),
        ("file:/home/me/x", "file:x"),
        ("file:///home/me/x", "file:x"),
        (r"\\server\me\x", "x"),
        ("data.root=C:/Users/me/x", "data.root=x"),
        ("postgresql://me:secret@host/x", "postgresql:x"),
        ("see https://a.org/b/c and /home/me/x: no", "see https://a.org/b/c and x: no"),
        ("https://a.org/b/c", None),
        ("~optim/own=poly", None),
        ("optim/own=poly", None),
        ("data.patient_pattern='^(.+)_\\d'", None),
        ("RV/LV, 1 / 2 m/s", None),
        ("${oc.env:HOME}/x", None),
    ],
)  # fmt: skip
def test_absolute_paths_are_cut_wherever_they_are(text, kept):
    assert without_folders({"a": [text]}) == {"a": [kept or text]}
    assert without_folders(kept or text) == (kept or text), "packed again"


def test_the_results_that_are_kept_here_stay_as_they_are():
    for path in (ROOT / "docs" / "results").rglob("run.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert without_folders(record) == record


def test_runs_are_not_packed_onto_themselves(experiment):
    with pytest.raises(UserError, match="name another folder"):
        report.main(["pack", str(experiment), "--to", f"{experiment}/../hearts"])


def test_what_is_not_packed_is_told_and_no_whole_run_is_replaced(experiment, tmp_path):
    shutil.copytree(experiment, source := tmp_path / "source")
    (source / "unet-sgd-seed1" / "metrics.json").write_text("{")
    with pytest.raises(
        UserError, match=r"not packed: .*unet-sgd-seed1/metrics\.json cannot be read"
    ):
        report.main(["pack", str(source), "--to", str(tmp_path / "kept")])
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["unet-sgd-seed2"]
    (log := source / "unet-sgd-seed2" / "train.log").write_text("of the training")
    before = {path: path.read_bytes() for path in log.parent.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="unet-sgd-seed2 is a whole run there"):
        report.main(["pack", str(tmp_path / "kept"), "--to", str(source)])
    assert {path: path.read_bytes() for path in before} == before


def test_a_second_pack_keeps_no_calibration_that_is_gone_and_names_a_damaged_one(
    experiment, tmp_path, caplog
):
    shutil.copytree(experiment, source := tmp_path / "source")
    report.main(["pack", str(source), "--to", str(tmp_path / "kept")])
    kept = tmp_path / "kept" / "unet-sgd-seed2" / "checkpoints" / "best.calibration.json"
    assert kept.exists()
    stored = source / "unet-sgd-seed2" / "checkpoints" / "best.calibration.json"
    stored.write_text("{")
    with pytest.raises(UserError, match=r"not packed: .*unet-sgd-seed2/.*best\.calibration\.json"):
        report.main(["pack", str(source), "--to", str(tmp_path / "kept")])
    assert calibration_grid(collect(source)[0][0]) is None
    assert "best.calibration.json" in caplog.text
    stored.unlink()
    report.main(["pack", str(source), "--to", str(tmp_path / "kept")])
    assert not kept.exists()


def test_no_image_of_a_patient_is_in_the_repository():
    """What git has, or would take: medical images nowhere, pictures only those of the phantom."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    files = [name for name in listed.splitlines() if (ROOT / name).is_file()]
    assert not [name for name in files if MEDICAL.search(name.lower())]
    assert {name for name in files if PICTURES.search(name.lower())} == OF_THE_PHANTOM
    arrays = [name for name in files if name.endswith(".npz")]
    assert all(re.match("tests/(models|training)/golden/", name) for name in arrays)
    for name in files:
        if name.startswith("docs/results/"):
            text = (ROOT / name).read_text(encoding="utf-8")  # no other kind of file is there
            assert "data:image" not in text, f"{name}: mambaseg report --no-images"
