"""What the entry scripts share: composing their configuration and explaining errors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from mambaseg.errors import UserError
from mambaseg.files import keep_caches
from mambaseg.foreign import printable

CONF = Path(__file__).resolve().parents[2] / "conf"

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


def entry(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Decorates an entry script: composes `conf/<config_name>.yaml`, explains errors."""

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(function)
        def explained(cfg: DictConfig) -> Any:
            with explained_errors():
                keep_caches()
                return function(cfg)

        return hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(
            explained
        )

    return decorate
