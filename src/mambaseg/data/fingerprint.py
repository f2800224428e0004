"""What the source files hold, as a hash: independent of folder, names and dates."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mambaseg.data.case import Case
from mambaseg.data.formats.files import content_digest
from mambaseg.storage.untrusted import read_text

THREADS = min(8, os.cpu_count() or 1)
_SEALED_LIMIT = 256 << 20  # bytes: half a million cases


def source_digests(cases: Sequence[Any]) -> dict[str, str]:
    """Hash the content of the source files of each `Case` or `Pair`: its id -> hex digest."""
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda one: content_digest(one.sources(), f"case {one.id}"), cases)
        return {case.id: digest for case, digest in zip(cases, digests, strict=True)}


def fingerprint(digests: dict[str, str]) -> str:
    """Return one hash of the `source_digests` of cases, in any order."""
    return digest_of(sorted(digests.items()))


def name_as_read(cases: Sequence[Case], digests: dict[str, str], *how: Any) -> str:
    """Name what is made of cases: by their content, how each is read, and `how` it is made.

    Who is read how counts: an h5 file is the same whether or not its label may be read.
    """
    recipes = sorted([case.id, case.recipe] for case in cases)
    return digest_of([fingerprint(digests), recipes, *how])


def patients_with_same_images(
    cases: Sequence[Case], contents: dict[str, str]
) -> list[tuple[str, ...]]:
    """Return sorted groups of patients of whom a case, or a frame of it, shows the same.

    `contents`: case id -> what its image shows, `seen.fingerprints_of`.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        for frame in contents[case.id].split():
            owners[frame].add(case.patient)
    return sorted({tuple(sorted(group)) for group in owners.values() if len(group) > 1})


def digest_of(plain: Any) -> str:
    """Hash plain data by its JSON text: 16 hex digits."""
    text = json.dumps(plain, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def sealed(plain: list[Any]) -> str:
    """The text of a file that keeps plain data of cases with their digest."""
    return json.dumps({"digest": digest_of(plain), "cases": plain})


def unsealed(path: Path) -> list[Any]:
    """What a `sealed` file keeps; any error there is of a file that was damaged or changed."""
    kept = json.loads(read_text(path, limit=_SEALED_LIMIT))
    if kept["digest"] != digest_of(kept["cases"]):
        raise ValueError(f"{path.name} was changed")
    return list(kept["cases"])
