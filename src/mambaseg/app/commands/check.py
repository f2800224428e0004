"""Checks a data set and drafts its config: mambaseg check <folder of the data set>."""

from collections.abc import Sequence

from mambaseg.app.own import find_code


def main(words: Sequence[str] | None = None) -> int:
    """Returns 1 where the data set has errors, else 0."""
    from mambaseg.data.check.__main__ import main as check

    return check(words, find_code=find_code)
