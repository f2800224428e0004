"""The memory that the evaluation of a large volume takes, and what is kept of many of them."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from mambaseg.data.case import Case
from mambaseg.data.geometry import Preprocessing
from mambaseg.evaluation.costs import peak, start_peak
from mambaseg.reporting.views import SegmentationViews, shown_slices
from mambaseg.storage.run_folder import RunFolder
from mambaseg.training.callbacks import RunRecorder
from mambaseg.training.segmentation import SegmentationTask

CLASSES = ("background", "RV", "LV")
BYTES_PER_VOXEL = 48  # on top of the volume itself, which has 5
FIXED = 40 * 2**20  # a batch of logits at 512 x 512
CPU = torch.device("cpu")


def large_case(depth, side=512):
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
    recorder = RunRecorder(RunFolder(folder), title="noise", header={}, views=task.views)
    outputs = task.test_step(batch, 0)
    recorder.on_test_batch_end(None, task, outputs, batch, 0)
    return task.scores["test"].rows


def grown_by(depth, folder):
    """Bytes that scoring a volume of this depth takes at its height; None: nobody tells."""
    torch.set_num_threads(1)
    evaluated(large_case(1), folder)  # loads what is loaded at first use
    batch = large_case(depth)
    before = start_peak(CPU)
    if before is None:
        return None
    rows = evaluated(batch, folder)
    assert [row["outcome"] for row in rows] == ["scored"] * 3
    assert all(row["hd95_mm"] > 0 for row in rows)
    return peak(CPU) - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "depth", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_evaluating_a_large_volume_takes_memory_in_proportion(depth, tmp_path):
    """In a process of its own: what other tests have freed, and its holes, are not there."""
    words = [sys.executable, __file__, str(depth), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout)
    if grown is None:
        pytest.skip("the system does not tell the peak of memory")
    voxels = depth * 512 * 512
    assert grown < BYTES_PER_VOXEL * voxels + FIXED, f"{grown / 2**20:.0f} MiB"


def size(value):
    """Bytes of all arrays in dicts and tuples."""
    if isinstance(value, np.ndarray):
        return (value if value.base is None else value.base).nbytes  # a view keeps its volume
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return sum(map(size, value)) if isinstance(value, tuple) else 0


def test_of_each_case_a_few_slices_are_kept_however_deep_it_is(tmp_path):
    recorder = RunRecorder(
        RunFolder(tmp_path), title="", header={}, views=SegmentationViews(CLASSES)
    )
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
    slice_bytes = 40 * 40 * (4 + 1 + 1)
    kept = [size(case) for case in recorder._cases.values()]
    assert len(kept) == 5 and all(slice_bytes < one < 7 * slice_bytes for one in kept)


def test_what_is_kept_is_what_the_volume_shows():
    generator = np.random.default_rng(0)
    image = generator.random((9, 12, 14)).astype(np.float32)
    truth, prediction = (generator.integers(0, 3, image.shape).astype(np.uint8) for _ in range(2))
    kept = shown_slices(image, truth, prediction, None)
    assert np.array_equal(kept["middle"]["image"], image[4:5])
    assert np.array_equal(kept["middle"]["prediction"], prediction[4:5])
    for row, (_, z) in enumerate(kept["view"].rows):
        assert np.array_equal(kept["view"].image[row], image[z])
        assert np.array_equal(kept["view"].truth[row], truth[z])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(grown_by(int(sys.argv[1]), Path(sys.argv[2]))))
