"""data-check: is a folder fit for training? `mambaseg check ROOT`."""

from mambaseg.data.check.dataset import check_dataset
from mambaseg.data.check.layouts import find_layout

__all__ = ["check_dataset", "find_layout"]
