"""Trainings in terminals of a given width, and what is left to be read on them afterwards."""

import fcntl
import json
import os
import pty
import runpy
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = 24


def in_terminals(trainings, place):
    """Types trainings, one after the other, in forks of a fresh process.

    Args:
        trainings: name -> `words` of train.py, `columns`, and if it is to be stopped `at`: the text
            after which Ctrl+C is typed.
        place: the working directory.

    Returns:
        name -> `code`, `lines` (of the screen and what has scrolled off it) and `drawn` (all text
        that was ever written).
    """
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(trainings)],
        capture_output=True, text=True, timeout=250, env=env, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def _typed(words, columns, at=None):
    import pyte

    screen = pyte.HistoryScreen(columns, ROWS, history=2000)
    stream, drawn = pyte.ByteStream(screen), b""
    child, terminal = pty.fork()
    if not child:
        # a shell starts what it runs in the background with this signal ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        sys.argv = [str(ROOT / "src/train.py"), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit(0)
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the child has ended
            break
        if not data:
            break
        drawn += data
        stream.feed(data)
        if at and at.encode() in drawn:
            at = os.write(terminal, b"\x03") and None
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    above = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    lines = [line.rstrip() for line in (*above, *screen.display)]
    return {"code": code, "lines": lines, "drawn": drawn.decode(errors="replace")}


if __name__ == "__main__":
    import mambaseg.app.build
    import mambaseg.data.datamodule
    import mambaseg.models
    import mambaseg.training.nonfinite
    import mambaseg.training.run
    import mambaseg.training.segmentation  # noqa: F401  (what a training imports)

    chosen = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps({name: _typed(**one) for name, one in chosen.items()}))
