"""What a plan is made of, read once: shapes, voxel sizes and grey values of the foreground.

It is kept in the folder of the caches, in a file named after the content of the cases' files and
how they are read.
"""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.cache import once_more
from mambaseg.data.case import Case
from mambaseg.data.classes import IGNORED
from mambaseg.data.fingerprint import THREADS, name_as_read, sealed, source_digests, unsealed
from mambaseg.data.intensity import CtValues
from mambaseg.data.seen import fingerprints_of
from mambaseg.data.validation import collected_warnings
from mambaseg.data.volume import Volume
from mambaseg.storage.files import write_whole

FORMAT = 2
QUANTILES = np.linspace(0, 100, 1001)  # per cent
CLIPPED = (0.5, 99.5)  # per cent of the foreground, of all cases together
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Greys:
    """Grey values of the foreground of a case, in one channel."""

    quantiles: tuple[float, ...]
    mean: float
    square: float  # mean of the squares


@dataclass(frozen=True)
class Surveyed:
    """What is kept of a case."""

    case: str
    source: str  # content hash of its files
    content: str  # what its image shows, see `seen.fingerprints_of`
    shape: tuple[int, int, int]  # (Z, H, W)
    spacing: tuple[float, float, float] | None  # mm (z, y, x)
    greys: tuple[Greys, ...] = ()  # of each channel; none without foreground, or unless asked for


def open_survey(
    cases: Sequence[Case], *, cache_dir: Path, num_classes: int, channels: int, greys: bool
) -> tuple[Surveyed, ...]:
    """Read the survey of these cases, made if there is none; with `greys` their grey values too.

    `UserError` where a case cannot be used or the file cannot be written.
    """
    digests = source_digests(cases)
    name = name_as_read(cases, digests, num_classes, channels, greys, FORMAT)
    path = Path(cache_dir) / f"survey-{name}.json"
    if (kept := _kept(path, digests)) is not None:
        return kept

    def look(case: Case) -> Surveyed:
        with collected_warnings():  # which the cache repeats
            volume = case.read(num_classes, channels)
        depth, _, height, width = volume.image.shape
        return Surveyed(
            case.id,
            digests[case.id],
            fingerprints_of(volume),
            (depth, height, width),
            volume.spacing,
            _greys(volume) if greys else (),
        )

    log.info("looking at %d cases once, for the plan", len(cases))
    with ThreadPoolExecutor(THREADS) as pool:
        entries = tuple(pool.map(partial(once_more, look), cases))
    content = sealed([asdict(one) for one in entries])
    write_whole(path, content, otherwise="choose another folder with data.cache_dir=...")
    return entries


def foreground_of(cases: Sequence[Surveyed], channel: int) -> CtValues | None:
    """Clipping points, mean and standard deviation of the foreground, all cases counting alike.

    None where no case has any. Source: nnU-Net v2, `DatasetFingerprintExtractor`, which draws as
    many voxels of each case; here a thousand quantiles stand for them.
    """
    known = [one.greys[channel] for one in cases if one.greys]
    if not known:
        return None
    low, high = np.percentile(np.concatenate([one.quantiles for one in known]), CLIPPED)
    mean = float(np.mean([one.mean for one in known]))
    spread = math.sqrt(max(float(np.mean([one.square for one in known])) - mean**2, 0.0))
    return [round(float(one), 6) for one in (low, high, mean, spread)]


def _greys(volume: Volume) -> tuple[Greys, ...]:
    assert volume.label is not None  # read() with a number of classes demands it
    inside = (volume.label > 0) & (volume.label != IGNORED)
    if not inside.any():
        return ()
    greys = []
    for channel in volume.image.swapaxes(0, 1):
        values = channel[inside].astype(np.float64)
        quantiles = tuple(np.percentile(values, QUANTILES).tolist())
        greys.append(Greys(quantiles, float(values.mean()), float((values**2).mean())))
    return tuple(greys)


def _kept(path: Path, digests: dict[str, str]) -> tuple[Surveyed, ...] | None:
    """What a file holds; None where there is none, or a damaged one."""
    try:
        entries = tuple(map(_entry, unsealed(path)))
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever foreign text makes of it
        log.warning("%s is damaged (%s): looking at the cases again", path, error)
        return None
    return entries if {one.case: one.source for one in entries} == digests else None


def _entry(plain: dict[str, Any]) -> Surveyed:
    greys = [Greys(tuple(one["quantiles"]), one["mean"], one["square"]) for one in plain["greys"]]
    spacing = None if plain["spacing"] is None else tuple(plain["spacing"])
    known: Any = {"shape": tuple(plain["shape"]), "spacing": spacing, "greys": tuple(greys)}
    return Surveyed(**{**plain, **known})
