"""The commands of docs/own-data.md as they are written, and the table of docs/upgrading.md."""

import json
import re
import shlex
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from mambaseg.app.console import main
from mambaseg.app.overrides import arranged
from mambaseg.app.targets import MOVED
from mambaseg.errors import UserError
from tiny_nnunet import LABELS, arrays, write_nnunet, write_volume
from tiny_pictures import SIZE, blob, save, write_two_folders

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "own-data.md"
# what makes it short, beside the words of the page
SMALL = {
    "train": ["model=unet", "model.widths=[4,8]", "model.dropout=[0,0]", "data.size=32",
              "data.batch_size=2", "data.steps=2", "data.val_every=1", "logger=csv",
              "trainer=cpu"],
    "evaluate": ["logger=csv", "trainer=cpu"],
    "predict": ["device=cpu"],
}  # fmt: skip


def documented(heading):
    """The lines of the first shell block below a heading."""
    below = f"\n{PAGE.read_text()}".split(f"\n{heading}\n", 1)[1]
    return re.search(r"```sh\n(.*?)```", below, re.DOTALL)[1].splitlines()


def execute(line):
    """Runs a documented command in this process and in the working directory."""
    found = sorted(str(path) for path in Path("outputs/default").glob("*-seed*"))
    words = shlex.split(line.replace("outputs/default/<run folder>", "".join(found)))
    assert words[0] == "mambaseg"
    name, *arguments = words[1:]
    if any(word.startswith("data=") for word in arguments):  # its config is not in ours
        arguments.append(f"hydra.searchpath=[file://{Path.cwd()}/conf]")
    GlobalHydra.instance().clear()
    main([name, *arguments, *SMALL.get(name, [])])


COMMANDS = ["check", "train", "evaluate", "report", "predict"]


@pytest.mark.timeout(120)
def test_a_data_set_of_nnunet_goes_from_its_check_to_a_cines_labels(tmp_path, monkeypatch):
    """Thick along x in the files, other names, three classes: nothing that ACDC has."""
    monkeypatch.chdir(tmp_path)
    write_nnunet(Path("nnUNet_raw/Dataset501_Heart"), cases=6, tests=2, zooms=(8.0, 1.5, 1.25))
    Path("new_scans").mkdir()
    cine = np.stack([arrays(seed)[0][0] for seed in range(3)], -1)
    write_volume(Path("new_scans/cine.nii.gz"), cine, (8.0, 1.5, 1.25))
    lines = documented("# Your own images: from a folder to scores and label maps")
    assert [line.split()[1] for line in lines] == COMMANDS
    for line in lines:
        execute(line)
    config = yaml.safe_load(Path("conf/data/heart.yaml").read_text())
    assert config["class_names"] == list(LABELS) and config["split"] == "given"
    (run,) = Path("outputs/default").glob("*-seed*")
    (again,) = Path("outputs/evaluate").glob("*-seed*")
    scores, same = (json.loads((one / "metrics.json").read_text()) for one in (run, again))
    assert list(scores["classes"]) == list(LABELS) and scores["foreground"] == same["foreground"]
    page = Path("outputs/default/report/index.html").read_text()
    assert all(said in page for said in ("cavity", "wall", "Dataset501_Heart", "test_00"))
    assert "mambaseg train data=heart model=unet" in page  # the protocol's command
    image, labels = (nibabel.load(f"{place}/cine.nii.gz") for place in ("new_scans", "labels"))
    assert labels.shape == image.shape == (20, 18, 4, 3)
    for field in ("dim", "pixdim", "xyzt_units", "sform_code", "srow_x", "srow_y", "srow_z"):
        assert image.header[field].tobytes() == labels.header[field].tobytes(), field
    about = json.loads(Path("labels/cine.json").read_text())
    assert about["labels"] == {name: value for value, name in enumerate(LABELS)}
    assert about["made_by"]["slicing"] == "spacing"


@pytest.mark.timeout(120)
def test_pictures_go_from_their_check_to_a_report_and_predictions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_two_folders(tmp_path / "Kvasir-SEG", 6, ending=".jpg")
    save(tmp_path / "new_pictures" / "x.jpg", blob(9, (70, 50))[0])
    lines = documented("### Pictures with masks")
    assert [line.split()[1] for line in lines] == COMMANDS
    for line in lines:
        execute(line)
    config = yaml.safe_load((tmp_path / "conf" / "data" / "kvasir.yaml").read_text())
    assert config["defaults"][0] == "folder" and config["in_channels"] == 3
    page = (tmp_path / "outputs" / "default" / "report" / "index.html").read_text()
    assert "The best case" in page and "at most 512 pixels a side" in page
    assert "patients left out" not in page and "arXiv" not in page
    with Image.open(tmp_path / "labels" / "x.png") as picture:
        labels = np.asarray(picture)
    assert labels.shape == (70, 50) and set(np.unique(labels)) <= {0, 1} and SIZE != (70, 50)
    assert (tmp_path / "labels" / "x_overlay.png").is_file()


# ---- what was renamed ---------------------------------------------------------------------------


def test_upgrading_lists_exactly_what_was_renamed():
    page = (REPOSITORY / "docs" / "upgrading.md").read_text().partition("\n## Renamed\n")[2]
    assert dict(re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", page, re.MULTILINE)) == MOVED


@pytest.mark.parametrize("old", [old for old in MOVED if not old.startswith("mambaseg.")])
def test_an_override_of_before_is_told_its_new_name(old):
    word = old if "=" in old else f"{old}=x"
    with pytest.raises(UserError, match=re.escape(f"{old} is {MOVED[old]} now")):
        arranged(["-m", word])


def test_files_that_contributing_names_are_there():
    page = (REPOSITORY / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:tests|conf|docs)/[\w/]+\.\w+|[a-z]+/[a-z_/]+\.py)`", page)
    assert len(named) > 10
    for name in named:
        places = (REPOSITORY / name, REPOSITORY / "src" / "mambaseg" / name)
        assert any(place.is_file() for place in places), name
