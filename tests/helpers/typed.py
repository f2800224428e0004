"""Commands as one types them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def typed(*arguments, cwd=ROOT, timeout=280, script=ROOT / "src" / "train.py", env=None):
    """Run an entry script with overrides; its output as text."""
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True, text=True, timeout=timeout, cwd=cwd, stdin=subprocess.DEVNULL,
        env=env,
    )  # fmt: skip
