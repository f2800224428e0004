"""Use `runs` instead."""

from runs import small_overrides as small_overrides
