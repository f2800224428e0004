"""Checkpoints on disk: torn, bent and half-written ones are found out and passed over."""

import errno
import math
import random
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mambaseg.errors import UserError
from mambaseg.training import checkpoints as files
from mambaseg.training.checkpoints import Checkpoints
from mambaseg.training.monitors import worth_of
from small_disk import no_space, small_disk


def content(step, best=None):
    return {
        "global_step": step,
        "callbacks": {files.STATE_KEY: {"best_step": best}},
        "state_dict": {"weight": torch.arange(40.0) * step},
    }


@pytest.fixture
def folder(tmp_path):
    """States after 10, 20 and 30 steps; the best is the second."""
    for step, best in ((10, None), (20, 20), (30, 20)):
        files.write(content(step, best), files.step_file(tmp_path, step))
    files.give_name(files.step_file(tmp_path, 20), tmp_path / "best.ckpt")
    files.give_name(files.step_file(tmp_path, 30), tmp_path / "last.ckpt")
    return tmp_path


def bend(path, keep=1.0):
    """Cuts a file or, where all of it is kept, changes one bit in its weights."""
    raw = bytearray(path.read_bytes())
    weights = raw.find(torch.arange(1.0, 4.0).mul(30).numpy().tobytes())
    if keep == 1.0:
        raw[max(weights, len(raw) // 2)] ^= 1
    path.unlink()  # its other name stays whole
    path.write_bytes(raw[: int(keep * len(raw))])


def test_every_single_bit_is_either_missed_or_means_nothing(tmp_path):
    """One bit of every byte is flipped; where no checksum covers it, nothing is read from it."""
    path, bent = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    files.write(content(7, 3), path)
    assert files.damage(path) == "" and files.read_progress(path) == files.Progress(7, 3)
    raw, draw, found = path.read_bytes(), random.Random(0), 0
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << draw.randrange(8)
        bent.write_bytes(changed)
        if progress := files.read_progress(bent):
            weights = torch.load(bent, weights_only=True)["state_dict"]["weight"]
            assert progress == files.Progress(7, 3) and torch.equal(weights, torch.arange(40.0) * 7)
        else:
            found += 1
    assert found > len(raw) / 3  # the rest is alignment and what zip says twice


@pytest.mark.parametrize("size", [0, 1, 100, 600, -1])
def test_a_cut_file_is_damaged(tmp_path, size):
    path = tmp_path / "a.ckpt"
    files.write(content(7), path)
    path.write_bytes(path.read_bytes()[:size])
    assert files.damage(path) and files.read_progress(path) is None


def test_a_checkpoint_of_something_else_is_none_to_go_on_from(tmp_path):
    torch.save({"global_step": 3}, tmp_path / "last.ckpt")
    assert files.damage(tmp_path / "last.ckpt") == "" and files.newest(tmp_path) is None


def test_the_newest_is_taken(folder):
    assert files.newest(folder) == files.step_file(folder, 30)


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_damaged_one_is_passed_over_and_both_are_named(folder, keep, caplog):
    newest, before = (files.step_file(folder, step) for step in (30, 20))
    bend(newest, keep)
    (folder / "last.ckpt").unlink()
    assert files.newest(folder) == before
    assert f"{newest} is damaged: resuming from {before} instead" in caplog.text


def test_one_without_its_best_is_passed_over(folder, caplog):
    bend(files.step_file(folder, 20), 0.5)
    assert files.newest(folder) == files.step_file(folder, 30)  # best.ckpt is a copy of it
    bend(folder / "best.ckpt", 0.5)
    assert files.newest(folder) == files.step_file(folder, 10)
    assert "the best checkpoint of" in caplog.text


def test_a_best_of_later_steps_does_not_count(folder):
    """A validation after the state may have been the better one, with its weights there."""
    files.write(content(25, 25), folder / "best.ckpt")
    files.step_file(folder, 20).unlink()
    assert files.newest(folder) == files.step_file(folder, 10)


def test_after_the_end_there_are_two_names_only(folder):
    files.clear(folder, keep=set())
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert files.newest(folder) == folder / "last.ckpt"


def test_what_a_killed_process_left_half_written_goes(folder):
    (folder / ".step-00000040.ckpt.tmp").write_bytes(b"half")
    files.clear(folder, keep={20, 30})
    assert set(files.step_files(folder)) == {20, 30} and not list(folder.glob(".*"))


def test_a_name_is_a_copy_where_there_are_no_links(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(type(folder), "hardlink_to", refuse)
    files.give_name(files.step_file(folder, 30), folder / "best.ckpt")
    assert not (folder / "best.ckpt").samefile(files.step_file(folder, 30))
    assert files.read_progress(folder / "best.ckpt") == files.Progress(30, 20)


def test_on_a_full_disk_the_file_before_stays(tmp_path):
    with small_disk(tmp_path / "disk", kibibytes=4096) as disk:
        leave_the_file_before(disk)


def leave_the_file_before(disk):
    path = disk / "last.ckpt"
    files.write(content(1), path)
    big = {**content(2), "more": torch.zeros(4_000_000)}
    with no_space(path, "resumes from the checkpoint before"):
        files.write(big, path)
    assert [p.name for p in disk.iterdir()] == ["last.ckpt"]
    assert files.read_progress(path) == files.Progress(1, None)


# ---- intact ones that cannot be used


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(0.5), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Path("a"), "pathlib.PosixPath"),
        (deque([1]), "collections.deque"),
    ],
    ids=str,
)
def test_what_could_not_be_read_again_is_not_written(folder, value, kind):
    """The states before it stay, and the message says whose value it is."""
    bad = content(40, 20)
    bad["callbacks"]["Mine"] = {"history": [1, value]}
    with pytest.raises(UserError, match=rf"callbacks / Mine / history / 1 is a {kind}\. Keep only"):
        files.write(bad, files.step_file(folder, 40))
    assert files.newest(folder) == files.step_file(folder, 30)
    assert not list(folder.glob(".*"))


def test_an_intact_one_with_more_than_plain_data_is_not_called_damaged(folder):
    """Of an earlier version, which wrote it; the training must not begin anew without a word."""
    bad = {**content(40, 20), "optimizer_states": [np.float64(1)]}
    torch.save(bad, files.step_file(folder, 40))
    for read in (lambda: files.newest(folder), lambda: load(files.step_file(folder, 40))):
        with pytest.raises(UserError, match=r"40\.ckpt is whole, but it holds numpy.*rerun=true"):
            read()


def load(path):
    return files.CheckedIO().load_checkpoint(path, map_location="cpu", weights_only=True)


def faulty(error):
    def fault(*_, **__):
        raise error

    return fault


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error"),
     OSError(errno.EMFILE, "Too many open files"), MemoryError()],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("where", ["zipfile.ZipFile", "torch.load", "pathlib.Path.iterdir"])
def test_one_that_cannot_be_read_now_is_not_called_damaged(folder, where, error, monkeypatch):
    monkeypatch.setattr(where, faulty(error))
    with pytest.raises(UserError, match=r"cannot read .*start the same command again"):
        files.newest(folder)


def test_without_memory_mapping_it_is_read_all_the_same(folder, monkeypatch):
    whole = torch.load

    def unmapped(*words, mmap=False, **options):
        if mmap:
            raise RuntimeError("unable to mmap 160 bytes from file: No such device (19)")
        return whole(*words, **options)

    monkeypatch.setattr("torch.load", unmapped)
    assert files.newest(folder) == files.step_file(folder, 30)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_the_first_of_equally_good_states_is_the_best_and_nan_never_is(tmp_path, mode, sign):
    states, best = Checkpoints(tmp_path, mode=mode), []
    for step, score in enumerate((math.nan, 0.5, 0.5, math.nan, 0.4, 0.6)):
        metrics = {"val/dice": sign * score}
        states.on_validation_end(
            SimpleNamespace(sanity_checking=False, callback_metrics=metrics, global_step=step), None
        )
        best.append(states.best_step)
    assert best == [None, 1, 1, 1, 1, 5]


def test_a_network_without_a_score_is_worth_less_than_any():
    trainer = SimpleNamespace(checkpoint_callbacks=[])
    worth = [worth_of({"val/dice": one}, trainer, "val/dice") for one in (math.nan, 0.0, 0.5)]
    assert worth == [-math.inf, 0.0, 0.5]
