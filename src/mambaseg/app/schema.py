"""The schema: what the values of the configuration may be, by their keys.

Which keys there are is what `conf/<script>.yaml` and the groups it names hold (`check`). This table
says what their values may be; what stands beside a `_target_` without a row here is checked against
the signature of the target.
"""

from __future__ import annotations

from mambaseg.app.kinds import (
    Kind,
    anything,
    choice,
    either,
    flag,
    instead,
    listed,
    maybe,
    number,
    text,
    whole,
)

_SEED = whole(0, 2**32 - 1)
_RUN = "a run folder or a .ckpt file"
_PRECISIONS = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}

TABLE: dict[str, Kind] = {
    # ---- a run (conf/config.yaml, conf/evaluate.yaml)
    "name": text("the name of a folder below outputs"),
    "outputs": text("a folder"),
    "run_dir": maybe(text("a folder")),
    "seed": _SEED,
    "rerun": flag,
    "test": flag,
    "evaluation.empty": choice("strict", "penalty", "legacy"),
    "evaluation.tolerance_mm": number(above=0),
    "evaluation.keep_largest": flag,
    "evaluation.batch_size": whole(1),
    "evaluation.allow_seen": flag,
    "run": maybe(text(_RUN)),
    "checkpoint": maybe(text(_RUN)),
    "predictions": maybe(text("a folder of label maps")),
    "references": maybe(text("a folder of label maps")),
    "class_names": maybe(listed(text())),
    # ---- groups of a run
    "data.name": text(),
    "data.title": text(),
    "data.synthetic": flag,
    "data.task": text("what the data are for"),
    "data.instead": text(),
    "data.root": text("the folder of the data set"),
    "data.cache_dir": text("a folder"),
    "data.patient_pattern": maybe(text("a regular expression")),
    "data.masks": choice("auto", "binary", "instances", "classes"),
    "data.split": text("the name of a split"),
    "data.fold": whole(0),
    "data.split_seed": _SEED,
    "data.seed": _SEED,
    "data.class_names": listed(text()),
    "data.label_map": anything,  # value -> class: `checked_label_map` knows how many there are
    "data.num_classes": whole(1),
    "data.in_channels": whole(1),
    "data.preprocessing": text("the name of a preset"),
    "data.intensity": maybe(text("the name of a scaling")),
    "data.spacing": maybe(number(above=0)),
    "data.window": maybe(listed(anything)),  # `Preprocessing` says what a window is
    "data.longest_side": maybe(whole(1)),
    "data.augmentation": instead(
        "set augmentation=none|paper|modern; of predict.py and demo.py data.views=none|flips|all"
    ),
    "data.views": choice("none", "flips", "rot90", "all"),
    "data.accumulate": instead("set trainer.accumulate_grad_batches"),
    "data.size": whole(1),
    "data.batch_size": whole(1),
    "data.steps": whole(1),
    "data.val_every": whole(1),
    "data.num_workers": whole(0),
    "data.on_device": choice("auto", True, False),
    "augmentation.scale.smallest": number(above=0),
    "model.name": text(),
    "model.pretrained": maybe(text("a file of weights")),
    "model.mirror_encoder": flag,
    "model.size_multiple": whole(1),
    "model.residual": flag,
    "optim.optimizer": anything,
    "optim.optimizer.lr": number(0),
    "optim.optimizer.weight_decay": number(0),
    "optim.optimizer.momentum": number(0),
    "optim.decay": choice("all", "matrices"),
    "optim.scheduler": anything,
    "trainer.precision": choice(
        "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true",
        **_PRECISIONS,
    ),
    "trainer.devices": either(whole(-1), listed(whole(0)), choice("auto")),
    "trainer.accumulate_grad_batches": whole(1),
    "trainer.gradient_clip_val": maybe(number(0)),
    "trainer.log_every_n_steps": whole(0),
    "trainer.sync_batchnorm": choice("auto", True, False),
    "trainer.graph": flag,
    "trainer.max_steps": instead("set data.steps"),
    "trainer.max_epochs": instead("set data.steps"),
    "trainer.val_check_interval": instead("set data.val_every"),
    "trainer.check_val_every_n_epoch": instead("set data.val_every"),
    "trainer.callbacks": instead("use the group callbacks"),
    "trainer.logger": instead("use the group logger"),
    "trainer.enable_checkpointing": instead("use the group callbacks"),
    "trainer.default_root_dir": instead("set outputs"),
    "callbacks.checkpoint.mode": maybe(choice("max", "min")),
    "callbacks.checkpoint.every": maybe(whole(1)),
    "callbacks.checkpoint.keep": whole(1),
    "callbacks.nonfinite.most_in_a_row": whole(1),
    # ---- what has been trained (conf/predict.yaml, conf/demo.yaml, conf/export.yaml)
    "ensemble": listed(text(_RUN)),
    "input": text("a file, a folder or a pattern"),
    "output": maybe(text("where the results go")),
    "tta": choice(True, False, "flips", "rot90", "all", "none"),
    "keep_largest": flag,
    "probabilities": flag,
    "overlay": flag,
    "dicom_seg": choice("auto", True, False),
    "device": text("auto, cpu, cuda, cuda:1 or mps"),
    "precision": choice("auto", "32-true", "bf16-mixed", **{"32": "32-true", "bf16": "bf16-mixed"}),
    "scan_backend": text("the name of a scan backend"),
    "batch_size": whole(1),
    "port": maybe(whole(1, 65535)),
    "max_mib": number(above=0),
    "format": choice("onnx", "torch"),
    "size": maybe(whole(1)),
    "tolerance": number(0),
    # ---- conf/benchmark.yaml
    "what": text("the first word of the command"),
    "threads": maybe(whole(1)),
    "batch": maybe(whole(1)),
    "repeats": whole(1),
    "warmup": whole(0),
    "budget": number(0),
    "shapes": listed(text()),
    "forms": listed(choice("1d", "2d")),
    "backends": listed(text()),
    "loop_limit": maybe(number(0)),
    "graph": flag,
    "scans": listed(text()),
    "minutes": number(above=0),
    "root": maybe(text("ACDC's folder")),
    "out": text("a folder"),
    "train": listed(text()),
    "bench": listed(text()),
    "parts": listed(text()),
    "models": either(listed(text()), choice("all")),
    "page": maybe(text("a file")),
}  # fmt: skip

# keys beside a `_target_` that are not its arguments: `build` and `networks` read them
EXTRAS: dict[str, tuple[str, ...]] = {
    "data": ("title", "synthetic", "task", "instead", "patient_pattern", "masks"),
    "model": ("name", "pretrained", "mirror_encoder", "size_multiple", "residual"),
    "trainer": ("graph",),
}
# groups of named entries, each with a `_target_` or null
NAMED = ("augmentation", "callbacks", "logger", "metric")
# folders that are read, and where something is written
READ = ("data.root", "predictions", "references")
WRITTEN = ("outputs", "data.cache_dir")
