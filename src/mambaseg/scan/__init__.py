"""The selective scan: one definition (`reference`), several backends, one chooser (`dispatch`)."""

from mambaseg.scan.causal_conv import causal_conv1d
from mambaseg.scan.dispatch import (
    available_backends,
    choose_backend,
    selective_scan,
    selective_scan_2d,
)

__all__ = [
    "available_backends",
    "causal_conv1d",
    "choose_backend",
    "selective_scan",
    "selective_scan_2d",
]
