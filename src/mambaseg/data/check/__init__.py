"""data-check: is a folder fit for training? `python -m mambaseg.data.check ROOT`."""

from mambaseg.data.check.dataset import Report, check_dataset
from mambaseg.data.check.layouts import Layout, find_layout, known_layouts
from mambaseg.data.check.proposal import propose

__all__ = ["Layout", "Report", "check_dataset", "find_layout", "known_layouts", "propose"]
