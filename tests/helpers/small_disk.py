"""A disk of a few MB, so that it can be full."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mambaseg.errors import UserError


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """Mount a tmpfs of this size on `folder`; the test is skipped where that is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs a small disk: there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Fill the disk of `folder` but for `leave` bytes (whole pages); returns what takes the room.

    The file system is asked, not computed: tmpfs counts pages.
    """
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
        stream.truncate(max(0, stream.tell() - leave))
    return ballast


def no_space(place: Path, option: str) -> Any:
    """Expect the error of a full disk: where, and what can be done."""
    return pytest.raises(
        UserError, match=rf"cannot write {re.escape(str(place))}.*No space left.*Free.*{option}"
    )


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder but for what fills the disk: name -> bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ballast"
    }
