"""Small copies of finished runs, to be kept with the code and reported on again by anybody.

A copy has what a report reads, but no image and no weights. Folders of the machine that made it are
cut to their last part, so that it tells nothing of the machine, and differs from that of the same
run elsewhere in scores and times only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mambaseg.errors import UserError
from mambaseg.reporting.reading import read_runs
from mambaseg.reporting.runs import CALIBRATIONS
from mambaseg.storage.files import write_whole
from mambaseg.storage.untrusted import read_json, read_yaml

FILES = ("config.yaml", "run.json", "cases.csv", "metrics.json", "metrics.csv")
"""What is copied of a run, beside its calibration; those of other tasks have no cases.csv."""
_ELSEWHERE = "choose another folder with --to"
_HERE = ("host", "pid", "heartbeat", "wandb_id")  # of run.json: about the machine, not the result


def pack(folder: str | Path, to: str | Path) -> Iterator[Path]:
    """Copies the small files of all finished runs of an experiment; yields the new folders.

    Args:
        folder: `outputs/<experiment>`.
        to: `docs/results/<experiment>`; runs that are there already are replaced.

    Raises:
        UserError: no finished run; `to` is `folder` or holds whole runs; in the end, what had to be
            left out.
    """
    folder, to = Path(folder), Path(to)
    if folder.resolve() == to.resolve():
        raise UserError(f"--to {to}: this is where the runs are; name another folder")
    runs, problems = read_runs(folder)
    for run in runs:
        if (place := to / run.path.name).joinpath("train.log").exists():
            raise UserError(f"--to {to}: {place.name} is a whole run there; name another folder")
    for run in runs:
        place = to / run.path.name
        for name in (*FILES, *CALIBRATIONS):
            if not (run.path / name).is_file():
                (place / name).unlink(missing_ok=True)  # of an earlier pack
                continue
            try:
                text = _copy(run.path / name)
            except (OSError, ValueError) as error:  # also of text that is not UTF-8
                problems.append(f"{run.path / name}: {error}")
                continue
            write_whole(place / name, text, otherwise=_ELSEWHERE)
        yield place
    if problems:
        left = (one.removeprefix("left out: ") for one in problems)
        raise UserError("not packed: " + "\n".join(left))


def _copy(path: Path) -> str:
    """The text of a file of a run folder as it is kept."""
    if path.name == "config.yaml":
        return yaml.safe_dump(without_folders(read_yaml(path)), sort_keys=False, allow_unicode=True)
    if path.suffix == ".json":
        content = read_json(path)
        if path.name == "run.json":
            content = {key: value for key, value in content.items() if key not in _HERE}
        return json.dumps(without_folders(content), indent=2, ensure_ascii=False) + "\n"
    return path.read_text(encoding="utf-8")


def without_folders(value: Any) -> Any:
    """Plain data with the last names of absolute paths, wherever they are in a text."""
    if isinstance(value, dict):
        return {without_folders(key): without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    several = re.match(r"[^/\\]*[\[{]", value)  # an override: [/a/b,/c/d], {a:/b,c:d}
    pattern = _FOLDERS_OF_SEVERAL if several else _FOLDERS
    return pattern.sub(lambda found: found["kept"] or "", value)


def _folders(no: str) -> re.Pattern[str]:
    """Of a text the folders of absolute paths: all but their last names; or an address, `kept`.

    Rather too much is cut than too little: folders may have spaces and any other sign but `no`.
    """
    before = r"\s=,:;|<>(\[{'\"`"  # what may stand before a path
    name = rf"(?=\s*[^\\/\s,;{no}'\"`])"  # comes next
    return re.compile(
        r"(?P<kept>https?://[^\s,'\"`\]})]*|sqlite(\+\w+)?:///)"
        rf"|((?<![^{before}])|(?<=:///))"
        # ~ before the = of an override deletes a key
        r"(~(?![\w/.@:+-]*=)[\w.-]*[\\/]+|[A-Z]:/+|[A-Za-z]:\\+|/+|\\\\(?=[^\\/]+\\))(?!\s)"
        rf"{name}([^\\/\n{no}]*[^\\/\n{no}{before}][\\/]+{name})*"
    )


_FOLDERS, _FOLDERS_OF_SEVERAL = _folders(""), _folders(r",\]}")
