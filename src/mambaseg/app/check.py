"""The composed configuration against the schema: no key that nobody reads, no impossible value.

The first step (`checked`) imports nothing, so that it answers most mistakes at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mambaseg.app.schema import NAMED, READ, TABLE, WRITTEN, did_you_mean, shown, take, words
from mambaseg.app.targets import check_target, import_target
from mambaseg.data.phantoms.synthetic import NOTE
from mambaseg.errors import UserError
from mambaseg.storage.files import conf_folder

CONF = conf_folder()
_OURS = re.compile(r"\$\{(?!oc\.)\w+:")  # our own resolvers need no look, and may read files
_LIMITS = re.compile(r"\blimit_(test|train)_batches\b")
_MISSING = "???"
LONGEST = 200  # bytes of a folder's name; most file systems take 255


def checked(cfg: DictConfig, script: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The first step: `cfg` of conf/<script>.yaml with its values as the schema takes them."""
    raw = plain_tree(cfg)
    raw.pop("hydra", None)
    if place := raw.get("run_dir"):
        raise UserError(f"run_dir={place}: a run names its folder itself; set outputs and name")
    own, groups = keys_of(script)
    single = {group for group in groups if group in raw and group not in NAMED}
    _require_words(overrides, script, groups, single)
    _require_global(raw, overrides)
    _require_keys(raw, own, groups)
    _require_kept(overrides)
    _require_loss(raw)
    _require_cross_entropy(raw)
    cfg = OmegaConf.create({**{name: {} for name in NAMED if name in groups}, **raw})
    for key, value, _ in flat(raw):
        if key in TABLE:
            _take(cfg, key, value, required=own.get(key) == _MISSING or key == "data.root")
    place = Path(str(cfg.get("name", "")))
    if place.is_absolute() or ".." in place.parts:
        raise UserError(f"name={place}: a folder below outputs; set outputs for another place")
    if any(len(os.fsencode(part)) > LONGEST for part in place.parts):
        raise UserError(f"name={place}: too long for a folder; {LONGEST} bytes at most")
    if script != "evaluate":  # whose data may be the run's
        require_named_data(cfg, overrides, as_configured=True)
        _require_split(raw, overrides)
    _require_apart(cfg)
    return cfg


def _require_split(raw: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuses what only some splits read: elsewhere it would make another run of the same data."""
    split = str((raw.get("data") or {}).get("split") or "")
    if not split or "$" in split:  # which follows from the data
        return
    typed = {word.lstrip("+").partition("=")[0] for word in overrides}
    of_splits = {"data.folds": ("kfold",), "data.split_seed": ("random", "kfold", "auto")}
    for key, splits in of_splits.items():
        if key in typed and split not in splits:
            names = " or ".join(splits)
            raise UserError(f"{key}: it is for data.split={names}, and the split is {split}")


def check_targets(cfg: DictConfig) -> None:
    """The second step: compares the keys beside each `_target_` with what it takes."""
    for key, node, _ in flat(plain_tree(cfg)):
        if isinstance(node, dict) and "_target_" in node:
            values = {name: _resolved(cfg, f"{key}.{name}", node[name]) for name in node}
            check_target(key, node, values)


def check_imports(key: str, node: Mapping[str, Any]) -> None:
    """Imports each `_target_` of a configuration that was not composed by a command."""
    for place, target, _ in flat({key: dict(node)}):
        if place.endswith("._target_"):
            import_target(place.removesuffix("._target_"), target)


# ---- keys ---------------------------------------------------------------------------------------


def plain_tree(cfg: Any) -> dict[str, Any]:
    """A configuration as dicts, lists and values, its interpolations as they are written."""
    return OmegaConf.to_container(cfg, resolve=False)  # type: ignore[return-value]


def keys_of(script: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of `conf/<script>.yaml` with their values, and its groups with their choices."""
    file = plain_tree(OmegaConf.load(CONF / f"{script}.yaml"))
    own: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for entry in file.pop("defaults", []):
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
        for place, item in ((key, value), *((f"{key}[{number}]", one) for number, one in items)):
            if isinstance(item, dict):
                yield from flat(item, f"{place}.", inner)


def no_choice(word: str, script: str) -> str:
    """What to say about a config of a group that a script does not have."""
    group = word.lstrip("+").partition("=")[0]
    images = "; the checkpoint says how images are prepared" * (group == "data")
    return f"{word}: mambaseg {script} has no {group} to choose{images}"


def _require_words(
    overrides: Sequence[str], script: str, groups: Collection[str], single: Collection[str]
) -> None:
    """Refuses scores of a part under the name of all, and what no config can be chosen for.

    Of two configs of a `single` group Hydra would make a third; experiments, which only change
    values, may be several.
    """
    for word in overrides:
        group, _, value = word.lstrip("+").partition("=")
        named = "/" not in group and "{" not in value
        if named and group not in groups and (CONF / group).is_dir():
            raise UserError(no_choice(word, script))
        limits = group.partition(".")[0] == "trainer" and _LIMITS.search(word)
        if limits or (script == "evaluate" and group == "debug" and value != "null"):
            shorter = "For a short look choose debug=fast; data.steps sets how long a training is"
            raise UserError(
                f"{word}: scores of a few cases would bear the name of all"
                + f". {shorter}" * (script == "config")
            )
        if value.startswith("[") and group in single:
            raise UserError(
                f"{word}: one config of conf/{group} is chosen. To compare several, sweep over "
                f"them: -m {group}={value.strip('[]')}"
            )


def _require_keys(raw: Mapping[str, Any], own: Mapping[str, Any], groups: Any) -> None:
    """Refuses keys that nobody reads, and asks for those that somebody needs."""
    there = list(flat(raw))
    known = set(own) | set(groups)
    for key, value, target in there:
        root, _, below = key.partition(".")
        named = root in groups and root in NAMED and below != "" and "." not in below
        read = key in known or target is not None or (root in groups and key in TABLE)
        if not (named or read):
            others = known | {other for other, _, around in there if around or other in TABLE}
            raise UserError(f"there is no {key}{did_you_mean(key, others - {key})}")
        if named or key in ("optim.optimizer", "optim.scheduler", "data.find_cases"):
            _require_target(key, value, or_null=named or key == "optim.scheduler")
        elif key in groups and key not in (*NAMED, "optim"):
            _require_target(key, value, or_null=groups[key] is None)
    for group, name in (("model", "name"), ("data", "name"), ("data", "title")):
        if group in groups and raw.get(group) and raw[group].get(name) is None:
            raise UserError(f"{group}.{name} is missing: the config of conf/{group} has to say it, "
                            f"in a line {name}: <text>")  # fmt: skip
    if missing := [key for key in own if key not in {key for key, _, _ in there}]:
        raise UserError(f"{missing[0]} was removed, but is needed: give it a value")
    for group, choice in groups.items():
        if choice is not None and group not in NAMED and not raw.get(group):
            raise UserError(f"{group}: nothing is chosen; see the configs in conf/{group}")


def _require_global(raw: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuses a config of differences whose values Hydra has put below the name of its group."""
    for group in ("experiment", "debug", "hparams_search", "local"):
        if isinstance(raw.get(group), dict) and raw[group]:
            words = [word for word in overrides if word.lstrip("+").startswith(f"{group}=")]
            raise UserError(
                f"{' '.join(words) or group}: the first line of this config in conf/{group} must "
                "be  # @package _global_"
            )


def _require_loss(raw: Mapping[str, Any]) -> None:
    """Refuses a loss of which no part counts; the training would end without having learnt."""
    loss = raw.get("loss") or {}
    weights = [key for key in ("ce_weight", "dice_weight", "weight") if key in loss]
    if len(weights) > 1 and not any(loss[key] for key in weights):
        words = " ".join(f"loss.{key}=0" for key in weights)
        raise UserError(f"{words}: nothing would be learnt; one must be above 0")


def _require_cross_entropy(raw: Mapping[str, Any]) -> None:
    """Refuses another loss for the method that is named after it."""
    loss = raw.get("loss") or {}
    if str(loss.get("_target_")).endswith(".DeepSupervision"):
        loss = loss.get("loss") or {}
    kind = str(loss.get("_target_")).rpartition(".")[2]
    alone = kind == "CrossEntropyLoss" or (kind == "DiceCE" and loss.get("dice_weight") == 0)
    if (raw.get("method") or {}).get("name") == "partial_ce" and not alone:
        raise UserError(
            "method=partial_ce learns by cross entropy alone: add loss=partial_ce, or choose "
            "method=supervised for another loss"
        )


def _require_kept(overrides: Sequence[str]) -> None:
    """Refuses to do without a value that the code reads, in whatever config it stands."""
    for word in overrides:
        if word.startswith("~") and (key := word[1:].partition("=")[0]) in TABLE:
            raise UserError(f"{key} was removed, but is needed: give it a value")


def _require_target(key: str, value: Any, *, or_null: bool) -> None:
    if value is None and or_null:
        return
    if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
        what = f"{key}={shown(value)}" if not isinstance(value, dict) else key
        null = ", or null" if or_null else f", such as the configs of conf/{key.split('.')[0]} give"
        raise UserError(f"{what}: must be a mapping with a _target_, what it is made by{null}")


# ---- values -------------------------------------------------------------------------------------


def _take(cfg: DictConfig, key: str, given: Any, *, required: bool) -> None:
    value = _resolved(cfg, key, given)
    if required and value in (_MISSING, None):
        expected = words(TABLE[key]).removesuffix(", or null")
        raise UserError(f"{key} is missing: say {key}=<{expected}>")
    if value == _MISSING or (isinstance(value, str) and "${" in value):
        return
    taken = take(key, value)
    if (type(taken), taken) != (type(value), value):
        OmegaConf.update(cfg, key, taken, merge=False)


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


# ---- folders ------------------------------------------------------------------------------------


def require_named_data(
    cfg: DictConfig, overrides: Sequence[str], *, as_configured: bool = False
) -> None:
    """Refuses to write computed data to another folder unless the command names them.

    With `as_configured` the root must be that of conf/data also where no override sets it.
    """
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    if OmegaConf.select(cfg, "data.prepare") is None or "data" in given:
        return
    file = CONF / "data" / f"{cfg.data.get('name')}.yaml"
    usual = plain_tree(OmegaConf.load(file)).get("root") if file.is_file() else None
    moved = as_configured and usual not in (None, cfg.data.root)
    if moved or "data.root" in given:
        raise UserError(
            f"data.root={cfg.data.root}: this run would compute {cfg.data.get('title')} there. "
            "To train on the files in it, name the data set: data=acdc, folder, nnunet or another "
            "config of conf/data. Nothing was read or written."
        )


def require_acquired(data: DictConfig) -> None:
    """Refuses computed data under the name of acquired ones."""
    if not data.get("synthetic") and (note := Path(data.root).expanduser() / NOTE).is_file():
        raise UserError(
            f"data={data.name}: mambaseg computed what is in {data.root} ({note} says so), and the "
            f"tables of this run would call it {data.title}. Name it: data=phantom or "
            f"data=haze_phantom, with data.root={data.root}"
        )


def _require_apart(cfg: DictConfig) -> None:
    """Refuses to write into a folder that is read."""

    def folder(key: str) -> Path | None:
        place = OmegaConf.select(cfg, key)
        return Path(place).expanduser().resolve() if isinstance(place, str) else None

    computed = OmegaConf.select(cfg, "data.prepare") is not None
    for read in READ[computed:]:  # computed data are written to data.root, the first
        for written in WRITTEN:
            source, place = folder(read), folder(written)
            if source and place and source in (place, *place.parents):
                raise UserError(
                    f"{written}={OmegaConf.select(cfg, written)} lies in {read}="
                    f"{OmegaConf.select(cfg, read)}, where nothing is written: "
                    f"choose another folder with {written}=..."
                )
