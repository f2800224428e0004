"""The console command: it lists its commands at once, and its names are those of the scripts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mambaseg import __version__
from mambaseg.app.console import COMMANDS, main
from runs import UNET, built

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "monai", "matplotlib", "wandb", "hydra", "numpy")


def imported(*words):
    """Which heavy packages a command imported."""
    code = (
        "import sys\nfrom mambaseg.app.console import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit as end:\n    assert end.code\n"
        f"import json\nprint(json.dumps([one for one in {HEAVY!r} if one in sys.modules]))"
    )
    env = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_list_of_commands_imports_nothing(capsys):
    main([])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)
    assert not imported() and not imported("trian")


def test_a_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"mambaseg {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [("trian", "did you mean train?"), ("model=unet", "mambaseg train model=unet"),
     ("-m", "mambaseg train -m"), ("xyz", "mambaseg --help lists them")],
)  # fmt: skip
def test_what_is_no_command_is_refused_with_the_nearest(typed, said):
    with pytest.raises(SystemExit, match=said):
        main([typed])


def test_ctrl_c_before_a_run_ends_the_command_without_a_traceback(monkeypatch):
    def main_(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("mambaseg.app.commands.report.main", main_)
    with pytest.raises(SystemExit) as ended:
        main(["report", "outputs"])
    assert ended.value.code == 130


def test_every_script_is_a_command():
    scripts = {path.stem for path in (ROOT / "src").glob("*.py")}
    assert scripts <= set(COMMANDS)


@pytest.mark.parametrize("name", ["check", "doctor", "report"])
def test_help_names_the_command(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and f"usage: mambaseg {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "key"), [
    ("predict", "uncertainty: false "), ("evaluate", "calibration: false "),
    ("export", "tolerance: 1e-4 "), ("demo", "port: "), ("benchmark", "repeats: 5 "),
])  # fmt: skip
def test_help_lists_the_values_of_a_command_with_their_defaults(name, key, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert not ended.value.code and "mambaseg" in said
    values = said.partition("Values, as key=value:")[2]
    assert f"\n{key}" in values and "#" in values and "hydra" not in values


def test_a_run_built_after_a_help_has_its_own_choices(small_run):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])  # Hydra keeps the choices of predict: it has no model
    with built(*small_run, *UNET, "trainer=cpu") as run:
        assert run.plan.configs == {"data": "phantom", "model": "unet"}
