"""Many commands in forks of one fresh process, so that the imports they share are paid for once."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def typed_all(commands, place, *imported):
    """Types commands, each in a folder of its own.

    Args:
        commands: name -> [command, *words]; a command runs by its script, if src/ has one.
        place: the folders `<place>/<name>` are there and are the working directories.
        imported: modules that are imported before, besides what most commands import.

    Returns:
        name -> `code`, `torch` (whether it was imported) and what was said: `out`, `error`.
    """
    env = {**os.environ, "ACDC_ROOT": "", "PYTHONPATH": f"{ROOT / 'src'}"}
    job = {"commands": commands, "place": place, "imported": ["mambaseg.app.build", *imported]}
    job = json.dumps(job, default=str)
    subprocess.run([sys.executable, __file__, job], check=True, timeout=280, env=env)
    return json.loads((place / "done.json").read_text())


def _fork(words, folder, said):
    """Runs a command in a fork; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(f"{said}.{name}", os.O_CREAT | os.O_WRONLY), number)
    code = 0
    try:
        script = ROOT / "src" / f"{words[0]}.py"
        if script.exists():
            sys.argv = [str(script), *words[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv = ["mambaseg", *words]
            runpy.run_module("mambaseg", run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if "torch" in sys.modules:
        Path(f"{said}.torch").touch()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(job):
    for module in job["imported"]:
        importlib.import_module(module)
    place, done = Path(job["place"]), {}
    for name, words in job["commands"].items():
        said = place / f"{name}.said"
        code = _fork(words, place / name, said)
        texts = {end: Path(f"{said}.{end}").read_text() for end in ("out", "error")}
        done[name] = {"code": code, "torch": Path(f"{said}.torch").exists(), **texts}
    (place / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
