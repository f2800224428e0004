"""A wheel built from the sdist, installed beside the present packages: a command in any folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("src", "conf", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
TYPED = """
import json, runpy, sys
script, commands = sys.argv[1:]
for words in json.loads(commands):
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
import mambaseg
print(mambaseg.__file__)
"""  # the script again and again, with the imports of the first time
PIP = ("-m", "pip", "--disable-pip-version-check", "-q")
TINY = ("model=unet", "model.widths=[2,4]", "model.dropout=[0,0]", "data=phantom", "logger=csv",
        "data.prepare.patients=8", "data.size=32", "data.batch_size=2", "data.steps=2",
        "trainer=cpu", "callbacks.progress=null")  # fmt: skip


def done(*words, cwd, **env):
    ended = subprocess.run(
        words, cwd=cwd, env={**os.environ, "ACDC_ROOT": "", **env}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which the wheel was installed."""
    place = tmp_path_factory.mktemp("wheel")
    sources = place / "sources"
    sources.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    done(sys.executable, "-c", BUILD, str(place), cwd=sources)
    (sdist,) = place.glob("*.tar.gz")
    alone = ("--no-deps", "--no-index")
    done(sys.executable, *PIP, "wheel", *alone, "--no-build-isolation", sdist, cwd=place)
    (wheel,) = place.glob("*.whl")
    done(sys.executable, *PIP, "install", *alone, "--target", place / "target", wheel, cwd=place)
    return place / "target"


def test_a_wheel_holds_every_config(installed):
    def configs(folder):
        return {path.relative_to(folder) for path in folder.rglob("*.yaml")}

    assert configs(installed / "mambaseg" / "conf") == configs(ROOT / "conf")
    assert (installed / "mambaseg/app/skeleton/tests/test_my_nets.py").is_file()  # mambaseg new
    assert {path.name for path in installed.iterdir()} >= {"mambaseg", "hydra_plugins", "bin"}
    assert not list(installed.glob("*.py")) and not (installed / "conf").exists()


def test_it_trains_predicts_and_reports_in_an_empty_folder(installed, tmp_path):
    image = "patient001_frame01.nii.gz"
    commands = [
        ["train", *TINY],
        ["predict", "run=newest", f"input=data/phantom/patient001/{image}", "output=labels",
         "device=cpu"],
        ["report", "outputs/default"],
    ]  # fmt: skip
    typed = (sys.executable, "-c", TYPED, installed / "bin" / "mambaseg", json.dumps(commands))
    said = done(*typed, cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.splitlines()[-1].startswith(str(installed))
    assert (tmp_path / "labels" / image).is_file()
    assert (tmp_path / "outputs" / "default" / "report" / "index.html").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "outputs", "labels"}
