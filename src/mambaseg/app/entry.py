"""What the entry scripts share: composing their configuration and explaining errors."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import hydra
from hydra._internal import utils as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from mambaseg.app.check import CONF as CONF  # where the entries' configurations are
from mambaseg.app.check import check_targets, checked
from mambaseg.app.words import arranged, composition_error, only_targets_know
from mambaseg.errors import UserError
from mambaseg.storage.files import keep_caches, print_any_name
from mambaseg.storage.untrusted import printable

# Wanted: `hydra/launcher=joblib` holds the plugin's defaults below ours. Without the match, in a
# later Hydra, ours alone are enough.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against")


class _Explained(CompactHydraException):
    """Hydra prints the message of such an error without a stack trace and exits with status 1."""


@contextmanager
def explained_errors() -> Iterator[None]:
    """Turns errors the user can mend into one message; all others pass with their stack trace."""
    try:
        yield
    except Exception as error:
        explained = _explanation(error)
        if explained is None:
            raise
        message, cause = explained
        # not from an error of OmegaConf that wraps it: Hydra would print that one too
        raise _Explained(message) from cause


def _explanation(error: BaseException) -> tuple[str, BaseException] | None:
    """What to say about an error, and which of its causes that is about."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return printable(str(cause)), cause
        text = str(cause)
        if type(cause).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
            return (
                f"out of memory: {text}\n"
                "A smaller data.batch_size or data.size needs less; "
                "trainer.accumulate_grad_batches=2 halves the memory at the same batch size."
            ), cause
        cause = cause.__cause__ or cause.__context__
    return None


def entry(script: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Decorates an entry script: composes and checks `conf/<script>.yaml`, explains errors."""

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(function)
        def job(cfg: DictConfig) -> Any:
            print_any_name()
            with explained_errors():
                keep_caches()
                words = HydraConfig.get().overrides.task
                cfg = checked(cfg, script, words)
                if any(map(only_targets_know, words)):
                    check_targets(cfg)
                return function(cfg)

        main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=script)(job)

        @functools.wraps(function)
        def command() -> Any:
            options, overrides = arranged(sys.argv[1:])
            sys.argv[1:] = [*options, *overrides]
            with _composition_explained(script, overrides):
                return main()

        return command

    return decorate


@contextmanager
def _composition_explained(script: str, overrides: list[str]) -> Iterator[None]:
    """Puts our words in the place of Hydra's where a configuration cannot be composed."""
    report = hydra_main.run_and_report

    def run_and_report(function: Callable[[], Any]) -> Any:
        def explained() -> Any:
            try:
                return function()
            except Exception as error:
                said = composition_error(error, script, overrides)
                if said is None:
                    raise
                raise _Explained(printable(said)) from None

        return report(explained)

    with mock.patch.object(hydra_main, "run_and_report", run_and_report):
        yield
