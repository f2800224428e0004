"""As src/train.py, but batch norm keeps its first statistics.

On a GPU it is synchronised over processes; a CPU cannot do that, and two processes then normalise
with statistics of their halves. Frozen, nothing but rounding may differ from one process.
"""

from torch import nn

from mambaseg.app.commands.train import main
from mambaseg.training.segmentation import SegmentationTask


def freeze(task, batch, batch_index):
    """As `SegmentationTask.on_train_batch_start`."""
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


if __name__ == "__main__":
    SegmentationTask.on_train_batch_start = freeze
    main()
