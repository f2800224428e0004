"""A long training holds no more objects and tensors at its end than at its beginning."""

import gc
import sys

import lightning as L
import numpy as np
import torch
from scipy.stats import theilslopes

from runs import built

WORDS = [
    "model=unet", "model.widths=[2,2,2,2,2]", "model.dropout=[0,0,0,0,0]", "data.size=16",
    "data.batch_size=2", "test=false",
]  # fmt: skip
OBJECTS_PER_STEP, BYTES_PER_STEP = 4, 1024


class Watch(L.Callback):
    """Counts Python's blocks and the bytes of all tensors that are alive.

    Args:
        leak: tensors of 4 KiB that are kept on purpose in each step.
    """

    def __init__(self, leak=0):
        self.leak, self.samples, self._kept = leak, [], []

    def on_train_batch_end(self, trainer, *_):
        self._kept += [torch.zeros(1024) for _ in range(self.leak)]
        if trainer.global_step % 20 == 0:
            gc.collect()
            tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
            held = sum(one.element_size() * one.nelement() for one in tensors)
            self.samples.append((trainer.global_step, sys.getallocatedblocks(), held))

    def growth(self, after):
        """Objects and bytes per step after a step: medians of all slopes between two samples.

        What is allocated once, at some step, in a process that other tests have used is no growth.
        """
        steps, *kinds = np.array([sample for sample in self.samples if sample[0] > after]).T
        return [theilslopes(values, steps).slope for values in kinds]


def watched(words, watch):
    with built(*words) as run:
        run.trainer.callbacks.append(watch)
        run.fit()
    return watch


def test_a_training_of_300_steps_does_not_grow(small_run):
    watch = watched([*small_run, *WORDS, "data.steps=300", "data.val_every=100"], Watch())
    assert len(watch.samples) == 15
    objects, held = watch.growth(after=60)
    assert objects < OBJECTS_PER_STEP and held < BYTES_PER_STEP, watch.samples


def test_a_leak_would_be_seen(small_run):
    watch = watched([*small_run, *WORDS, "data.steps=100", "data.val_every=100"], Watch(leak=8))
    objects, held = watch.growth(after=20)
    assert objects > OBJECTS_PER_STEP and held > BYTES_PER_STEP, watch.samples
