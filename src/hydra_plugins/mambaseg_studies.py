"""A sweeper: one Optuna study per combination of swept overrides.

    mambaseg train -m hparams_search=optuna model=unet,mamba_unet

searches twice, each time with the whole budget and the same first points. What
`hydra.sweeper.params` names is searched; every other override with commas, a range or a glob makes
studies.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from mambaseg.errors import UserError
from mambaseg.storage.identity import better
from mambaseg.storage.run_folder import slug

# keys that make no other search: its place, its number of trials, what the name of a study begins
# with
_LEFT_OUT = ("name", "outputs", "rerun", "model", "hydra.sweeper.n_trials",
             "hydra.sweeper.max_failure_rate")  # fmt: skip
_SWEEPER = ("hydra.sweeper.", "hydra/sweeper")
log = logging.getLogger(__name__)


class Studies(Sweeper):
    """Runs one study after the other; a failed one does not stop the others.

    Args:
        sampler: configuration of an Optuna sampler; every study makes its own from it.
        params: what is searched, name -> sweep in Hydra's grammar.
        options: other arguments of the plugin's `OptunaSweeper`.
    """

    def __init__(self, sampler: DictConfig, params: DictConfig, **options: Any) -> None:
        self.sampler, self.params, self.options = sampler, params, options
        self.config: DictConfig
        self.hydra_context: HydraContext
        self.task_function: TaskFunction

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keeps what every study needs."""
        self.hydra_context, self.task_function = hydra_context, task_function
        self.config = config

    def sweep(self, arguments: list[str]) -> None:
        """Searches, and says each study's best point and the command that tests it.

        Raises:
            Exception: the first failure, after all studies.
        """
        failure: Exception | None = None
        for chosen, words in self._studies(arguments):
            label = self._label(chosen, words)
            folder = Path(self.config.hydra.sweep.dir) / "studies" / label
            log.info("study %s: %d trials", label, self.options["n_trials"])
            try:
                self._search(label, words, folder)
            except Exception as error:
                log.error("study %s failed; the same command resumes it", label)
                failure = failure or error
                continue
            self._say_best(label, words, folder)
        if failure:
            raise failure

    def _studies(self, arguments: list[str]) -> Iterator[tuple[list[str], list[str]]]:
        """Yields (the overrides in which this study differs from the others, all its overrides)."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given: list[list[str]] = []
        several: list[bool] = []
        for override in parser.parse_overrides(arguments):
            key = override.get_key_element()
            swept = override.is_sweep_override() and override.is_discrete_sweep()
            if swept and key not in self.params:
                given.append([f"{key}={value}" for value in override.sweep_string_iterator()])
                several.append(True)
            else:
                given.append([str(override.input_line)])
                several.append(False)
        for words in itertools.product(*given):
            yield [word for word, own in zip(words, several, strict=True) if own], list(words)

    def _label(self, chosen: list[str], words: list[str]) -> str:
        """The network, the swept values, and a digest of all that makes another search of it."""
        from mambaseg.app.overrides import key_of  # Hydra imports this file with every command

        network = self._job(words).hydra.runtime.choices["model"]
        values = [word.partition("=")[2] for word in chosen if key_of(word) != "model"]
        others = sorted(
            word for word in self._typed(words)
            if key_of(word) not in _LEFT_OUT and word != "hparams_search=optuna"
        )  # fmt: skip
        digest = hashlib.blake2b("\n".join(others).encode(), digest_size=4).hexdigest()
        return "-".join([*map(slug, [str(network), *values]), *[digest] * bool(others)])

    def _typed(self, words: list[str]) -> list[str]:
        """All overrides of a study: its own, and those of the sweeper."""
        hydras: Any = OmegaConf.to_container(self.config.hydra.overrides.hydra, resolve=False)
        return [*words, *(word for word in hydras if word.lstrip("+~").startswith(_SWEEPER))]

    def _job(self, words: list[str]) -> DictConfig:
        """The configuration of a study's runs; of what is searched it has the defaults."""
        parsed = OverridesParser.create().parse_overrides(words)
        plain = [str(word.input_line) for word in parsed if not word.is_sweep_override()]
        return self.hydra_context.config_loader.load_sweep_config(self.config, plain)

    def _search(self, label: str, words: list[str], folder: Path) -> None:
        import optuna
        from hydra.utils import instantiate
        from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # Hydra's lines say the same
        unused = dict.fromkeys(("storage", "search_space", "custom_search_space"))
        options = {**unused, "study_name": label, **self.options}
        options["direction"] = self._direction(words)
        study = OptunaSweeper(sampler=instantiate(self.sampler), params=self.params, **options)
        config = self.config.copy()
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)  # of the study's result only, not of its runs
        folder.mkdir(parents=True, exist_ok=True)
        task = _scored(self.task_function)
        study.setup(hydra_context=self.hydra_context, task_function=task, config=config)
        try:
            study.sweep(words)
        except ValueError as error:
            if "No trials are completed" not in str(error):  # as Optuna says it
                raise
            raise UserError(f"study {label}: no trial has a score, so there is no best") from error
        result = OmegaConf.load(path := folder / "optimization_results.yaml")
        OmegaConf.save(OmegaConf.merge(result, {"overrides": self._typed(words)}), path)

    def _direction(self, words: list[str]) -> str:
        """Which way the score of a study's runs is better, by callbacks.checkpoint and its metric.

        Raises:
            UserError: `hydra.sweeper.direction` says the opposite.
        """
        from mambaseg.app.settle import modes_of  # Hydra imports this file with every command

        job = self._job(words)
        monitor = str(OmegaConf.select(job, "callbacks.checkpoint.monitor"))
        given = OmegaConf.select(job, "callbacks.checkpoint.mode")
        mode = given or modes_of(job).get(monitor) or better(monitor)
        direction = "minimize" if mode == "min" else "maximize"
        if self.options.get("direction") not in (None, direction):
            raise UserError(
                f"hydra.sweeper.direction={self.options['direction']}: the score of a run is the "
                f"best {monitor}, mode {mode}; leave hydra.sweeper.direction at null"
            )
        return direction

    def _say_best(self, label: str, words: list[str], folder: Path) -> None:
        from mambaseg.app.budget import steps_within
        from mambaseg.app.check import checked
        from mambaseg.app.own import config_dirs

        result = OmegaConf.load(folder / "optimization_results.yaml")
        best = [f"{key}={value}" for key, value in result.best_params.items()]
        overrides = [*words, *best]
        job = checked(self._job(overrides), self.config.hydra.job.config_name, overrides)
        left_out = {"hparams_search", "name", "test", *result.best_params}
        if steps := steps_within(job):  # another experiment would measure its time anew
            left_out.add("data.minutes")
            best += ["data.minutes=null", *(f"{key}={count}" for key, count in steps.items())]
        kept = [word for word in words if word.split("=", 1)[0] not in left_out]
        log.info("study %s: best score %.4f", label, result.best_value)
        places = [f"--config-dir={place}" for place in config_dirs()]
        command = [*places, f"name={self.config.name}_best", *kept, *best]
        log.info("train and test it: mambaseg train %s", shlex.join(command))


def _scored(task: TaskFunction) -> TaskFunction:
    """The same task, which fails where it has no score: the sampler could learn nothing of it."""

    def job(cfg: DictConfig) -> Any:
        from mambaseg.app.entry import explained_errors

        score = task(cfg)
        with explained_errors():
            if score is None or math.isnan(score):
                raise UserError(
                    f"{OmegaConf.select(cfg, 'callbacks.checkpoint.monitor')}: no validation gave "
                    "a number, so the trial has no score. Search a narrower range "
                    "(hydra.sweeper.params), choose another callbacks.checkpoint.monitor, or let "
                    "a share of the trials fail with hydra.sweeper.max_failure_rate=0.5"
                )
        return score

    return job
