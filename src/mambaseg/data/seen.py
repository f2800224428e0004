"""Which images a network has seen, by what they show: no names, no paths.

A checkpoint records who trained, validated and tested its network. Patients' names
do not belong there, and hashes of them neither: whoever guesses a name could confirm it. So each
image is known by a fingerprint of its voxels, which tells nothing to somebody who does not have
the image. Patients come in again where the data are at hand: of a patient one of whose images is
known, all images are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.splits import listed
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError

_LEVELS = 1 << 16  # distinct values of an image whose values may be rescaled
_REPEATED = 8  # voxels with a value of another one: with fewer, how often values occur says nothing
_LISTED = 50  # cases that a message names
_LISTS = ("train", "val", "test", "earlier")
_LONGEST = 10_000_000  # fingerprints that a checkpoint may list

TRAINED, VALIDATED, EARLIER = "trained", "validated", "earlier"
PUBLISHED = "as published"
_WORDS = {
    TRAINED: "trained it",
    VALIDATED: "chose its checkpoint",
    EARLIER: "trained or validated a network that it was made from",
}


def fingerprint_of(image: NDArray[Any]) -> str:
    """A fingerprint of an image (Z, C, H, W): 24 hex digits, or none where it shows nothing.

    It is the same however the image is stored: flipped, with its axes or channels in another
    order, its values as integers or floats, rescaled or inverted (of images with at most 65,536
    distinct values), grey or as equal colours. Cropped, resampled or lossily compressed images are
    others.
    """
    channels = {_of_volume(image[:, channel]) for channel in range(image.shape[1])} - {b""}
    digest = hashlib.blake2b(b"".join(sorted(channels)), digest_size=12)
    return digest.hexdigest() if channels else ""


def fingerprints_of(volume: Volume) -> str:
    """The fingerprints of its frames that show something, joined by blanks."""
    return " ".join(filter(None, map(fingerprint_of, np.split(volume.image, volume.frames))))


def _of_volume(volume: NDArray[Any]) -> bytes:
    """A digest of a volume (Z, H, W) in no particular orientation; empty where it is constant."""
    volume = np.asarray(volume, np.float32)
    ordered = np.sort(volume, axis=None)
    starts = np.flatnonzero(np.diff(ordered, prepend=np.nan) != 0)
    if len(starts) < 2:
        return b""
    digest = hashlib.blake2b(digest_size=16)
    if len(starts) <= _LEVELS:  # how often each value occurs, from either end
        counts = np.diff(starts, append=ordered.size)
        digest.update(min(counts.tobytes(), counts[::-1].tobytes()))
    else:
        digest.update((ordered + 0).tobytes())  # there is no -0
    profiles, mid = [], np.median(ordered)
    for axis, length in enumerate(volume.shape):  # how often neighbouring planes differ
        planes = np.moveaxis(volume, axis, 0)
        kept = [np.count_nonzero(planes[1:] != planes[:-1], axis=(1, 2))]
        if volume.size - _REPEATED < len(starts) <= _LEVELS:  # how planes lie about the median
            sides = (np.count_nonzero(half, axis=(1, 2)) for half in (planes > mid, planes < mid))
            kept.append(np.abs(np.subtract(*sides)))
        prints = (min(profile.tobytes(), profile[::-1].tobytes()) for profile in kept)
        profiles.append((length, b"".join(prints)))
    for length, content in sorted(profiles):
        digest.update(length.to_bytes(8, "little") + content)
    return digest.digest()


class Known(NamedTuple):
    """A case at hand, with the fingerprints by which it is recognised."""

    id: str
    patient: str
    prints: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """The fingerprints of those that a network has met."""

    train: frozenset[str]  # its weights were fitted to them
    val: frozenset[str] = frozenset()  # its checkpoint was chosen by them
    test: frozenset[str] = frozenset()  # it was scored on them when its training ended
    earlier: frozenset[str] = frozenset()  # networks before it were trained or validated on them
    complete: bool = True  # whether all those networks record it

    @classmethod
    def of(
        cls, cases: Mapping[str, Sequence[Known]], parent: Seen | None, *, same_split: bool
    ) -> Seen:
        """Of the parts of a training, given their cases and what the network starts from.

        `same_split`: whether `parent` was trained with the same split, see `among`.
        """
        parts: dict[str, Any] = {
            part: frozenset(one for case in known for one in case.prints if one)
            for part, known in cases.items()
        }
        if parent is None:
            return cls(**parts)
        told = parent.test if same_split else frozenset()
        earlier = parent.earlier | (parent.train | parent.val) - told
        return cls(**parts, earlier=earlier, complete=parent.complete)

    @classmethod
    def unknown(cls) -> Seen:
        """Of a network that does not say it."""
        return cls(frozenset(), complete=False)

    @classmethod
    def restored(cls, plain: Any) -> Seen:
        """From what `plain` gives a checkpoint; `unknown` for nothing, else `ValueError`."""
        if plain is None:
            return cls.unknown()
        if not isinstance(plain, dict) or type(plain.get("complete")) is not bool:
            raise ValueError("not the lists of a network")
        lists: dict[str, Any] = {name: plain.get(name) for name in _LISTS}
        for prints in lists.values():
            bounded = isinstance(prints, list) and len(prints) <= _LONGEST
            if not (bounded and all(isinstance(one, str) and len(one) <= 64 for one in prints)):
                raise ValueError("not a list of fingerprints")
        return cls(**{k: frozenset(v) for k, v in lists.items()}, complete=plain["complete"])

    def plain(self) -> dict[str, Any]:
        """As plain data, sorted so that the order reveals nothing."""
        lists = {name: sorted(getattr(self, name)) for name in _LISTS}
        return {**lists, "complete": self.complete}

    def among(self, cases: Iterable[Known], *, own_split: bool = False) -> dict[str, str]:
        """Which of these cases the network has learnt from, and how: id -> a key of `_WORDS`.

        `own_split`: whether they are the test set of the network's own split; then the split's note
        tells what its publication both tests on and validates by.
        """
        known = self.test if own_split else frozenset()
        sources = {TRAINED: self.train - known, VALIDATED: self.val - known, EARLIER: self.earlier}
        cases = list(cases)
        patients: dict[str, str] = {}
        for how, prints in reversed(sources.items()):  # the gravest last
            patients |= {case.patient: how for case in cases if prints.intersection(case.prints)}
        return {case.id: patients[case.patient] for case in cases if case.patient in patients}


def how_seen(prints: Sequence[str], networks: Sequence[Seen]) -> str | None:
    """How any of several networks has learnt from an image; None: none has.

    An image that a network's own published split validates by and tests on is `PUBLISHED`.
    """
    image = [Known("", "", tuple(filter(None, prints)))]
    found = {how for seen in networks for how in seen.among(image, own_split=True).values()}
    if not found and any(seen.among(image) for seen in networks):
        return PUBLISHED
    return next((how for how in _WORDS if how in found), None)


def require_unseen(found: Mapping[str, str], total: int, *, allowed: bool, subject: str) -> None:
    """Raise `UserError` for cases that a network (`subject`) has learnt from, unless it is allowed.

    `found` is that of `Seen.among`, `total` the number of cases to be scored.
    """
    if allowed or not found:
        return
    parts = []
    for how, words in _WORDS.items():
        if cases := [case for case, its in found.items() if its == how]:
            parts.append(f"{len(cases)} {words} ({listed(cases, limit=_LISTED)})")
    raise UserError(
        f"{subject} has seen {len(found)} of the {total} cases to be scored, by their images or by "
        f"other images of the same patients: {'; '.join(parts)}. Their scores would be too good. "
        "Score other cases (run=<its run folder> alone takes its own test set), or set "
        "evaluation.allow_seen=true, which marks the scores in metrics.json, tables and page."
    )
