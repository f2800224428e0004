"""Two real processes that make the same data set or the same decoded cache at the same time."""

import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from fake_cases import find_fakes, read_npz, write_cases

from mambaseg.data import cache as module
from mambaseg.data.cache import open_cache
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.phantoms.phantom import write_phantom

processes = multiprocessing.get_context("fork")  # nothing is imported again: quick


def together(*jobs):
    """Start the functions at the same moment, each in a process; return what they gave or said."""
    start, answers = processes.Barrier(len(jobs)), processes.SimpleQueue()

    def run(job):
        start.wait(20)
        try:
            answers.put(job())
        except Exception as error:
            answers.put(f"{type(error).__name__}: {error}")

    started = [processes.Process(target=run, args=(job,)) for job in jobs]
    for process in started:
        process.start()
    given = [answers.get() for _ in started]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * len(started)
    return given


def opened(root, cache_dir, reader=read_npz):
    cases = find_fakes(root, reader=reader)
    return open_cache(cases, Preprocessing("paper", 32), cache_dir=cache_dir, num_classes=4)


@pytest.fixture
def root(tmp_path):
    write_cases(tmp_path / "fakes", patients=4)
    return tmp_path / "fakes"


def checksum(cache):
    cache.verify()
    return float(sum(cache.image(number).sum(dtype=np.float64) for number in range(len(cache))))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("empty", [False, True])
def test_a_phantom_that_two_processes_write_is_whole(empty, tmp_path):
    root, alone = tmp_path / "both" / "phantom", tmp_path / "one" / "phantom"
    if empty:
        root.mkdir(parents=True)
    given = together(*[lambda: str(write_phantom(root, patients=1))] * 2)
    assert given == [str(root)] * 2
    assert names(root.parent) == ["phantom"]
    write_phantom(alone, patients=1)
    files = [path.relative_to(alone) for path in alone.rglob("*") if path.is_file()]
    assert files and all((root / f).read_bytes() == (alone / f).read_bytes() for f in files)


def test_a_cache_that_two_processes_build_is_whole(root, tmp_path):
    given = together(*[lambda: checksum(opened(root, tmp_path / "cache"))] * 3)
    assert len(set(given)) == 1 and isinstance(given[0], float)
    assert len(names(tmp_path / "cache")) == 1
    assert checksum(opened(root, tmp_path / "cache")) == given[0]


def test_a_damaged_cache_is_built_again_by_all_who_find_it_at_once(root, tmp_path):
    sound = opened(root, tmp_path / "cache")
    expected = checksum(sound)
    for _ in range(3):  # who takes away what, and when, is a matter of luck
        (sound.folder / "labels.npy").write_bytes(b"")
        given = together(*[lambda: checksum(opened(root, tmp_path / "cache"))] * 3)
        assert given == [expected] * 3
        assert names(tmp_path / "cache") == [sound.folder.name]


def test_a_cache_that_another_process_has_built_again_is_not_taken_away(
    root, tmp_path, monkeypatch
):
    folder = opened(root, tmp_path / "cache").folder
    (folder / "labels.npy").write_bytes(b"")
    discard, rebuilt = module._discard, []

    def late(folder, digests):
        monkeypatch.setattr(module, "_discard", discard)
        rebuilt.append(opened(root, tmp_path / "cache").folder.stat().st_ino)
        discard(folder, digests)

    monkeypatch.setattr(module, "_discard", late)
    opened(root, tmp_path / "cache").verify()
    assert [folder.stat().st_ino] == rebuilt
    assert names(tmp_path / "cache") == [folder.name]


def test_a_cache_that_is_taken_away_as_soon_as_it_stands_is_built_again(
    root, tmp_path, monkeypatch
):
    build = module._build

    def robbed(*arguments):
        monkeypatch.setattr(module, "_build", build)
        build(*arguments)
        shutil.rmtree(arguments[-1])

    monkeypatch.setattr(module, "_build", robbed)
    opened(root, tmp_path / "cache").verify()


def test_a_builder_that_is_killed_leaves_nothing_that_is_opened(root, tmp_path):
    begun = processes.Event()

    def slow(case):
        begun.set()
        time.sleep(60)

    process = processes.Process(target=lambda: opened(root, tmp_path / "cache", reader=slow))
    process.start()
    assert begun.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (left,) = names(tmp_path / "cache")
    cache = opened(root, tmp_path / "cache")
    cache.verify()
    assert names(tmp_path / "cache") == sorted([left, cache.folder.name])
