"""500 steps of training need no more memory than the first hundred."""

import gc
import sys

import lightning as L
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from scipy.stats import theilslopes

from mambaseg.app.build import build
from mambaseg.app.entry import CONF
from mambaseg.evaluation.costs import memory_in_use

WORDS = [
    "model=unet", "model.widths=[2,2,2,2,2]", "data.size=16", "data.batch_size=2", "logger=csv",
    "test=false", "callbacks.progress=null", "+trainer.enable_progress_bar=false",
]  # fmt: skip
KIB_PER_STEP, OBJECTS_PER_STEP = 16, 4

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Watch(L.Callback):
    """Samples the process's memory and the number of Python's blocks.

    Args:
        leak: objects of 4 KiB that are kept on purpose in each step.
    """

    def __init__(self, leak=0):
        self.leak, self.samples, self._kept = leak, [], []

    def on_train_batch_end(self, trainer, *_):
        self._kept += [bytearray(4096) for _ in range(self.leak)]
        if trainer.global_step % 25 == 0:
            gc.collect()
            sample = (trainer.global_step, memory_in_use() / 1024, sys.getallocatedblocks())
            self.samples.append(sample)

    def growth(self, after):
        """KiB and objects per step after a step: medians of all slopes between two samples.

        What is allocated once, at some step, in a process that other tests have used is no growth.
        """
        steps, *kinds = np.array([sample for sample in self.samples if sample[0] > after]).T
        return [theilslopes(values, steps).slope for values in kinds]


def watched(words, watch):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=words)
    with build(cfg) as run:
        run.trainer.callbacks.append(watch)
        run.fit()
    return watch


def test_memory_does_not_grow_over_500_steps(small_run):
    watch = watched([*small_run, *WORDS, "data.steps=500", "data.val_every=100"], Watch())
    assert len(watch.samples) == 20
    kib, objects = watch.growth(after=100)
    assert kib < KIB_PER_STEP and objects < OBJECTS_PER_STEP, watch.samples


def test_a_leak_would_be_seen(small_run):
    watch = watched([*small_run, *WORDS, "data.steps=150", "data.val_every=150"], Watch(leak=8))
    kib, objects = watch.growth(after=25)
    assert kib > KIB_PER_STEP and objects > OBJECTS_PER_STEP, watch.samples
