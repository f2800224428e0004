"""Speed and memory of scans, networks and training steps, as ratios within one run.

Numbers of two machines, or of one machine on two days, cannot be compared; what is measured side by
side in one process can. Everything here takes plain arguments and returns plain data: rows that
`tables` shows and that are written as JSON.
"""

from mambaseg.benchmark.blocks import measure_blocks
from mambaseg.benchmark.gpu import measure_gpu
from mambaseg.benchmark.kernels import measure_kernels
from mambaseg.benchmark.measure import Protocol
from mambaseg.benchmark.networks import (
    Step,
    inference,
    measure_networks,
    profile_networks,
    training,
)
from mambaseg.benchmark.pages import networks_page
from mambaseg.benchmark.scans import measure_scans, shapes_of
from mambaseg.benchmark.tables import tables
from mambaseg.benchmark.truth import measure_truth

__all__ = [
    "Protocol",
    "Step",
    "inference",
    "measure_blocks",
    "measure_gpu",
    "measure_kernels",
    "measure_networks",
    "measure_scans",
    "measure_truth",
    "networks_page",
    "profile_networks",
    "shapes_of",
    "tables",
    "training",
]
