"""The schema: what the values of the configuration may be, by their keys.

Which keys there are is what `conf/<script>.yaml` and the groups it names hold (`check`). A value
beside a `_target_` without a row here is checked against the signature of the target.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any, NamedTuple

from mambaseg.data.limits import Number
from mambaseg.errors import UserError


class Text(NamedTuple):
    """Any text but an empty one; numbers are taken as text."""

    words: str = "text"

    def __str__(self) -> str:
        """What it is called in a message."""
        return self.words


Kind = tuple[Any, ...]
"""What a value may be, any of: a `Number`, `Text`, a list of such, a value, other ways to write
values (a dictionary), or whatever (`object`); nothing: the value follows from elsewhere."""


def _take(value: Any, kind: Kind) -> Any:
    """A value as the run has it; ValueError: it is of another kind."""
    for one in kind:
        if isinstance(one, Number):
            if one.holds(value):
                return value if one.whole else float(value)
        elif isinstance(one, Text):
            if isinstance(value, str | int | float) and value != "" and not isinstance(value, bool):
                return str(value)
        elif isinstance(one, list) and isinstance(value, list):
            return [_take(item, tuple(one)) for item in value]
        elif isinstance(one, dict) and str(value) in one:
            return one[str(value)]
        elif one is object or (type(one) is type(value) and one == value):
            return value
    raise ValueError


def words(kind: Kind) -> str:
    """What a kind is called in a message."""
    parts = [str(one) for one in kind if isinstance(one, Number | Text)]
    parts += [f"a list in brackets, each {words(tuple(one))}" for one in kind if type(one) is list]
    values = [shown(one) for one in kind if isinstance(one, str | bool)]
    parts += [f"one of {', '.join(values)}"] * bool(values)
    return " or ".join(parts) + ", or null" * (None in kind)


def is_text(kind: Kind) -> bool:
    """Whether values are text, so that a command line gives them as typed: 2024, a=b."""
    return any(isinstance(one, Text) or (type(one) is list and is_text(tuple(one))) for one in kind)


def takes_list(kind: Kind) -> bool:
    """Whether a value may be a list."""
    return any(type(one) is list or one is object for one in kind)


def shown(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def did_you_mean(key: str, known: Collection[str]) -> str:
    """`; did you mean ...?` for the known key that is most like this one; else an empty text."""
    last = key.rpartition(".")[2]
    known = sorted(other for other in known if not key.startswith(f"{other}."))
    namesakes = [other for other in known if other.rpartition(".")[2] == last]
    similar = difflib.get_close_matches
    near = similar(key, namesakes, 1, 0) or similar(key, known, 1, 0.7)
    if not near:  # device for trainer.devices
        lasts = {other.rpartition(".")[2]: other for other in reversed(known)}
        near = [lasts[one] for one in similar(last, lasts, 1, 0.8)]
    return f"; did you mean {near[0]}?" if near else ""


BENCHMARKS = ("scan", "inference", "train", "blocks", "profile", "kernels", "truth", "growth",
              "loop", "gpu")  # fmt: skip
TEXT, COUNT, NATURAL = Text(), Number(1, whole=True), Number(0, whole=True)
AUTO = "auto"  # `app.planning` gives it a value
FOLDER, RUN = Text("a folder"), Text("a run folder, a .ckpt file, a bundle, newest or a pattern")
_SHORT = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_ROWS: tuple[tuple[Kind, str], ...] = (
    ((True, False), """rerun test data.synthetic model.mirror_encoder model.residual
        evaluation.allow_seen evaluation.val_distances trainer.graph graph
        trainer.compile compile
        overlay probabilities uncertainty calibrated calibration"""),
    (("auto", True, False), """data.on_device trainer.sync_batchnorm dicom_seg
        evaluation.keep_largest keep_largest"""),
    ((COUNT,), """evaluation.batch_size data.num_classes data.in_channels model.d_state
        data.steps data.val_every trainer.accumulate_grad_batches
        callbacks.checkpoint.keep callbacks.nonfinite.most_in_a_row batch_size repeats"""),
    ((COUNT, None), "data.longest_side callbacks.checkpoint.every threads batch"),
    ((COUNT, [COUNT], None), "size"),
    ((COUNT, [COUNT], AUTO), "data.size model.size_multiple"),
    ((COUNT, AUTO), "data.batch_size"),
    ((COUNT, Number(above=0, high=1), None),
        "trainer.limit_val_batches trainer.limit_predict_batches"),
    ((Number(0, 180, whole=True), Number(0, 180), AUTO), "augmentation.rotate.degrees"),
    ((NATURAL,), """data.fold data.neighbours data.num_workers optim.freeze_encoder
        trainer.log_every_n_steps warmup"""),
    ((Number(0, 2**32 - 1, whole=True),), "seed data.seed data.split_seed"),
    ((Number(1, 65535, whole=True), None), "port"),
    ((Number(0),), """optim.optimizer.lr optim.optimizer.weight_decay optim.optimizer.momentum
        tolerance budget"""),
    ((Number(2, whole=True),), "data.folds"),
    ((Number(0, 1),), "data.oversample"),
    ((Number(0), None), "trainer.gradient_clip_val loop_limit"),
    ((Number(above=0), None), "data.minutes"),
    ((Number(above=0),), "evaluation.tolerance_mm augmentation.scale.smallest max_mib minutes"),
    ((Number(above=0), [Number(above=0)], AUTO, None), "data.spacing"),
    ((Number(above=0, high=1),), "optim.layer_decay"),
    (([TEXT], None), "model.encoder_parts"),
    ((TEXT,), """data.name data.title data.instead data.split data.preprocessing
        data.task model.name method.name scan_backend"""),
    ((TEXT, None), "data.intensity data.split_by"),
    ((Text("the name of a folder below outputs"),), "name"),
    ((Text("the folder of the data set"),), "data.root"),
    ((FOLDER,), "outputs data.cache_dir out"),
    ((FOLDER, None), "run_dir root predictions references data.unlabelled_images"),
    ((RUN, None), "run checkpoint"),
    ((Text("a run folder, a .ckpt file or a bundle"), None), "init_from"),
    (([RUN],), "ensemble"),
    ((Text("a regular expression"), None), "data.patient_pattern patient_pattern"),
    ((Text("auto or a file of weights"), None), "model.pretrained"),
    ((Text("a file, a folder or a pattern"),), "input"),
    ((Text("where the results go"), None), "output"),
    ((Text("auto, cpu, cuda, cuda:1 or mps"),), "device"),
    ((Text("auto, cpu, gpu or another of Lightning's"),), "trainer.accelerator"),
    (BENCHMARKS, "what"),
    ((TEXT, [TEXT]), "method.partner"),
    (("dense", "scribble"), "data.labels"),
    ((Number(0, 255, whole=True), None), "data.ignore_label ignore_label"),
    (([TEXT],), "data.class_names shapes backends scans train bench parts"),
    (([TEXT], None), "class_names"),
    (([TEXT], "all"), "models"),
    (([COUNT],), "growth.size growth.batch growth.cases growth.runs"),
    ((["1d", "2d"],), "forms"),
    ((Number(-1, whole=True), [NATURAL], "auto"), "trainer.devices"),
    (("strict", "penalty", "legacy"), "evaluation.empty"),
    (("none", "flips", "rot90", "all"), "data.views"),
    (("auto", "binary", "instances", "classes"), "data.masks"),
    (("all", "matrices"), "optim.decay"),
    (("max", "min", None), "callbacks.checkpoint.mode"),
    (("norm", "value", None), "trainer.gradient_clip_algorithm"),
    (("online", "offline", "disabled"), "logger.wandb.mode"),
    (([TEXT], None), "data.modality"),
    (("auto", "bf16-native", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true",
        _SHORT), "trainer.precision"),
    (("auto", "bf16-native", "32-true", "bf16-mixed", {"32": "32-true", "bf16": "bf16-mixed"}),
        "precision"),
    ((True, False, "flips", "rot90", "all", "none"), "tta evaluation.tta"),
    (("onnx", "torch", "bundle"), "format"),
    # whoever reads these knows what they may be: `checked_label_map`, `Preprocessing`, a target
    ((object,), """data.label_map data.regions data.labelled data.window data.ct optim.optimizer
        optim.scheduler"""),
)  # fmt: skip
INSTEAD = {
    "data.augmentation": "set augmentation=none|paper|modern; of mambaseg predict and demo "
    "data.views=none|flips|all",
    "data.accumulate": "set trainer.accumulate_grad_batches",
    "data.unlabelled": "choose a method (method=...)",
    "trainer.max_steps": "set data.steps",
    "trainer.max_epochs": "set data.steps",
    "trainer.val_check_interval": "set data.val_every",
    "trainer.check_val_every_n_epoch": "set data.val_every",
    "trainer.plugins": "mambaseg sets them",
    "trainer.use_distributed_sampler": "each process gets its share of the data without it",
    "trainer.callbacks": "use the group callbacks",
    "trainer.enable_checkpointing": "use the group callbacks",
    "trainer.logger": "use the group logger",
    "trainer.default_root_dir": "set outputs",
    "trainer.fast_dev_run": "choose debug=fast",
    "trainer.overfit_batches": "choose debug=overfit",
    "trainer.limit_train_batches": "set data.steps",
    "trainer.min_steps": "set data.steps",
    "trainer.min_epochs": "set data.steps",
}
"""Keys whose values follow from elsewhere, and from where."""
TABLE: dict[str, Kind] = {key: kind for kind, keys in _ROWS for key in keys.split()}
TABLE |= dict.fromkeys(INSTEAD, ())
"""Kinds by key."""


def take(key: str, value: Any) -> Any:
    """A value of a key as the run has it; UserError: it is of another kind."""
    try:
        return _take(value, TABLE[key])
    except ValueError:
        expected = words(TABLE[key]) or f"left out; {INSTEAD[key]}"
        if isinstance(value, float) and value.is_integer():
            expected += f"; write {int(value)}"
        elif isinstance(value, str) and value.lstrip("+-").replace(".", "", 1).isdigit():
            expected += f"; {value!r} is text"
        raise UserError(f"{key}={shown(value)}: must be {expected}") from None


PLANNED: tuple[str, ...] = (
    "model.kernel_size", "model.strides", "model.upsample_kernel_size", "model.filters",
    "model.deep_supr_num",
)  # fmt: skip
"""Arguments of a network that may be `auto`, whatever it takes in their place."""
EXTRAS: dict[str, tuple[str, ...]] = {
    "data": (
        "title",
        "synthetic",
        "task",
        "instead",
        "minutes",
        "patient_pattern",
        "masks",
        "modality",
    ),
    "method": ("name", "partner", "networks"),
    "model": ("name", "pretrained", "mirror_encoder", "size_multiple", "residual", "encoder_parts"),
    "trainer": ("graph", "compile"),
}
"""Keys beside a `_target_` that are not its arguments: others read them."""
NAMED = ("augmentation", "callbacks", "logger", "metric")
"""Groups of named entries, each with a `_target_` or null."""
READ, WRITTEN = ("data.root", "predictions", "references"), ("outputs", "data.cache_dir")
"""Folders that are read, and where something is written."""
