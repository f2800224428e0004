"""What the entry scripts share: composing their configuration and explaining errors."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

from hydra import version
from hydra._internal import utils as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from yaml import YAMLError

import mambaseg.app.resolvers  # noqa: F401 (registers what a configuration asks of the machine)
from mambaseg.app.check import CONF as CONF  # where the entries' configurations are
from mambaseg.app.check import check_targets, checked
from mambaseg.app.overrides import arranged, composition_error, given_overrides, yaml_problem
from mambaseg.app.own import require_own_names
from mambaseg.app.sources import require_sources
from mambaseg.app.sweeps import compare_jobs, skipped
from mambaseg.app.terminal import outlive_closed_pipe
from mambaseg.errors import NotInstalledError, UserError, out_of_memory
from mambaseg.storage.files import keep_caches, print_any_name
from mambaseg.storage.untrusted import printable

# Wanted: `hydra/launcher=joblib` holds the plugin's defaults below ours. Without the match, in a
# later Hydra, ours alone are enough.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against")


class _Explained(CompactHydraException):
    """The message of such an error is printed without a stack trace, and the status is 1."""


def explanation(error: BaseException) -> tuple[BaseException, str] | None:
    """The first of an error and its causes that the user can mend, and what to say about it."""
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause)
        if out_of_memory(cause):
            return cause, (
                f"out of memory: {said}\n"
                "In training, a smaller data.batch_size or data.size needs less, and "
                "trainer.accumulate_grad_batches=2 halves the memory at the same batch size; in "
                "validation and test, a smaller evaluation.batch_size needs less."
            )
        if isinstance(cause, UserError):
            return cause, said
        if isinstance(cause, YAMLError):
            return cause, yaml_problem(cause)
        if type(cause).__name__ == "MisconfigurationException":  # Lightning's, imported by few
            return cause, f"trainer: {said}"
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def explained_errors(kind: type[Exception] = _Explained) -> Iterator[None]:
    """Turns errors the user can mend into one message; all others pass with their stack trace."""
    try:
        yield
    except Exception as error:
        if isinstance(error, kind) or (found := explanation(error)) is None:
            raise
        # not from an error of OmegaConf that wraps it: Hydra would print that one too
        raise kind(printable(found[1])) from found[0]


def _keep_memory() -> None:
    """Keeps freed memory in the process, because the same tensors come back with every step.

    glibc would give large ones back to the system, which clears each page that it gives again.
    """
    mmap_threshold, trim_threshold = -3, -1  # of malloc.h
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        for option in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(option, 1 << 30)


def _own_values(script: str) -> str:
    """The keys of a command's config, with their defaults and comments as its file has them."""
    _, _, own = (CONF / f"{script}.yaml").read_text("utf-8").partition("- _self_")
    return own.partition("\n")[2].partition("\nhydra:")[0].lstrip("\n")


def entry(script: str) -> Callable[[Callable[[DictConfig], Any]], Callable[..., None]]:
    """Decorates a command: composes and checks `conf/<script>.yaml`, explains errors.

    What it makes takes the words behind the command, by default those that were typed. It leaves
    `sys.argv` as it is, which Lightning repeats to start the other processes of DDP.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def job(cfg: DictConfig) -> Any:
            print_any_name()
            with explained_errors():
                keep_caches()
                _keep_memory()
                overrides = given_overrides()
                require_own_names(HydraConfig.get().runtime.choices)
                cfg = checked(cfg, script, overrides)
                require_sources(cfg, script)
                try:
                    check_targets(cfg)
                except NotInstalledError as error:
                    if skipped(cfg, error):
                        return None
                    raise
                outlive_closed_pipe()
                return function(cfg)

        @functools.wraps(function)
        def command(words: Sequence[str] | None = None) -> None:
            try:
                options, overrides = arranged(sys.argv[1:] if words is None else words)
            except UserError as error:
                sys.exit(str(error))
            version.setbase("1.3")
            parser = hydra_main.get_args_parser()
            parser.prog = f"mambaseg {function.__module__.rpartition('.')[2]}"
            args = parser.parse_args([*options, *overrides])
            if args.experimental_rerun:
                sys.exit("--experimental-rerun is not read here: type the overrides again, which "
                         "overrides in a run's run.json lists")  # fmt: skip
            if (args.help or args.cfg or args.info) and hasattr(signal, "SIGPIPE"):
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` has read enough
            if args.hydra_help:  # of Hydra alone, which has no config for our overrides
                args.overrides = []
            report = hydra_main.run_and_report

            def run_and_report(composes: Callable[[], Any]) -> Any:
                def explained() -> Any:
                    try:
                        return composes()
                    except Exception as error:
                        said = composition_error(error, script, overrides)
                        known = isinstance(error, _Explained)
                        if (said is None and not known) or os.environ.get("HYDRA_FULL_ERROR"):
                            raise
                        # Hydra would offer a stack trace, which says nothing more
                        sys.stderr.write(f"{error if known else printable(said or '')}\n")
                        sys.exit(1)
                    finally:
                        compare_jobs()

                return report(explained)

            with mock.patch.object(hydra_main, "run_and_report", run_and_report):
                try:
                    hydra_main._run_hydra(args, parser, job, str(CONF), script)
                except ValueError as error:  # options that exclude each other
                    if os.environ.get("HYDRA_FULL_ERROR"):  # then also a job's errors come here
                        raise
                    sys.exit(str(error))
                except SystemExit as ended:
                    if args.help and not ended.code and script != "config":  # which has groups
                        sys.stdout.write(_own_values(script))
                    raise

        return command

    return decorate
