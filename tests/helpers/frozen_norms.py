"""As src/train.py, but batch norm keeps its first statistics.

On a GPU it is synchronised over processes; a CPU cannot do that, and two processes then normalise
with statistics of their halves. Frozen, nothing but rounding may differ from one process.
"""

import sys
from pathlib import Path

from torch import nn

from mambaseg.training.segmentation import SegmentationTask


def freeze(task, batch, batch_index):
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


SegmentationTask.on_train_batch_start = freeze
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from train import main  # noqa: E402  # found in the folder above

main()
