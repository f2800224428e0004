"""The selective scan: one definition (`reference`), several backends, one chooser (`dispatch`).

Beside it the short convolution of Mamba (`causal_conv`) and the WKV of RWKV networks (`wkv`).
"""

from mambaseg.scan.causal_conv import causal_conv1d
from mambaseg.scan.dispatch import (
    available_backends,
    choose_backend,
    selective_scan,
    selective_scan_2d,
)
from mambaseg.scan.wkv import bidirectional_wkv
