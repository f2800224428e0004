"""Checks a data set and drafts its config: mambaseg check <folder of the data set>."""

from mambaseg.data.check.__main__ import main as main
