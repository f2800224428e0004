"""The overrides of a command line: as Hydra takes them, and what to say where it cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mambaseg.app.check import CONF, check_targets, checked, no_choice
from mambaseg.app.own import found_config
from mambaseg.app.schema import NAMED, TABLE, did_you_mean, is_text, takes_list
from mambaseg.app.targets import MOVED
from mambaseg.errors import UserError

_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.+)'")
_UNREAD = re.compile(r"Could not override '(\w+)'")
_ESCAPED = re.compile(r"\$\\\{[^']*\\\}")  # how Hydra's sweeper writes ${...}
_ITEM = re.compile(r"""\s*(?:'[^']*'|"[^"]*")\s*|[^,]+""")  # of a list: in quotes, or to a comma


def arranged(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of a command line and its overrides, in whatever order they were typed.

    Text is quoted that Hydra would take for something else: `name=2024` is no number, and a path
    may hold `=`, a comma or an umlaut. An override of an earlier version is a UserError, and an
    option that there is not.
    """
    parser = get_args_parser()
    known = [option for action in parser._actions for option in action.option_strings]
    for word in typed:
        name = word.partition("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            raise UserError(
                f"{name} is no option (--help lists them). Values are set without dashes and with "
                f"=, such as {name.lstrip('-')}={word.partition('=')[2] or '...'}"
            )
    read = parser.parse_intermixed_args(list(typed))
    options = list(typed)
    for override in read.overrides:
        options.remove(override)
        for old in (override, key_of(override)):
            if old in MOVED:
                raise UserError(f"{old} is {MOVED[old]} now (docs/upgrading.md)")
    return options, [_as_text(word, sweep=read.multirun) for word in read.overrides]


def key_of(word: str) -> str:
    """The key that an override sets: `data.root` of `+data.root=x`."""
    return word.partition("=")[0].lstrip("+~")


def typed(words: Any) -> list[str]:
    """Overrides as Hydra keeps them, in the words that were typed: no `${...}` is looked up."""
    raw: Any = words
    if OmegaConf.is_config(words):
        raw = OmegaConf.to_container(words, resolve=False)
    return [_ESCAPED.sub(lambda found: found[0].replace("\\", ""), word) for word in raw]


def given_overrides() -> list[str]:
    """The overrides of the present job in the words that were typed; none outside of a command."""
    return typed(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _as_text(word: str, *, sweep: bool) -> str:
    name, equals, value = word.partition("=")
    kind = TABLE.get(key_of(word))
    if not equals or kind is None or not is_text(kind):
        return word
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        if value.startswith("[") and value.endswith("]"):
            items = [item.strip() for item in _ITEM.findall(value[1:-1])]
            return f"{name}=[{','.join(_quoted(item) for item in items if item)}]"
        return f"{name}={_quoted(value)}"
    if override.is_sweep_override():
        return word if sweep else f"{name}={_quoted(value)}"
    number = isinstance(override.value(), bool | int | float)
    return f"{name}={_quoted(value)}" if number else word


def _quoted(value: str) -> str:
    if value[:1] in "'\"" and value[:1] == value[-1:] and len(value) > 1:
        return value
    return str(QuotedString(text=value, quote=Quote.single).with_quotes())


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them; it looks up what a `glob(...)` means."""
    hydra = GlobalHydra.instance()
    loader = hydra.config_loader() if hydra.is_initialized() else None
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def jobs_of(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Jobs that show each value of a sweep once, where the product of them may be thousands."""
    fixed: list[str] = []
    swept: list[list[str]] = []
    for override in parsed(overrides):
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
        elif override.is_discrete_sweep():  # not the interval of a search
            key = override.get_key_element()
            swept.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            if not swept[-1]:
                raise UserError(f"{override.input_line}: holds no value, or fits no config")
    first = [values[0] for values in swept]
    yield [*fixed, *first]
    for place, values in enumerate(swept):
        for value in values[1:]:
            yield [*fixed, *first[:place], value, *first[place + 1 :]]


# ---- what Hydra cannot compose ------------------------------------------------------------------


def composition_error(error: BaseException, script: str, overrides: Sequence[str]) -> str | None:
    """What to say about an error of Hydra's before a job has begun; None: as Hydra says it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, YAMLError):
        return yaml_problem(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as key=value. Quote a value that holds spaces, "
            "commas, brackets or '=':  'key=\"a value\"'"
        )
    if ambiguous := _AMBIGUOUS.search(str(error)):
        key = key_of(word := ambiguous[1])
        several = f"; to take them together, write {key}=[{word.partition('=')[2]}]"
        return f"{word}: several values. To sweep over them, add -m" + several * (
            key in NAMED or takes_list(TABLE.get(key, ()))
        )
    given = {key_of(word): word for word in overrides}
    unnamed = str(getattr(error, "missing_cfg_file", "")).endswith("/None")
    unnamed = unnamed or isinstance(error, AssertionError)  # of Hydra, about `model: null`
    if unnamed and script == "evaluate" and "experiment" in given:
        return (
            f"{given['experiment']}: it depends on the network, which evaluate learns from the "
            "checkpoint. Name data=... instead, or add model=<network>"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_config(error.missing_cfg_file, error.options or (), overrides)
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        none = [word for word in overrides if word.endswith("=null")]
        return f"{' '.join(none)}: one config must be chosen, such as model=unet; null is none"
    if "Could not override 'augmentation'" in str(error) and script in ("config", "evaluate"):
        return "augmentation: these data draw their own crops, and take no operations"
    unread = _UNREAD.search(str(error))
    if unread and (CONF / unread[1]).is_dir():
        return no_choice(given.get(unread[1], unread[1]), script)
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key or "")
        if "not in struct" in str(cause):
            return _unknown_key(key, script, overrides)
        return f"{key}: {str(cause).splitlines()[0]}"
    return None


def _unknown_key(key: str, script: str, overrides: Sequence[str]) -> str:
    """What the schema says of a key that no file holds; what it takes can be added."""
    root, _, below = key.partition(".")
    if root in NAMED and "." not in below:
        return f"there is no {key}; a new one begins with its class: +{key}._target_=..."
    keys = {word for word in overrides if key_of(word) == key or "." in key_of(word)}
    added = [f"++{word}" if word in keys and word[0] not in "+~" else word for word in overrides]
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    try:
        cfg = loader.load_configuration(script, next(jobs_of(added)), RunMode.RUN)
        check_targets(checked(cfg, script, overrides))
    except UserError as error:
        return str(error)
    except HydraException:
        return f"there is no {key}"
    return f"{key} has no value that could be changed: add it with +{key}=..."


def yaml_problem(error: YAMLError) -> str:
    """Where a config is no YAML, and why."""
    mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"{mark.name}, line {mark.line + 1}: " if mark else ""
    return f"{place}not valid YAML: {why or error}"


def _missing_config(path: str, options: Sequence[str], overrides: Sequence[str]) -> str:
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    options = loader.get_group_options(path.rpartition("/")[0]) or options
    for source in loader.get_sources():
        file = Path(source.path) / f"{path}.yml"
        if source.scheme() == "file" and file.is_file():
            return f"{file} is not read: rename it to {file.with_suffix('.yaml').name}"
    typed = [word for word in overrides if "/".join(word.partition("=")[::2]) == path]
    near = did_you_mean(path.rpartition("/")[2], options)
    listed = f"\nThere are: {', '.join(sorted(options))}" if options else ""
    if own := found_config(*path.rpartition("/")[::2]):
        near, listed = "", f", but {own} has one: add --config-dir={own}"
    return "".join(f"{word}: " for word in typed) + f"there is no conf/{path}.yaml{near}{listed}"
