"""The composed configuration against the schema: no key that nobody reads, no value that cannot be.

Two steps, so that most mistakes are answered at once: keys and values by the table, which imports
nothing; then what stands beside a `_target_`, by the signature of the target.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mambaseg.app.kinds import shown
from mambaseg.app.schema import NAMED, READ, TABLE, WRITTEN
from mambaseg.app.targets import check_target, did_you_mean
from mambaseg.errors import UserError

CONF = Path(__file__).resolve().parents[3] / "conf"
_OURS = re.compile(r"\$\{(?!oc\.)\w+:")  # our own resolvers need no look, and may read files
_MISSING = "???"


def checked(cfg: DictConfig, script: str, words: Sequence[str] = ()) -> DictConfig:
    """The configuration with its values as the schema takes them; `cfg` itself is not changed.

    This is the first step. The second, `check_targets`, is up to the caller.

    Args:
        cfg: the composed configuration.
        script: whose it is: the name of its primary configuration, `conf/<script>.yaml`.
        words: the overrides that were typed.

    Raises:
        UserError: an unknown key, a value of another kind, something missing.
    """
    raw = plain_tree(cfg)
    raw.pop("hydra", None)
    own, groups = keys_of(script)
    _require_known(raw, own, groups)
    _require_present(raw, own, groups)
    cfg = OmegaConf.create({**{name: {} for name in NAMED if name in groups}, **raw})
    for key, value, _ in flat(raw):
        if key in TABLE:
            _take(cfg, key, value, required=own.get(key) == _MISSING or key == "data.root")
    if script != "evaluate":  # whose data may be the run's
        require_named_data(cfg, words, as_configured=True)
    _require_apart(cfg)
    return cfg


def check_targets(cfg: DictConfig) -> None:
    """Compares what stands beside each `_target_` with what it takes; imports the targets.

    Raises:
        UserError: a target is not there, or takes no such argument or value.
    """
    for key, node, _ in flat(plain_tree(cfg)):
        if isinstance(node, dict) and "_target_" in node:
            values = {name: _resolved(cfg, f"{key}.{name}", node[name]) for name in node}
            check_target(key, node, values)


# ---- which keys there are -----------------------------------------------------------------------


def keys_of(script: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of `conf/<script>.yaml` with their values, and its groups with their choices."""
    file = plain_tree(OmegaConf.load(CONF / f"{script}.yaml"))
    own: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for entry in file.pop("defaults"):
        if isinstance(entry, dict):
            for words, option in entry.items():
                name = words.removeprefix("override ")
                if name in groups or (name == words and " " not in words):
                    groups[name] = option
        elif entry != "_self_":
            inherited = keys_of(entry)
            own, groups = own | inherited[0], groups | inherited[1]
    file.pop("hydra", None)
    if "data" in groups:
        groups["augmentation"] = None  # which the configs of conf/data name
    return own | {key: value for key, value, _ in flat(file)}, groups


def flat(
    node: Mapping[Any, Any], above: str = "", target: str | None = None
) -> Iterator[tuple[str, Any, str | None]]:
    """(key, value, key of the nearest `_target_` around it) of all mappings and values."""
    inner = above.removesuffix(".") if "_target_" in node else target
    for name, value in node.items():
        key = f"{above}{name}"
        yield key, value, inner
        items = enumerate(value) if isinstance(value, list) else ()
        below = {key: value, **{f"{key}[{place}]": item for place, item in items}}
        for place, item in below.items():
            if isinstance(item, dict):
                yield from flat(item, f"{place}.", inner)


def _require_known(raw: Mapping[str, Any], own: Mapping[str, Any], groups: Any) -> None:
    known = set(own) | set(groups)
    for key, value, target in flat(raw):
        root, _, below = key.partition(".")
        grouped = root in groups and below != ""
        if grouped and root in NAMED and "." not in below:
            _require_target(key, value, or_null=True)
        elif not (key in known or target is not None or (grouped and key in TABLE)):
            there = known | {other for other, _, around in flat(raw) if around or other in TABLE}
            raise UserError(f"there is no {key}{did_you_mean(key, there - {key})}")
        elif grouped and key in ("optim.optimizer", "optim.scheduler"):
            _require_target(key, value, or_null=key == "optim.scheduler")
        elif key in groups and key not in (*NAMED, "optim"):
            _require_target(key, value, or_null=groups[key] is None)


def _require_target(key: str, value: Any, *, or_null: bool = False) -> None:
    if value is None and or_null:
        return
    if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
        what = f"{key}={shown(value)}" if not isinstance(value, dict) else key
        null = ", or null" if or_null else f", such as the configs of conf/{key.split('.')[0]} give"
        raise UserError(f"{what}: must be a mapping with a _target_, what it is made by{null}")


def _require_present(raw: Mapping[str, Any], own: Mapping[str, Any], groups: Any) -> None:
    there = {key for key, _, _ in flat(raw)}
    for key in own:
        if key not in there:
            raise UserError(f"{key} was removed, but is needed: give it a value")
    for group, choice in groups.items():
        if choice is not None and group not in NAMED and not raw.get(group):
            raise UserError(f"{group}: nothing is chosen; see the configs in conf/{group}")


# ---- their values -------------------------------------------------------------------------------


def _take(cfg: DictConfig, key: str, given: Any, *, required: bool) -> None:
    kind, value = TABLE[key], _resolved(cfg, key, given)
    if required and value in (_MISSING, None):
        raise UserError(f"{key} is missing: say {key}=<{kind.words.removesuffix(', or null')}>")
    if value == _MISSING or (isinstance(value, str) and "${" in value):
        return
    try:
        taken = kind.take(value)
    except ValueError:
        raise UserError(f"{key}={shown(value)}: must be {kind.words}{_hint(value)}") from None
    if value is given and (type(taken), taken) != (type(value), value):
        OmegaConf.update(cfg, key, taken, merge=False)


def _hint(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, str) and value.lstrip("+-").replace(".", "", 1).isdigit():
        return f"; {value!r} is text"
    return ""


def _resolved(cfg: DictConfig, key: str, given: Any) -> Any:
    """A value as it will be; as it is written where one of our own resolvers gives it."""
    if not isinstance(given, str) or "${" not in given or _OURS.search(given):
        return given
    try:
        value = OmegaConf.select(cfg, key)
    except OmegaConfBaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):  # of one of our own resolvers
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"{key}={given}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def plain_tree(cfg: Any) -> dict[str, Any]:
    """A configuration as dicts, lists and values, its interpolations as they are written."""
    return OmegaConf.to_container(cfg, resolve=False)  # type: ignore[return-value]


# ---- folders ------------------------------------------------------------------------------------


def require_named_data(
    cfg: DictConfig, words: Sequence[str], *, as_configured: bool = False
) -> None:
    """Computed data are written to another folder only where they were asked for by name.

    Args:
        cfg: the configuration.
        words: the overrides that were typed.
        as_configured: whether the root must otherwise be what the config of conf/data says; it is
            enough that it was not typed where not.

    Raises:
        UserError: nobody said data=<what is computed>.
    """
    given = {word.lstrip("+~").partition("=")[0] for word in words}
    if OmegaConf.select(cfg, "data.prepare") is None or "data" in given:
        return
    leaf = CONF / "data" / f"{cfg.data.get('name')}.yaml"
    usual = plain_tree(OmegaConf.load(leaf)).get("root") if leaf.is_file() else None
    moved = as_configured and usual not in (None, cfg.data.root)
    if moved or "data.root" in given:
        raise UserError(
            f"data.root={cfg.data.root}: say what data these are, with data=acdc, data=folder, "
            "data=nnunet or another config of conf/data. Nothing was read or written: without "
            f"data= this run has {cfg.data.get('title')}, which is computed."
        )


def _require_apart(cfg: DictConfig) -> None:
    """Nothing is written into a folder that was named for reading."""
    computed = cfg.get("data") and cfg.data.get("prepare") is not None
    for read in READ:
        source = _folder(cfg, read)
        if source is None or (computed and read == "data.root"):
            continue
        for written in WRITTEN:
            place = _folder(cfg, written)
            if place is not None and source in (place, *place.parents):
                raise UserError(
                    f"{written}={OmegaConf.select(cfg, written)} lies in {read}="
                    f"{OmegaConf.select(cfg, read)}, where nothing is written: "
                    f"choose another folder with {written}=..."
                )


def _folder(cfg: DictConfig, key: str) -> Path | None:
    place = OmegaConf.select(cfg, key)
    return Path(place).expanduser().resolve() if isinstance(place, str) else None
