"""make checks Python first, replaces a broken .venv, and installs for training what it needs."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from runs import composed

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
OLD = """#!/bin/sh
exec {python} -c "import sys; sys.version_info = (3, 9, 2)
$(printf '%s' "$2")"
"""


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "constraints").mkdir()
    shutil.copy(ROOT / "constraints" / "cpu.txt", tmp_path / "constraints")
    return tmp_path


def make(clone, *words):
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(["make", *words], cwd=clone, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("python", ["none", "old"])
def test_a_python_that_does_not_fit_is_named_before_anything_is_made(python, clone):
    place = clone / "old"
    place.write_text(OLD.format(python=sys.executable))
    place.chmod(0o755)
    code, said = make(clone, "train", f"PYTHON={'./old' if python == 'old' else './none'}")
    assert code != 0 and "Python 3.11, 3.12 or 3.13" in said
    assert ("this is 3.9" in said) == (python == "old") and not (clone / ".venv").exists()


@pytest.mark.parametrize("state", ["absent", "broken", "sound"])
def test_only_a_broken_environment_is_made_again(state, clone):
    here = clone / ".venv" / "bin" / "python"
    here.parent.mkdir(parents=True)
    if state != "absent":
        here.symlink_to("/gone/python" if state == "broken" else sys.executable)
    for stamp in (".core", ".complete"):
        (clone / ".venv" / stamp).touch()
    code, planned = make(clone, "-n", "train", f"PYTHON={sys.executable}")
    assert code == 0 and ("rm -rf .venv" in planned) == (state != "sound")
    assert ("pip install" in planned) == (state != "sound") and "[dev]" not in planned
    assert planned.rstrip().endswith("mambaseg train experiment=quickstart")
    assert ("[dev]" in make(clone, "-n", "lint")[1]) == (state != "sound")


def test_the_results_are_three_seeds_of_thirteen_rows_under_equal_conditions(clone):
    for name in ("bin/python", ".core"):
        path = clone / ".venv" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(sys.executable) if name == "bin/python" else path.touch()
    _, planned = make(clone, "-n", "results", f"PYTHON={sys.executable}")
    lines = [shlex.split(line) for line in planned.splitlines()]
    parse = OverridesParser.create().parse_overrides
    sweeps = [parse(line[3:]) for line in lines if "-m" in line]
    jobs = [job for words in sweeps for job in BasicSweeper.split_arguments(words, None)[0]]
    assert len(jobs) == len(set(map(tuple, jobs))) == 39
    assert [line[2] for line in lines[-3:]] == ["pack", "--no-images", "power"]
    for job in jobs[::3]:
        data = composed(*job).data
        assert (data.size, data.steps, data.batch_size, data.split) == (96, 3000, 12, "ssl4mis")
