"""What the source files hold, as a hash: independent of folder, names and dates."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mambaseg.data.case import Case
from mambaseg.data.formats.files import content_digest

THREADS = min(8, os.cpu_count() or 1)


def source_digests(cases: Sequence[Any]) -> dict[str, str]:
    """Hash the content of the source files of each `Case` or `Pair`: its id -> hex digest."""
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda one: content_digest(one.sources(), f"case {one.id}"), cases)
        return {case.id: digest for case, digest in zip(cases, digests, strict=True)}


def fingerprint(cases: Sequence[Any], digests: dict[str, str] | None = None) -> str:
    """Return a hash of what the source files of these cases hold, by case id and in any order.

    `digests` are `source_digests(cases)` where they are known already.
    """
    return digest_of(sorted((digests or source_digests(cases)).items()))


def as_read(cases: Sequence[Case], digests: dict[str, str]) -> list[Any]:
    """What these cases hold and how they are read, as plain data that identify their arrays.

    Who is read how counts: an h5 file is the same whether or not its label may be read.
    """
    recipes = sorted([case.recipe, case.id] for case in cases)
    same = recipes[0][0] == recipes[-1][0]
    return [fingerprint(cases, digests), recipes[0][:1] if same else recipes]


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
