"""Shared fixtures: quiet and repeatable runs, and the real data where they are at hand."""

import gc
import locale
import logging
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from mambaseg.app.terminal import Console
from runs import small_overrides

os.environ.setdefault("WANDB_MODE", "offline")

# The same examples in every run: a failure is a change of the code, not of the luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


# Files of minutes come first, the longest before the others, so that no worker is left alone with
# one of them at the end.
LONGEST = (
    "test_train", "test_contract", "test_resume", "test_home", "test_schema", "test_nonfinite",
    "test_conf", "test_learning", "test_notebooks", "test_wandb", "test_golden_gradients",
    "test_export", "test_many_files", "test_kills", "test_wheel", "test_cuda", "test_secrets",
    "test_own_project", "test_launching", "test_search", "test_numba", "test_identity",
    "test_triton",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_collection_finish():
    """Lets the garbage collector leave out what stays: it runs at the start of every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def repeatable():
    """Same random numbers in every test, one thread: two tests run side by side."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def locale_kept():
    """Writing DICOM with SimpleITK (reading does not) sets the process to the locale "C"."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(autouse=True)
def log_handlers_kept():
    """Entry scripts add handlers to the root logger; their streams end with the test."""
    root = logging.getLogger()
    before = [handler for handler in root.handlers if not _ended(handler)]
    root.handlers[:] = before[:]
    yield
    for handler in root.handlers[:]:  # pytest's own are of other classes
        if type(handler) in (logging.StreamHandler, Console) and handler not in before:
            root.removeHandler(handler)


def _ended(handler: logging.Handler) -> bool:
    return type(handler) is logging.StreamHandler and handler.stream.closed


@pytest.fixture(scope="session")
def acdc_root() -> Path:
    """The real ACDC data; tests that need them are skipped elsewhere."""
    root = os.environ.get("ACDC_ROOT")
    if not root or not Path(root).is_dir():
        pytest.skip("needs the real ACDC data: set ACDC_ROOT to its folder")
    return Path(root)


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory) -> Path:
    """Eight small synthetic patients in the official layout, shared by all tests; do not change."""
    from mambaseg.data.phantoms.phantom import write_phantom

    return write_phantom(tmp_path_factory.mktemp("phantom") / "data", patients=8, seed=0)


@pytest.fixture
def small_run(phantom_root, tmp_path) -> list[str]:
    """Overrides of a small run whose outputs go to this test's folder."""
    return small_overrides(phantom_root, tmp_path / "outputs")


@pytest.fixture(scope="module")
def shared_run(phantom_root, tmp_path_factory) -> list[str]:
    """The same for the tests of a module that share one run; they only read it."""
    return small_overrides(phantom_root, tmp_path_factory.mktemp("shared") / "outputs")
