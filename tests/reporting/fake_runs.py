"""Run folders as a training leaves them, made in milliseconds from drawn label maps."""

import zlib
from pathlib import Path

import numpy as np
import yaml

from mambaseg.evaluation.metrics import score_case
from mambaseg.evaluation.summary import summarise
from mambaseg.reporting.figures import case_slices
from mambaseg.storage.run_folder import RunFolder

NAMES = ("background", "RV", "MYO", "LV")
GROUPS = ("NOR", "DCM", "HCM", "MINF", "RV")
SPACING = (10.0, 1.5, 1.5)
OPTIMIZERS = {
    "sgd": {"_target_": "torch.optim.SGD", "lr": 0.01, "momentum": 0.9},
    "adamw": {"_target_": "torch.optim.AdamW", "lr": 0.001, "betas": [0.9, 0.999]},
}


def heart(patient: int, phase: str, size: int = 32) -> np.ndarray:
    """Labels (5, size, size): rings around the centre, smaller at ES, different per patient."""
    scale = (0.9 + 0.04 * patient) * (0.75 if phase == "ES" else 1.0) * size / 32
    y, x = np.mgrid[:size, :size] - size / 2
    labels = np.zeros((5, size, size), np.uint8)
    for z in range(1, 5):
        r = np.hypot(y, x)
        labels[z][np.hypot(y, x + 10 * scale) < 4 * scale] = 1
        labels[z][r < (8 - 0.7 * z) * scale] = 2
        labels[z][r < (5 - 0.7 * z) * scale] = 3
    return labels


def predicted(truth: np.ndarray, error: float, rng: np.random.Generator) -> np.ndarray:
    """The truth, moved by a pixel in a slice with probability `error`, with flipped voxels."""
    moved = truth.copy()
    for z in range(len(truth)):
        if rng.random() < error:
            moved[z] = np.roll(truth[z], 1, axis=int(rng.integers(2)))
    flipped = rng.random(truth.shape) < 0.02 * error
    moved[flipped] = rng.integers(0, 4, flipped.sum())
    return moved


def write_run(
    experiment: Path,
    model: str = "unet",
    *,
    seed: int = 1,
    fold: int | None = None,
    error: float = 0.3,
    patients=range(1, 9),
    optim: str = "sgd",
    spacing=SPACING,
    policy: str = "strict",
    misses=(),
    config=None,
    record=None,
    size: int = 32,
    more=(),
    title: str = "fake hearts",
    name: str = "",
    **summary,
) -> Path:
    """Writes a finished run.

    `misses` are (patient, class) pairs without a prediction, `more` metrics from outside, `summary`
    what else is in metrics.json.
    """
    split = {"name": "random-seed0", "hash": "aaaa", "note": ""}
    if fold is not None:
        split = {"name": f"nnunet-fold{fold}", "hash": f"fold{fold}", "note": ""}
    name = f"{name or model}-{optim}-seed{seed}" + ("" if fold is None else f"-fold{fold}")
    folder = RunFolder(experiment / name)
    folder.start(
        key=name,
        data={"title": title, "fingerprint": "f00d"},
        split=split,
        parameters=1_000_000 + len(model),
        code={"digest": "d", "commit": "0123456789abcdef", "dirty": False},
        versions={"torch": "2.13.0"},
        hardware={"cpu": "a CPU", "gpus": []},
        fit_seconds=61.0,
        cost={
            "macs": 2_000_000_000,
            "scan_flops": 500_000_000,
            "image": [1, 32, 32],
            "seconds_per_case": 0.5,
            "peak_memory_bytes": 2**30,
        },
    )
    folder.update(**(record or {}))
    rows, overlays = [], {}
    rng = np.random.default_rng([seed, zlib.crc32(model.encode())])
    for patient in patients:
        for phase in ("ED", "ES"):
            truth = heart(patient, phase, size)
            labels = predicted(truth, error, rng)
            for index in (index for who, index in misses if who == patient):
                labels[labels == index] = 0
            case = f"patient{patient:03d}_{phase}"
            identity = {"case": case, "patient": case[:-3], "phase": phase,
                        "group": GROUPS[patient % 5]}  # fmt: skip
            scored = score_case(labels, truth, num_classes=4, spacing=spacing, policy=policy,
                                more=more)  # fmt: skip
            rows += [{**identity, "class_name": NAMES[row["class"]], **row} for row in scored]
            image = 60.0 * truth + 20 * rng.random(truth.shape)
            for key, array in case_slices(image, truth, labels).items():
                overlays[f"{case}/{key}"] = array
    settings = {
        "name": experiment.name,
        "run_dir": str(folder.path),
        "seed": seed,
        "data": {"name": "fake", "title": title, "synthetic": False, "seed": seed,
                 "fold": fold or 0, "class_names": list(NAMES), "size": 32,
                 "preprocessing": "paper", "root": "/somewhere"},
        "model": {"name": model, "_target_": f"mambaseg.models.{model}", "in_channels": 1},
        "optim": {"optimizer": OPTIMIZERS[optim], "decay": "all"},
        "evaluation": {"empty": policy, "keep_largest": False},
        "trainer": {"precision": "32-true"},
        "callbacks": {"best": {"dirpath": str(folder.path)}},
    }  # fmt: skip
    for key, value in (config or {}).items():
        *parts, name = key.split(".", 1)
        (settings.setdefault(parts[0], {}) if parts else settings)[name] = value
    folder.write_text("config.yaml", yaml.safe_dump(settings))
    folder.write_rows("cases.csv", rows)
    header = {"data": title, "model": model, "split": split, "checkpoint": "best", **summary}
    folder.write_json("metrics.json", {**header, **summarise(rows, NAMES, more=more)})
    folder.write_arrays("overlays.npz", overlays)
    folder.write_rows("metrics.csv", curve(seed, error))
    folder.finish("done")
    return folder.path


def curve(seed: int, error: float) -> list[dict[str, float]]:
    """Rows of a metrics.csv: losses and validation scores in rows of their own."""
    rows: list[dict[str, float]] = []
    for step in range(9, 100, 10):
        rows.append({"step": step, "train/loss": 1 / (1 + step / 20) + 0.01 * seed})
        if step % 20 == 19:
            rows.append({"step": step, "val/dice": 1 - error * (1.2 - step / 100)})
    return rows


if __name__ == "__main__":  # a folder to look at
    import sys

    where = Path(sys.argv[1])
    for number in (1, 2):
        write_run(where, "unet", seed=number, error=0.3, size=64)
        write_run(where, "swin_unet", seed=number, error=0.6, size=64)
        write_run(where, "mamba_unet", seed=number, error=0.4, size=64, misses=[(3, 1)])
