"""The memory that the evaluation of a large volume takes, and what is kept of many of them."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from mambaseg.data.case import Case
from mambaseg.data.geometry import Preprocessing
from mambaseg.reporting.views import SegmentationViews
from mambaseg.storage.run_folder import RunFolder
from mambaseg.training.callbacks import RunRecorder
from mambaseg.training.segmentation import SegmentationTask

CLASSES = ("background", "RV", "LV")
BYTES_PER_VOXEL = 48  # on top of the volume itself, which has 5


def large_case(depth, side=256):
    """A batch as the data module gives it, with structures all over the volume."""
    generator = np.random.default_rng(0)
    image = generator.standard_normal((depth, side, side), dtype=np.float32)
    smooth = gaussian_filter(generator.random((depth, side // 8, side // 8)), 2).repeat(8, 1)
    label = np.digitize(smooth.repeat(8, 2), np.quantile(smooth, (0.9, 0.95)))
    case = Case("patient001_ED", "patient001", "ED", None, None, None, None)
    return {
        "case": case,
        "image": torch.from_numpy(image)[:, None],
        "label": torch.from_numpy(label.astype(np.uint8)),
        "spacing": (3.0, 0.8, 0.8),
    }


def evaluated(batch, folder):
    """Score the case with an untrained network, whose errors are everywhere: the worst case."""
    torch.manual_seed(0)
    task = SegmentationTask(
        nn.Conv2d(1, len(CLASSES), 9, padding=4), nn.Identity(), None, None,
        preprocessing=Preprocessing("paper", 64), class_names=CLASSES,
    )  # fmt: skip
    recorder = RunRecorder(RunFolder(folder), title="noise", views=task.views)
    outputs = task.test_step(batch, 0)
    recorder.on_test_batch_end(None, task, outputs, batch, 0)
    return task.scores["test"].rows


def test_evaluating_a_large_volume_takes_memory_in_proportion(tmp_path):
    """NumPy's and SciPy's memory at its height, as their allocator counts it."""
    evaluated(large_case(1), tmp_path)  # loads what is loaded at first use
    batch = large_case(8)
    tracemalloc.start()
    try:
        rows = evaluated(batch, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row["outcome"] for row in rows] == ["scored"] * 3
    assert all(row["hd95_mm"] > 0 for row in rows)
    assert peak < BYTES_PER_VOXEL * batch["label"].numel(), f"{peak / 2**20:.0f} MiB"


def size(value):
    """Bytes of all arrays in dicts and tuples."""
    if isinstance(value, np.ndarray):
        return (value if value.base is None else value.base).nbytes  # a view keeps its volume
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return sum(map(size, value)) if isinstance(value, tuple) else 0


def test_of_each_case_a_few_slices_are_kept_however_deep_it_is(tmp_path):
    recorder = RunRecorder(RunFolder(tmp_path), title="", views=SegmentationViews(CLASSES))
    volume = torch.zeros(300, 40, 40, dtype=torch.uint8)
    volume[50:250, 10:30, 10:30] = 1
    for number in range(5):
        batch = {
            "case": SimpleNamespace(id=str(number)),
            "image": torch.rand(volume.shape)[:, None],
            "label": volume,
            "spacing": None,
        }
        recorder.on_test_batch_end(None, None, {"prediction": volume}, batch, 0)
    slice_bytes = 40 * 40 * 3 + 2  # three bytes per pixel, and its index
    kept = [size(case) for case in recorder._cases.values()]
    assert len(kept) == 5 and all(slice_bytes < one <= 3 * slice_bytes for one in kept)
