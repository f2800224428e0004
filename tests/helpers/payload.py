"""Files that would run a command, and how a test sees that it ran."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np


class Payload:
    """Unpickling it writes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def armed(marker: Path) -> Payload:
    """A payload that has been seen to work: a test of it can fail."""
    payload = Payload(marker)
    pickle.loads(pickle.dumps(payload))
    assert marker.exists(), "the payload does nothing"
    marker.unlink()
    return payload


def object_npy(payload: Payload) -> bytes:
    """A .npy file whose array holds the payload, pickled."""
    stream = io.BytesIO()
    np.save(stream, np.array([payload], dtype=object), allow_pickle=True)
    return stream.getvalue()


def claiming_npy(shape: tuple[int, ...], data: bytes = b"\0" * 16, descr: str = "|u1") -> bytes:
    """A .npy file whose header claims a shape that its data do not have."""
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def npz(members: dict[str, bytes]) -> bytes:
    """A compressed .npz file with these members, name without .npy -> content."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()
