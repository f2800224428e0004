"""What makes another run: a side for every key of the configuration, and older run folders."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from mambaseg.app.entry import CONF
from mambaseg.app.sweeps import _SAME_RUN
from mambaseg.errors import UserError
from mambaseg.reporting.labels import flatten
from mambaseg.storage.identity import (
    _LEFT_OUT,
    RULE,
    better,
    identity,
    monitor_of,
    same_run,
    scientific,
    weight_digests,
    with_digests,
)
from mambaseg.storage.run_folder import RunFolder
from runs import UNET, built, composed

# By design these change a number in cases.csv, or the cases and classes that it has rows of.
IN = """
augmentation.flip._target_ augmentation.flip.probability augmentation.rotate._target_
augmentation.rotate.degrees augmentation.scale._target_ augmentation.scale.smallest
augmentation.blur._target_ augmentation.blur.probability augmentation.blur.sigma
augmentation.brightness._target_ augmentation.brightness.factor
augmentation.brightness.probability augmentation.contrast._target_ augmentation.contrast.factor
augmentation.contrast.probability augmentation.gamma._target_ augmentation.gamma.gamma
augmentation.gamma.inverted augmentation.gamma.probability augmentation.gamma_inverted._target_
augmentation.gamma_inverted.gamma augmentation.gamma_inverted.inverted
augmentation.gamma_inverted.probability augmentation.low_resolution._target_
augmentation.low_resolution.probability augmentation.low_resolution.smallest
augmentation.noise._target_ augmentation.noise.most augmentation.noise.probability
augmentation.rotate.probability augmentation.zoom._target_ augmentation.zoom.probability
augmentation.zoom.scale augmentation.shift._target_ augmentation.shift.share
augmentation.tone._target_
augmentation.tone.brightness augmentation.tone.contrast augmentation.tone.gamma
augmentation.tone.probability augmentation.turn_or_rotate._target_
augmentation.turn_or_rotate.degrees
callbacks.checkpoint._target_ callbacks.checkpoint.mode callbacks.checkpoint.monitor
callbacks.ema._target_ callbacks.ema.decay callbacks.nonfinite._target_ callbacks.progress._target_
callbacks.rate._target_
checkpoint
data._target_ data.batch_size data.class_names data.class_remarks._partial_
data.class_remarks._target_ data.find_cases._partial_ data.find_cases._target_
data.find_cases.channels data.find_cases.fold data.find_cases.ignore_label
data.find_cases.label_map
data.find_cases.longest_side data.find_cases.masks data.find_cases.num_classes
data.find_cases.patient_pattern data.fold data.folds data.ignore_label data.in_channels
data.ct data.intensity
data.label_map data.labelled data.labels
data.longest_side data.masks data.minutes data.name data.neighbours data.num_classes data.oversample
data.patient_pattern data.preprocessing data.regions
data.seed data.size data.slicing data.spacing data.split data.split_by data.steps
data.task data.val_every
data.window
evaluation.empty evaluation.keep_largest evaluation.tolerance_mm evaluation.tta
init_from
loss._target_ loss.background loss.batch loss.ce_weight loss.class_weights loss.coarsest
loss.dice_weight loss.gamma loss.loss._target_ loss.loss.background loss.loss.batch
loss.loss.ce_weight loss.loss.class_weights loss.loss.dice_weight loss.loss.squared loss.regions
loss.softmax
loss.squared loss.to_onehot_y loss.top_k loss.use_softmax loss.weight
method._partial_ method._target_ method.alpha method.clip method.contrast method.decay
method.dropout method.every method.in_channels method.intensity method.jitter method.lr
method.momentum method.noise
method.num_classes method.partner method.passes method.position method.pseudo method.radius
method.released method.scales method.start method.threshold method.weight method.width
model._target_ model.act_name model.add_coarser_head model.arch model.attention model.backbone
model.blocks model.blocks_down model.blocks_up model.d_state model.decoder_depths
model.decoder_widths model.deep_supervision model.deep_supr_num model.depth model.depths model.dim
model.drop_path_rate model.dropout model.dropout_prob model.embed_dim model.encoder model.expansions
model.feature_size model.features model.filters model.grid model.heads model.hidden model.image_size
model.in_channels model.init_filters model.kernel_size model.mamba model.mirror_encoder
model.mix_width model.name model.norm_name model.num_classes model.num_heads model.out_channels
model.patch_size model.pretrained model.res_block model.residual model.size_multiple
model.spatial_dims model.stem_width model.strides model.timm model.units model.upsample_kernel_size
model.wide_scan model.width model.widths model.window_size
optim.decay optim.freeze_encoder optim.layer_decay optim.optimizer._partial_
optim.optimizer._target_ optim.optimizer.eps optim.optimizer.lr optim.optimizer.momentum
optim.optimizer.nesterov optim.optimizer.weight_decay optim.scheduler.T_max
optim.scheduler._partial_ optim.scheduler._target_ optim.scheduler.cycle_momentum
optim.scheduler.eta_min optim.scheduler.factor optim.scheduler.max_lr optim.scheduler.pct_start
optim.scheduler.power optim.scheduler.total_iters optim.scheduler.total_steps
seed
trainer._target_ trainer.accumulate_grad_batches trainer.gradient_clip_val trainer.precision
"""
# These change none beyond rounding, or say only where and how fast it is computed. The fingerprint
# of the data and the hash of the split stand for data.root and data.prepare.
OUT = """
calibration
callbacks.checkpoint.every callbacks.checkpoint.folder callbacks.checkpoint.keep
callbacks.nonfinite.folder callbacks.nonfinite.late callbacks.nonfinite.most_in_a_row
callbacks.nonfinite.on_nonfinite callbacks.progress.refresh_rate callbacks.rate.logging_interval
class_names
data.cache_dir data.find_cases.split data.instead data.modality
data.num_workers data.on_device data.prepare data.prepare._partial_
data.prepare._target_ data.prepare.height data.prepare.patients data.prepare.scenes
data.prepare.seed data.prepare.width data.root data.synthetic data.title data.unlabelled_images
evaluation.allow_seen evaluation.batch_size evaluation.val_distances
ignore_label
logger.csv._target_ logger.csv.save_dir
logger.mlflow._target_ logger.mlflow.experiment logger.mlflow.name logger.mlflow.resume_step
logger.mlflow.run_id logger.mlflow.tracking_uri
logger.tensorboard._target_ logger.tensorboard.resume_step logger.tensorboard.save_dir
logger.wandb._target_ logger.wandb.group
logger.wandb.history logger.wandb.init_timeout logger.wandb.mode logger.wandb.name
logger.wandb.project logger.wandb.resume_step logger.wandb.run_id logger.wandb.save_dir
logger.wandb.tags
method.name model.encoder_parts model.scan_backend
name
optim.optimizer.fused
outputs patient_pattern predictions references rerun run run_dir test
trainer.accelerator trainer.compile trainer.deterministic trainer.devices
trainer.enable_model_summary trainer.graph
trainer.log_every_n_steps trainer.num_sanity_val_steps trainer.strategy trainer.sync_batchnorm
"""
# Where a checkpoint is scored nothing is trained, so these do not count either.
ONLY_TRAINING = (
    "callbacks.", "loss.", "method.", "optim.", "augmentation.", "data.labelled", "data.labels",
    "data.batch_size", "data.oversample", "data.steps",
    "data.val_every", "trainer.accumulate", "trainer.gradient",
)  # fmt: skip
GROUPS = ("model", "data", "augmentation", "loss", "method", "optim", "optim/own", "trainer",
          "callbacks", "logger", "experiment", "hparams_search")  # fmt: skip
EARLY = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/dice, patience: 3}"
OLD = Path(__file__).with_name("old_run.yaml")
"""config.yaml of a run of an earlier version: `small_run` with model=unet on a CPU."""


@pytest.fixture(scope="module")
def keys():
    """Every key of config.yaml with each option of each group, and a configuration that has it."""
    options = [("config", []), ("evaluate", ["checkpoint=best.ckpt"])]
    for group in GROUPS:
        name = group.replace("/", "=") + ("/" if "/" in group else "=")  # optim=own/unet
        options += [
            ("config", [name + file.stem]) for file in sorted((CONF / group).glob("*.yaml"))
        ]
    for file in sorted((CONF / "model" / "quick").glob("*.yaml")):
        options.append(("config", ["experiment=quickstart", f"model={file.stem}"]))
    found = {}
    for entry, words in options:
        config = OmegaConf.to_container(composed(*words, script=entry), resolve=False)
        for key in flatten(config):
            found.setdefault(re.sub(r"^data\.label_map\..*", "data.label_map", key), config)
    return found


def of(config):
    return identity(config, split="s", data="d")


def with_another(config, key):
    """The configuration with another value of a key."""
    config = copy.deepcopy(config)
    *groups, last = key.split(".")
    part = config
    for group in groups:
        part = part[group]
    part[last] = "another"
    return config


def test_every_key_has_its_side(keys):
    """A key that is new: state here and in `mambaseg.storage.identity` if it makes another run.

    If it does, say there (`_ADDED`) with which value all is as before, or older runs are orphaned.
    """
    sides = [*IN.split(), *OUT.split()]
    assert len(sides) == len(set(sides))
    assert sorted(keys) == sorted(sides)


def test_every_key_acts_on_its_side(keys):
    changing = {key for key, config in keys.items() if of(with_another(config, key)) != of(config)}
    assert changing == set(IN.split())


def test_where_a_checkpoint_is_scored_nothing_of_the_training_counts(keys):
    config = OmegaConf.to_container(composed("checkpoint=b", script="evaluate"), resolve=False)
    config = {**config, "model": {"name": "unet"}}
    present = set(flatten(config)) & keys.keys()
    changing = {key for key in present if of(with_another(config, key)) != of(config)}
    assert changing == {k for k in present & set(IN.split()) if not k.startswith(ONLY_TRAINING)}
    assert {"evaluation.empty", "data.size", "checkpoint"} <= changing


def test_identities_of_this_version_stay():
    """Another one here orphans the runs of users: raise `RULE`, or use `_ADDED`."""
    config = composed("model=mamba_unet", "data=acdc", "experiment=acdc_paper")
    assert (RULE, of(OmegaConf.to_container(config, resolve=False))) == (3, "a6c6d6f3")


@pytest.mark.parametrize(
    "word",
    ["~callbacks.nonfinite", "callbacks.nonfinite=null", f"+callbacks.early={EARLY}",
     "+callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging", "callbacks=ema",
     "+callbacks.own={_target_: my.Callback, strength: 2}", "+trainer.max_time=00:01:00:00",
     "+optim.optimizer.amsgrad=true", "+trainer.limit_val_batches=3"],
)  # fmt: skip
def test_what_else_may_change_a_number_counts(word):
    assert of(plain("data=acdc", word)) != of(plain("data=acdc"))


@pytest.mark.parametrize(
    "word",
    ["~callbacks.progress", "callbacks.rate=null", "logger=none",
     "+callbacks.watch._target_=lightning.pytorch.callbacks.DeviceStatsMonitor",
     "+callbacks.watch._target_=lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor",
     "+callbacks.more={_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: x}",
     "+trainer.benchmark=true", "+trainer.enable_progress_bar=false",
     "+optim.optimizer.foreach=true", "trainer=ddp"],
)  # fmt: skip
def test_what_only_looks_on_does_not_count(word):
    assert of(plain("data=acdc", word)) == of(plain("data=acdc"))


def plain(*words):
    return OmegaConf.to_container(composed(*words), resolve=False)


def test_the_name_of_a_callback_and_the_run_folder_in_it_do_not_count():
    own = "{_target_: my.Callback, folder: '%s/mine'}"
    bare, moved, other = (
        {**plain("data=acdc", f"+callbacks.{name}={own % place}"), "run_dir": folder}
        for name, place, folder in (("a", "null", None), ("b", "/x/run", "/x/run"),
                                    ("a", "/x/run2", "/x/run"))
    )  # fmt: skip
    bare["callbacks"]["a"]["folder"] = "None/mine"  # as `run_dir: null` resolves
    assert of(bare) == of(moved) != of(other)


def test_two_callbacks_of_one_class_both_count():
    words = ["data=acdc", f"+callbacks.a={EARLY}"]
    other = EARLY.replace("val/dice", "train/loss")
    both = of(plain(*words, f"+callbacks.b={other}"))
    assert both != of(plain(*words)) and both == of(
        plain("data=acdc", f"+callbacks.a={other}", f"+callbacks.b={EARLY}")
    )


def test_the_name_of_a_structure_does_not_say_which_way_its_score_is_better():
    for name in ("val/dice", "val/dice_genioglossus", "val/dice_hd95", "val/unet/dice", "val/psnr",
                 "val/ssim", "val/loss_net/dice"):  # fmt: skip
        assert better(name) == "max"
    for name in ("train/loss", "val/hd95_mm", "val/hd95_px", "val/assd_mm", "val/unet/hd95_mm"):
        assert better(name) == "min"


@pytest.mark.parametrize("key", ["model.pretrained", "init_from"])
def test_weights_count_by_content(key, tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (
        of(with_digests(config, weight_digests(config)))
        for config in (plain("model=mamba_unet", f"{key}={tmp_path / name}")
                       for name in "abc")
    )  # fmt: skip
    assert a == b != c


def test_a_partners_weights_count_by_content_and_its_scan_backend_does_not(tmp_path):
    config = plain("data=acdc")

    def found(weights, backend="auto"):
        partner = {"name": "a", "pretrained": weights and str(weights), "scan_backend": backend}
        config["method"]["networks"] = [{"name": "b"}, partner]
        return of(config), of(with_digests(config, weight_digests(config)))

    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (found(tmp_path / name)[1] for name in "abc")
    assert a == b != c and found(tmp_path / "a", "torch")[1] == a
    as_before, now = found(None)
    assert now == as_before != a


def test_a_configuration_read_back_is_the_same_run():
    """YAML gives the numbers of data.label_map back as text."""
    config = plain("data=synapse")
    config["data"]["label_map"] = dict.fromkeys(range(14), 0)
    back = yaml.safe_load(yaml.safe_dump(config))
    back["data"]["label_map"] = {str(number): 0 for number in range(14)}
    assert of(back) == of(config)


# ---- run folders of an earlier version -----------------------------------------------------------


@pytest.fixture
def small(small_run):
    """words -> the `Run` of a small run, with nothing done yet."""
    return partial(built, *small_run, "model=unet", "trainer=cpu")


def old_folder(run, name="0123abcd", **changes):
    """A finished folder beside that of a run, as an earlier version would have made it."""
    readable = run.folder.path.name.removesuffix(run.key)
    folder = RunFolder(run.folder.path.with_name(readable + name))
    folder.start(key=name, design="x", data={"fingerprint": run.data.fingerprint},
                 split={"hash": run.data.split.hash}, val_dice=0.25)  # fmt: skip
    config = OmegaConf.load(OLD)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    folder.write_text("config.yaml", OmegaConf.to_yaml(config))
    folder.write_json("metrics.json", {})
    folder.finish("done")
    return folder


def test_of_older_folders_of_a_run_the_tested_one_is_it(tmp_path):
    data = {"fingerprint": "f"}
    for number, started in (("1", "2026-01-01"), ("2", "2026-01-02")):
        folder = RunFolder(tmp_path / f"unet-acdc-seed1-0000000{number}")
        folder.start(rule=RULE, key="abcd0123", design="", data=data)
        folder.update(status="done", started=started)
    (tmp_path / "unet-acdc-seed1-00000001" / "metrics.json").write_text("{}")
    found = same_run(tmp_path / "unet-acdc-seed1-abcd0123", "abcd0123")
    assert found.name == "unet-acdc-seed1-00000001"  # the other one was never tested


def test_an_older_folder_is_the_same_run(small):
    old = old_folder(small())
    run = small()
    assert run.folder.path == old.path and run.finished
    with run:
        assert run.score == 0.25
    assert small("rerun=true").folder.path != old.path
    assert small("evaluation.batch_size=3").finished
    assert not small("optim.optimizer.lr=0.5").finished


def test_an_older_folder_with_another_monitor_is_another_run(small):
    words = ["callbacks.checkpoint.monitor=val/hd95_mm"]
    old = old_folder(small(), callbacks__checkpoint__monitor="val/hd95_mm",
                     callbacks__checkpoint__mode="min")  # fmt: skip
    assert small().folder.path != old.path and small(*words).folder.path == old.path
    with small(*words) as run:
        assert run.score == 0.25  # under the name of that time


def test_of_several_older_folders_the_finished_one_is_taken(small):
    run = small()
    begun = old_folder(run, "00000001", evaluation__batch_size=3)
    begun.update(status="running")
    done = old_folder(run, "00000000")
    assert small().folder.path == done.path


def test_damaged_folders_beside_a_run_are_passed_over(small):
    run = small()
    path = run.folder.path
    for number, (name, text) in enumerate((("config.yaml", "[1"), ("run.json", "{"))):
        folder = old_folder(run, f"0000000{number}")
        (folder.path / name).write_text(text)
    assert small().folder.path == path


def test_the_record_of_a_run_says_by_which_rule_it_is_named(small):
    run = small()
    with pytest.raises(RuntimeError), run:
        raise RuntimeError
    record = run.folder.record
    assert (record["rule"], record["key"]) == (RULE, run.key) and record["weights"] == {}
    assert monitor_of(yaml.safe_load((run.folder.path / "config.yaml").read_text())) == "val/dice"


def test_reports_group_by_the_same_rule():
    new, old = plain("data=acdc", "model=mamba_unet"), plain("data=acdc", "model=mamba_unet")
    old["model"]["scan_backend"], old["evaluation"]["batch_size"] = "triton", 8
    assert scientific(new) == scientific(old)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["callbacks.checkpoint.monitor=val/dcie"], "did you mean val/dice"),
        (["callbacks.checkpoint.monitor=val/hd95_vox"], "val/hd95_mm"),
        (["callbacks.checkpoint.monitor=train/loss"], "callbacks.checkpoint.monitor=train/loss"),
        (["callbacks.checkpoint.monitor=null"], "callbacks.checkpoint.monitor=null"),
        ([f"+callbacks.e={EARLY}", "callbacks.e.monitor=val/typo"], "callbacks.e.monitor=val/typo"),
        (["~callbacks.checkpoint"], "callbacks.checkpoint: it is missing"),
        (["callbacks.checkpoint=null"], "callbacks.checkpoint: it is missing"),
        (["+callbacks.second={_target_: mambaseg.training.checkpoints.Checkpoints, "
          "folder: '${run_dir}/checkpoints', monitor: val/dice}"], "are two of them"),
        (["callbacks.checkpoint.folder=/elsewhere"], "callbacks.checkpoint.folder"),
        (["+callbacks.m._target_=lightning.pytorch.callbacks.ModelCheckpoint"], "callbacks.m"),
        (["+callbacks.s={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, "
          "swa_lrs: 0.1}"], "callbacks=ema"),
        (["+callbacks.g={_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, "
          "scheduling: {0: 2}}"], "trainer.accumulate_grad_batches"),
    ],
)  # fmt: skip
def test_callbacks_that_cannot_do_what_they_say_are_refused_before_anything_is_written(
    small, tmp_path, words, said
):
    with pytest.raises(UserError) as error:
        words = [word if word.startswith(("+", "~")) else f"++{word}" for word in words]
        small(*words)
    assert said in str(error.value)
    assert not list(tmp_path.rglob("run.json"))


def test_the_way_a_monitor_is_better_is_filled_in(small, caplog):
    run = small("callbacks.checkpoint.monitor=val/hd95_mm", f"+callbacks.e={EARLY}")
    callbacks = run.config["callbacks"]
    assert (callbacks["checkpoint"]["mode"], callbacks["e"]["mode"]) == ("min", "max")
    assert small().config["callbacks"]["checkpoint"]["mode"] == "max"
    assert "chooses the worst" not in caplog.text
    small("callbacks.checkpoint.mode=min")
    assert "callbacks.checkpoint.mode=min: more val/dice is better" in caplog.text


def test_where_an_encoder_begins_counts_only_if_it_learns_in_another_way():
    config = OmegaConf.to_container(composed("model=segresnet"), resolve=False)
    slower = {**config, "optim": {**config["optim"], "layer_decay": 0.5}}
    key = "model.encoder_parts"
    assert of(with_another(config, key)) == of(config)
    assert of(with_another(slower, key)) != of(slower) != of(config)


SWIN = ["model=swin_unet", "model.embed_dim=24", "model.depths=[1,1,1,1]"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("words", "another"),
    [
        ([*UNET, *DDP], True),
        ([*UNET, *DDP, "trainer.sync_batchnorm=true"], False),
        ([*UNET, *DDP, "trainer.devices=1"], False),
        ([*UNET, "trainer=cpu", "trainer.devices=2"], True),
        ([*SWIN, *DDP], False),
        ([*SWIN, *DDP, "method=cross_teaching", "data.labelled=2"], True),  # its partner is a UNet
    ],
)
def test_batch_norms_of_each_device_make_another_run(small_run, words, another):
    """They see a share of the batch, so that the weights differ by more than rounding."""
    run = built(*small_run, *words)
    alone = built(*small_run, *words, "trainer.devices=1")
    assert (run.key != alone.key) == another == ("batch_norms" in run.config)
    assert "batch_norms" not in alone.config


def test_each_number_of_devices_with_own_batch_norms_is_a_run(small_run):
    keys = {built(*small_run, *UNET, *DDP, f"trainer.devices={count}").key for count in (1, 2, 4)}
    assert len(keys) == 3


def test_what_a_repeated_sweep_may_change_makes_no_other_run():
    """`sweeps` lists a job under the overrides without these, as it leads to the same run."""
    assert {*_SAME_RUN} <= _LEFT_OUT
