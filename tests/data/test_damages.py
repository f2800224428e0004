"""Every damaged data set ends in an error with file and remedy, or is handled as documented."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from damages import DAMAGES, Accepted, Refused, Warned
from harms import FOLDER, H5, IMAGE, LABEL, WRITERS, write_official, write_volumes
from tiny_acdc import pixels, write_h5, write_nifti

from mambaseg.data.check import check_dataset
from mambaseg.data.datamodule import SegmentationDataModule
from mambaseg.data.readers.acdc import find_cases
from mambaseg.errors import UserError

pytestmark = pytest.mark.timeout(30)  # a pipe would block for ever


def load(root, cache):
    """What training and evaluation do before their first step."""
    data = SegmentationDataModule(
        name="tiny",
        find_cases=find_cases,
        root=root,
        cache_dir=cache,
        class_names=["background", "RV", "MYO", "LV"],
        num_classes=4,
        split="random",
        size=8,
        batch_size=2,
        steps=1,
    )
    data.load()
    return data


def harm_another(root, layout):
    """A label of no class for a patient at the end of the list."""
    if layout == "h5":
        write_h5(root / "data" / "patient004_frame02.h5", 0, label_of=7)
        return "patient004_frame02.h5"
    label = pixels(401)[1]
    label[0, 0, 0] = 7
    write_nifti(root / "patient004" / "patient004_frame12_gt.nii.gz", label)
    return "patient004_frame12_gt.nii.gz"


def lines(report, level):
    return [f"{one.where}: {one.problem}" for one in report.of(level)]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_damaged_data_set_is_refused_or_handled_as_documented(damage, tmp_path):
    root, cache = tmp_path / "Herz = Ärzte [1]", tmp_path / "cache"
    WRITERS[damage.layout](root)
    damage.harm(root)
    expected = damage.expected
    if not isinstance(expected, Refused):
        data = load(root, cache)
        assert data.counts["train"]["cases"] >= 2
        report = check_dataset(root)
        assert report.ok, lines(report, "error")
        if isinstance(expected, Warned):
            assert any(re.search(expected.says, line) for line in lines(report, "warning"))
        else:
            assert not report.of("warning")
        return
    with pytest.raises(UserError) as raised:
        load(root, cache)
    said = str(raised.value)
    assert str(root) in said and expected.file in said
    assert re.search(expected.says, said) and re.search(expected.remedy, said), said
    assert not list(cache.glob("*")), "something half-written was left"

    other = harm_another(root, damage.layout)
    report = check_dataset(root)
    told = [one for one in report.of("error") if re.search(expected.says, one.problem)]
    assert any(expected.file in f"{one.where} {one.problem}" for one in told), lines(
        report, "error"
    )
    assert all(re.search(expected.remedy, one.remedy) for one in told)
    if report.cases:  # not where the root as a whole is unusable
        assert any(other in line and "value 7" in line for line in lines(report, "error"))


IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import h5py
from mambaseg.data.readers.acdc import find_cases
from mambaseg.data.check import check_dataset
from mambaseg.data.fingerprint import source_digests
from mambaseg.errors import UserError

def examine(root):
    try:
        cases = find_cases(root)
        source_digests(cases)
        for case in cases:
            case.read(4)
    except UserError as error:
        told = str(error)
    else:
        told = "sound"
    check_dataset(root)
    return told

sound, *roots = map(Path, sys.argv[1:])
assert examine(sound) == "sound"
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for root in roots:
    print(examine(root).replace("\\n", " "))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_what_claims_to_be_huge_is_examined_in_little_memory(tmp_path):
    huge = [damage for damage in DAMAGES if damage.claims]
    roots = [tmp_path / str(number) for number in range(len(huge) + 1)]
    write_official(roots[0])
    for damage, root in zip(huge, roots[1:], strict=True):
        WRITERS[damage.layout](root)
        damage.harm(root)
    words = [sys.executable, "-c", IN_LITTLE_MEMORY, *map(str, roots)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for damage, line in zip(huge, done.stdout.splitlines(), strict=True):
        expected = damage.expected.says if isinstance(damage.expected, Refused) else "sound"
        assert re.search(expected, line), line


AS_NOBODY = """
import os, sys
from mambaseg.app.commands.check import main
sound, *roots = sys.argv[1:]
main([sound])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
for root in roots:
    print("-----", flush=True)
    print("status", main([root]))
"""
CLOSED = (IMAGE, LABEL, "Info.cfg", ".", "..", H5)


def test_what_may_not_be_read_is_an_error_that_names_it():
    """In a process of another user where this one is root, who reads everything."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folder is closed to others
        Path(place).chmod(0o755)
        write_official(sound := Path(place) / "sound")
        closed = []
        for number, what in enumerate(CLOSED):
            root = Path(place) / f"root{number}"
            WRITERS["h5" if what == H5 else "official"](root)
            path = root / ("data" if what == H5 else FOLDER) / what
            closed.append(path.resolve())
            closed[-1].chmod(0)
        program = AS_NOBODY
        if os.getuid() != 0:
            program = re.sub(r"^os\.set.*\n", "", AS_NOBODY, flags=re.MULTILINE)
        roots = [str(Path(place) / f"root{number}") for number in range(len(CLOSED))]
        words = [sys.executable, "-c", program, str(sound), *roots]
        environment = {**os.environ, "COLUMNS": "400"}
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=60, env=environment
        )
        for path in closed:
            path.chmod(0o755)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for path, said in zip(closed, done.stdout.split("-----\n")[1:], strict=True):
        named = rf"{re.escape(path.name)}.*\n?.*Permission denied.*\n *Check its permissions"
        assert re.search(named, said), said
        assert "1 error" in said and "status 1" in said


def cut_and_flipped(sound, *, cuts, flips):
    """The bytes cut off after every `cuts`-th, and with a bit flipped in every `flips`-th."""
    damaged = [sound[:length] for length in range(0, len(sound), cuts)]
    for place in range(0, len(sound), flips):
        altered = bytearray(sound)
        altered[place] ^= 1 << place % 8
        damaged.append(bytes(altered))
    return damaged


def test_any_flipped_bit_and_any_cut_of_a_packed_image_is_an_error_or_changes_nothing(tmp_path):
    write_official(tmp_path)
    case = find_cases(tmp_path)[2]
    sound, volume = case.image_path.read_bytes(), case.read(4)
    damaged = cut_and_flipped(sound, cuts=5, flips=1)
    refused = 0
    for data in damaged:
        case.image_path.write_bytes(data)
        try:
            found = case.read(4)
        except UserError:
            refused += 1
        else:  # name and time stamp in the gzip's own header
            assert np.array_equal(found.image, volume.image) and found.spacing == volume.spacing
    assert refused > 0.9 * len(damaged)


def test_any_flipped_bit_and_any_cut_of_hdf5_is_an_error_or_a_volume(tmp_path):
    """HDF5 has no check sum over the voxels: a bit that flips there cannot be seen."""
    write_volumes(tmp_path)
    case = find_cases(tmp_path)[2]
    sound, refused = case.image_path.read_bytes(), 0
    for data in cut_and_flipped(sound, cuts=101, flips=13):
        case.image_path.write_bytes(data)
        try:
            found = case.read(4)
        except UserError:
            refused += 1
        else:
            assert found.image[:, 0].shape == found.label.shape
            assert np.isfinite(found.image).all() and found.label.max() < 4
    assert refused > len(sound) // 101


def test_the_table_is_as_long_as_it_should_be_and_names_are_unique():
    names = [damage.name for damage in DAMAGES]
    assert len(names) == len(set(names)) >= 40
    kinds = [type(damage.expected) for damage in DAMAGES]
    assert all(kinds.count(kind) >= 5 for kind in (Refused, Warned, Accepted))
