"""No key that nobody reads, no value that cannot be: said at once, and nothing is written."""

from pathlib import Path

import pytest

import mambaseg.app.build  # noqa: F401  # registers what the configuration asks of the machine
from forked_commands import typed_all
from mambaseg.app.api import our_hydra
from mambaseg.app.check import CONF, check_targets, checked, keys_of
from mambaseg.app.overrides import arranged, jobs_of
from mambaseg.app.schema import TABLE, did_you_mean
from mambaseg.app.targets import check_target, fits
from mambaseg.errors import UserError
from runs import composed, entered

SCRIPTS = ("config", "evaluate", "predict", "export", "demo", "benchmark")


def looked_at(*words, script="config"):
    """Both steps."""
    cfg = checked(composed(*words, script=script), script, words)
    check_targets(cfg)
    return cfg


def refusal(*words, script="config", step=checked):
    with pytest.raises(UserError) as refused:
        if step is looked_at:
            looked_at(*words, script=script)
        checked(composed(*words, script=script), script, words)
    return str(refused.value)


# ---- the schema is of all configurations (`test_conf` looks at each) ---------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_value_of_a_script_has_a_kind(script):
    own, _ = keys_of(script)
    without = [key for key, value in own.items() if not isinstance(value, dict)]
    assert without and not [key for key in without if key not in TABLE]


def test_the_schema_has_no_row_of_a_key_that_is_gone():
    there = {key for script in SCRIPTS for key in keys_of(script)[0]}
    groups = {group for script in SCRIPTS for group in keys_of(script)[1]}
    assert [key for key in TABLE if key not in there and key.split(".")[0] not in groups] == []


# ---- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "meant"), [
    ("+optim.lr=0.1", "optim.optimizer.lr"),
    ("+lr=0.1", "optim.optimizer.lr"),
    ("+optim.optimiser.lr=0.1", "optim.optimizer"),
    ("+modle=mamba_unet", "model"),
    ("+steps=3", "data.steps"),
    ("+evaluation.tolerance=1", "evaluation.tolerance_mm"),
    ("+test.rerun=true", "rerun"),
])  # fmt: skip
def test_a_key_that_nobody_reads_is_refused_and_the_right_one_named(word, meant):
    words = ["~test", word] if "test." in word else [word]
    said = refusal("data=phantom", *words)
    assert said.startswith(f"there is no {word[1:].split('=')[0]}"[:20])
    assert said.endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_takes_what_another_one_reads(script):
    own, groups = keys_of(script)
    others = {"ensemble", "tolerance", "what", "max_mib", "references"}
    words = ["data=phantom"] * ("data" in groups)
    for key in others - set(own) - set(groups):
        assert f"there is no {key}" in refusal(*words, f"+{key}=1", script=script)


@pytest.mark.parametrize(("word", "said"), [
    ("+data.stepz=3", "did you mean data.steps?"),
    ("+data.patient_pattern=x", "there is no data.patient_pattern"),
    ("+data.longest_side=512", "there is no data.longest_side"),
    ("data.find_cases=null", "data.find_cases=null: must be a mapping with a _target_"),
    ("~trainer.accelerator", "trainer.accelerator was removed"),
    ("+trainer.limit_predict_batches=0", "must be a whole number, 1 or more or a number above 0"),
    ("+trainer.max_tim=00:01:00:00", "did you mean trainer.max_time?"),
    ("+optim.optimizer.nestrov=true", "did you mean optim.optimizer.nesterov?"),
    ("+loss.smoth=1", "did you mean loss.smooth?"),
    ("+model.mirror_encoder=true", "there is no model.mirror_encoder"),
    ("+data.prepare.patient=3", "did you mean data.prepare.patients?"),
    ("+callbacks.early.monitor=val/dice", "callbacks.early: must be a mapping with a _target_"),
    ("+callbacks.early=3", "callbacks.early=3: must be"),
    ("+callbacks.early._target_=nowhere.Early", "cannot be imported"),
    ("+callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping", "monitor is missing"),
    ("~trainer._target_", "trainer: must be a mapping with a _target_"),
    ("loss._target_=3", "loss: must be a mapping with a _target_"),
    ("~seed", "seed was removed"),
    ("~evaluation", "evaluation was removed"),
    ("~loss", "loss: nothing is chosen"),
    ("logger.wandb.mode=offlin", "must be one of online, offline, disabled"),
    ("run_dir=here", "run_dir=here: a run names its folder itself; set outputs and name"),
    ("trainer.log_every_n_steps=abc", "trainer.log_every_n_steps=abc: must be"),
    ("+trainer.max_epochs=3", "set data.steps"),
    ("+trainer.plugins=foo", "must be left out; mambaseg sets them"),
    ("+trainer.use_distributed_sampler=true", "must be left out; each process"),
    ("+trainer.gradient_clip_algorithm=foo", "must be one of norm, value"),
])  # fmt: skip
def test_what_a_target_does_not_take_is_refused(word, said):
    assert said in refusal("data=phantom", "model=unet", word, step=looked_at)


@pytest.mark.parametrize("words", [
    ["+trainer.max_time=00:01:00:00"],
    ["+optim.optimizer.nesterov=true"],
    ["optim.scheduler=null"],
    ["+callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/dice}"],
    ["+callbacks.mine._target_=my_callbacks.Mine", "+callbacks.mine.often=3"],
    ["callbacks.progress=null"],
    ["~callbacks.rate"],
    ["logger=none"],
    ["trainer.devices=[0,1]"],
    ["+trainer.limit_val_batches=0.5"],
    ["data.label_map={0: 0, 1: 3, 2: 2, 3: 1}"],
    ["optim=adamw", "+optim.optimizer.betas=[0.9, 0.99]"],
    ["model=segresnet", "+model.act=PRELU"],
    ["name=${oc.env:A_NAME}"],
    ["experiment=[quickstart,phantom_semi]"],
])  # fmt: skip
def test_what_can_be_added_still_can(words, tmp_path, monkeypatch):
    (tmp_path / "my_callbacks.py").write_text(
        "class Mine:\n    def __init__(self, often: int, **rest): self.often = often\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("A_NAME", "5")
    assert looked_at("data=phantom", *words)


def test_a_name_may_come_from_a_number():
    assert checked(composed("name=${seed}", "seed=7"), "config").name == "7"


def test_an_experiment_of_the_user_is_checked_like_the_command_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\noptim: {lr: 0.1}\n")
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", "data=phantom"]
    assert "did you mean optim.optimizer.lr?" in refusal(*words)
    mine.write_text("# @package _global_\nname: 2024\ndata: {steps: 1e4}\n")
    assert "data.steps=10000.0" in refusal(*words)
    mine.write_text("# @package _global_\noptim: {optimizer: {lr: 1e-4}}\n")  # text for PyYAML
    assert checked(composed(*words), "config", words).optim.optimizer.lr == 1e-4
    mine.write_text("# @package _global_\nname: 2024\n")
    assert checked(composed(*words), "config", words).name == "2024"


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [
    "seed=abc", "seed=-1", "seed=1.5", "seed=true", "seed=4294967296", "seed=null", "seed=[1]",
    "data.steps=20.5", "data.steps=1e4", "data.steps=abc", "data.steps=0", "data.size=-3",
    "data.size=null", "data.batch_size='4'", "data.val_every=-1", "data.num_workers=-1",
    "data.class_names=[true,RV]", "data.class_names=RV", "data.on_device=1", "data.synthetic=1",
    "data.root=null", "data.title={}",
    "optim.optimizer.lr=-0.1", "optim.optimizer.lr=nan", "optim.optimizer.lr=inf",
    "optim.optimizer.lr=fast", "optim.optimizer.weight_decay=-1", "optim.decay=some",
    "evaluation.empty=none", "evaluation.tolerance_mm=0", "evaluation.keep_largest=1",
    "evaluation.batch_size=0", "rerun=yes", "test=1", "name=null", "name=''", "outputs=true",
    "trainer.precision=63", "trainer.precision=half", "trainer.accumulate_grad_batches=0",
    "trainer.gradient_clip_val=-1", "trainer.devices=0.5", "callbacks.checkpoint.mode=best",
    "callbacks.checkpoint.every=0", "callbacks.nonfinite.most_in_a_row=0", "model.d_state=0",
])  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_its_key(word):
    said = refusal("data=phantom", word)
    assert (said.startswith(word.partition("=")[0]) and "must be" in said) or "is missing" in said
    assert "\n" not in said


@pytest.mark.parametrize("word", [
    "model.embed_dim=abc", "model.depths=3", "model.depths=[2,a]", "model.drop_path_rate=null",
    "loss.ce_weight=abc", "optim.optimizer.fused=7", "callbacks.progress.refresh_rate=often",
    "callbacks.nonfinite.on_nonfinite=ignore", "callbacks.nonfinite.late=perhaps",
    "data.prepare.patients=many", "optim.scheduler.power=[1]", "optim.scheduler.power=inf",
])  # fmt: skip
def test_a_value_that_an_argument_does_not_take_is_refused_by_its_key(word):
    said = refusal("data=phantom", word, step=looked_at)
    assert said.startswith(word.partition("=")[0]) and " takes " in said


def test_a_loss_of_which_no_part_counts_is_refused():
    words = ["data=phantom", "loss.ce_weight=0", "loss.dice_weight=0"]
    assert refusal(*words).startswith("loss.ce_weight=0 loss.dice_weight=0: nothing would be")
    assert checked(composed(*words[:2]), "config")


def test_what_only_other_splits_read_is_refused_rather_than_another_run():
    assert "data.folds: it is for data.split=kfold, and the split is random" in refusal(
        "data=phantom", "data.folds=9"
    )
    assert "data.split_seed: it is for data.split=random or kfold or auto" in refusal(
        "data=acdc", "data.root=hearts", "+data.split_seed=1"
    )
    looked_at("data=phantom", "data.split=kfold", "data.folds=4", "+data.split_seed=1")
    looked_at("data=phantom", "+data.split_seed=1")


def test_values_are_as_the_schema_has_them():
    words = ["data=phantom", "name=2024", "trainer.precision=64", "evaluation.tolerance_mm=2"]
    cfg = checked(composed(*words), "config", words)
    assert cfg.name == "2024" and cfg.trainer.precision == "64-true"
    assert type(cfg.evaluation.tolerance_mm) is float
    for given, meant in (("16", "16-mixed"), ("bf16", "bf16-mixed"), ("32-true", "32-true")):
        cfg = checked(composed("data=phantom", f"trainer.precision={given}"), "config")
        assert cfg.trainer.precision == meant


def test_a_number_that_is_text_is_told_from_one(monkeypatch):
    monkeypatch.setenv("A_SEED", "5")
    assert refusal("data=phantom", "seed=${oc.env:A_SEED}").endswith("; '5' is text")


def test_what_must_be_said_is_asked_for():
    assert "output is missing" in refusal("run=x", "input=y", script="predict")
    assert "output is missing" in refusal("run=x", "input=y", "output=null", script="predict")
    assert "run is missing" in refusal(script="export")
    assert "data.root is missing" in refusal("data=nnunet")


@pytest.mark.parametrize(("value", "hint", "right"), [
    (1, int, True), (True, int, False), (1.5, int, False), (1, float, True), ("1", float, False),
    (None, int | None, True), ([1, 2], tuple[int, int], True), ([1], tuple[int, int], False),
    ([1, 2], tuple[int, ...], True), ([1, "a"], list[int], False), ("ab", list[str], False),
    ("x", Path, True), ({"_target_": "a.B"}, int, True),
])  # fmt: skip
def test_annotations_say_what_fits(value, hint, right):
    assert fits(value, hint) is right


def test_a_key_is_meant_whose_last_part_is_like_it():
    assert did_you_mean("device", {"seed", "trainer.devices"}) == "; did you mean trainer.devices?"


def test_nothing_is_meant_where_nothing_is_like_it():
    assert did_you_mean("zzz", {"seed", "data.root"}) == ""


# ---- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("typed", "meant"), [
    ("name=2024", "name='2024'"),
    ("name=1e3", "name='1e3'"),
    ("name=true", "name='true'"),
    ("name=null", "name=null"),
    ("run=a=b", "run='a=b'"),
    ("run=a,b", "run='a,b'"),
    ("run=a b", "run=a b"),
    ("run=~/ü", "run='~/ü'"),
    ("run='a=b'", "run='a=b'"),
    ('run="a=b"', 'run="a=b"'),
    ("data.root=it's", r"data.root='it\'s'"),
    ("+data.root=a=b", "+data.root='a=b'"),
    ("ensemble=[a=1,b ü]", "ensemble=['a=1','b ü']"),
    ("ensemble=['a=1, (b)', ü]", "ensemble=['a=1, (b)','ü']"),
    ("input=scans/p[12]_*.nii.gz", "input='scans/p[12]_*.nii.gz'"),
    ("seed=1,2", "seed=1,2"),
    ("data.root=${oc.env:HOME}", "data.root=${oc.env:HOME}"),
])  # fmt: skip
def test_text_is_taken_as_it_is_typed(typed, meant):
    assert arranged([typed]) == ([], [meant])
    assert arranged([meant]) == ([], [meant])  # processes of DDP repeat the words


def test_sweeps_of_text_stay_sweeps_and_options_may_stand_anywhere():
    words = ["model=unet", "-m", "name=a,b", "--config-dir", "x=y", "seed=1,2"]
    options, overrides = arranged(words)
    assert options == ["-m", "--config-dir", "x=y"]
    assert overrides == ["model=unet", "name=a,b", "seed=1,2"]


def test_every_swept_value_is_in_a_job():
    jobs = list(
        jobs_of(["model=a,b", "seed=range(3)", "name=x", "optim.optimizer.lr=interval(0,1)"])
    )
    assert [job[1:] for job in jobs] == [
        ["model=a", "seed=0"], ["model=b", "seed=0"], ["model=a", "seed=1"], ["model=a", "seed=2"],
    ]  # fmt: skip


# ---- folders ------------------------------------------------------------------------------------


def test_the_phantom_takes_another_root_only_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("ACDC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert "data=acdc" in refusal("data.root=my_acdc")
    assert "data=acdc" in refusal("experiment=quickstart", "data.root=my_acdc")
    assert "data=acdc" in refusal("experiment=dehazing", "++data.root=photos")
    words = ["data=phantom", "data.root=my_phantom"]
    assert checked(composed(*words), "config", words).data.root == "my_phantom"
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndata: {root: my_acdc}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert "data=acdc" in refusal(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")


@pytest.mark.parametrize("words", [
    ["data=acdc", "data.root=.", "data.cache_dir=../cache"],
    ["data=acdc", "data.root=hearts", "data.cache_dir=hearts"],
    ["data=folder", "data.root=hearts", "outputs=hearts/outputs"],
    ["data=haze", "data.root=link", "outputs=hearts/runs"],
])  # fmt: skip
def test_nothing_is_written_into_a_folder_that_is_read(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hearts").mkdir()
    (tmp_path / "link").symlink_to("hearts")
    assert "where nothing is written" in refusal(*words)


# ---- whole commands -----------------------------------------------------------------------------


MISTAKES = [
    (["train", "optim.lr=0.1"], "there is no optim.lr; did you mean optim.optimizer.lr?"),
    (["train", "+optim.lr=0.1"], "there is no optim.lr; did you mean optim.optimizer.lr?"),
    (["train", "modle=unet"], "there is no modle; did you mean model?"),
    (["train", "model=mamba_unte"], "conf/model/mamba_unte.yaml; did you mean mamba_unet?"),
    (["train", "model=vgg"], "there is no conf/model/vgg.yaml"),
    (["train", "data=heart", "--config-dir", "mine"], "heart.yml is not read: rename it"),
    (["train", "data=null"], "data=null: one config must be chosen"),
    (["train", "-m", "--cfg", "job"], "Only one of --run, --multirun, --cfg"),
    (["train", "--resolve"], "--resolve flag can only be used in conjunction with --cfg"),
    (["train", "~data.size"], "data.size was removed, but is needed"),
    (["train", "~optim.scheduler"], "optim.scheduler was removed, but is needed"),
    (["train", f"name={'a' * 201}"], "too long for a folder; 200 bytes at most"),
    (["train", "+trainer.limit_test_batches=2"], "would bear the name of all"),
    (["train", "+trainer.overfit_batches=1"], "must be left out; choose debug=overfit"),
    (["train", "-m", "seed=interval(1,3)"], "add hparams_search=optuna, or list the values"),
    (["train", "model=unet,swin_unet"], "several values. To sweep over them, add -m"),
    (["train", "logger=csv,wandb"], "to take them together, write logger=[csv,wandb]"),
    (["train", "model=[unet,swin_unet]"], "sweep over them: -m model=unet,swin_unet"),
    (["train", "-m", "loss=[dice_ce,cross_entropy]", "seed=1,2"], "one config of conf/loss"),
    (["train", "seed=("], "cannot be read as key=value"),
    (["train", "data.root=my_acdc"], "name the data set"),
    (["train", "logger.mine=3"], "+logger.mine._target_=..."),
    (["train", "evaluation.empty=none"], "evaluation.empty=none: must be one of"),
    (["train", "-m", "model=glob(zz*)"], "model=glob(zz*): holds no value, or fits no config"),
    (["train", "-m", "seed=range(3,1)"], "seed=range(3,1): holds no value"),
    (["train", "name=../elsewhere"], "name=../elsewhere: a folder below outputs"),
    (["train", "-m", "name=/elsewhere", "seed=1,2"], "name=/elsewhere: a folder below outputs"),
    (["train", "-m", "optim.lr=0.1,0.2"], "there is no optim.lr; did you mean optim.optimizer.lr?"),
    (["train", "-m", "+optim.lr=0.1,1"], "there is no optim.lr; did you mean optim.optimizer.lr?"),
    (["train", "model=unet", "-m", "seed=1,abc"], "seed=abc: must be a whole number"),
    (["train", "-m", "model=unet,mamba_unte"], "did you mean mamba_unet?"),
    (["evaluate", "+optim.lr=0.1"], "there is no optim.lr"),
    (["predict", "run=a=b", "input=ü"], "output is missing"),
    (["predict", "-m", "run=a", "input=b", "output=c", "tta=1,2"], "tta=1: must be"),
    (["export", "run=a", "+tta=true"], "there is no tta"),
    (["demo", "run=a", "+input=b"], "there is no input"),
    (["train", "data=acdc"], "data/ACDC: this folder does not exist"),
    (["train", "-m", "data=acdc", "seed=1,2"], "data/ACDC: this folder does not exist"),
    (["train", "experiment=acdc_paper"], "To try without it: data=phantom"),
    (["train", "data=folder", "data.root=absent"], "absent: this folder does not exist"),
    (["predict", "run=absent", "input=x.nii.gz", "output=labels"], "checkpoint or bundle absent"),
    (["evaluate", "run=absent"], "or bundle absent"),
    (["predict", "run='a,b'", "input=x.nii.gz", "output=labels"], "several go into ensemble="),
    (["export", "run=absent/best.ckpt"], "or bundle absent/best.ckpt"),
    (["report", "absent"], "absent"),
]  # fmt: skip
ONLY_A_TARGET_KNOWS = [
    (["train", "data=phantom", "init_from=absent"], "init_from=absent: there is no run folder"),
    (["train", "-m", "data=phantom", "model.embed_dim=96,abc"], "model.embed_dim=abc"),
    (["train", "-m", "data=phantom,haze", "++data.fold=1"], "there is no data.fold"),
    (["train", "trainer.max_time=00:01:00:00"], "add it with +trainer.max_time=..."),
    (["benchmark", "scan", "sizee=3"], "there is no sizee"),
]  # fmt: skip
TARGETS = ["mambaseg.training.run", "mambaseg.models"]  # and torch, which each would import itself
HELP = ["train", "evaluate", "predict", "export", "demo", "benchmark"]


def typed(place, commands, *imported):
    """What became of commands, and what they left in their folders."""
    numbered = {str(number): words for number, words in enumerate(commands)}
    for number, words in numbered.items():
        (place / number).mkdir()
        if "mine" in words:
            (place / number / "mine" / "data").mkdir(parents=True)
            (place / number / "mine" / "data" / "heart.yml").write_text("defaults: [acdc]\n")
    done = typed_all(numbered, place, *imported)
    return {
        " ".join(words): {
            **done[number],
            "left": [path.name for path in (place / number).iterdir()],
        }
        for number, words in numbered.items()
    }


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    return typed(tmp_path_factory.mktemp("typed"), [words for words, _ in MISTAKES])


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    commands = [words for words, _ in ONLY_A_TARGET_KNOWS] + [[script, "--help"] for script in HELP]
    return typed(tmp_path_factory.mktemp("typed"), commands, *TARGETS)


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_a_mistake_is_answered_before_torch_is_imported_and_leaves_nothing(words, said, mistaken):
    done = mistaken[" ".join(words)]
    assert done["code"] == 1 and not done["torch"]
    assert said in done["error"] and "Traceback" not in done["error"]
    assert done["left"] == ["mine"] * ("mine" in words)


@pytest.mark.parametrize(("words", "said"), ONLY_A_TARGET_KNOWS)
def test_what_only_a_target_knows_leaves_nothing_either(words, said, others):
    done = others[" ".join(words)]
    assert done["code"] == 1 and said in done["error"] and "Traceback" not in done["error"]
    assert not done["left"]


@pytest.mark.parametrize("script", HELP)
def test_each_script_has_its_own_help(script, others):
    done = others[f"{script} --help"]
    said = done["out"]
    assert done["code"] == 0 and f"mambaseg {script}" in said
    assert said.count("\n      mambaseg ") == said.count(f"\n      mambaseg {script}")


def test_the_help_of_a_training_names_what_can_be_chosen(others):
    said = others["train --help"]["out"]
    for words in ("model: ", "mamba_unet", "experiment: ", "-m model=unet,swin_unet,mamba_unet"):
        assert words in said
    assert "Powered by Hydra" not in said


def test_a_target_that_has_moved_is_named_by_its_new_place():
    node = {"_target_": "mambaseg.losses.DiceCE"}
    with pytest.raises(UserError, match=r"it is mambaseg\.training\.losses\.DiceCE now"):
        check_target("loss", node, node)


def test_what_a_glob_of_a_sweep_means_is_looked_up():
    with our_hydra(None):
        jobs = list(jobs_of(["model=glob(mednext_*)", "seed=1"]))
    assert [job[-1] for job in jobs] == [f"model=mednext_{size}" for size in "blms"]


def test_a_config_of_ones_own_never_stands_behind_an_installed_one(tmp_path, capsys):
    (mine := tmp_path / "conf" / "model").mkdir(parents=True)
    words = ("model=unet", "data=phantom", "data.steps=0", f"outputs={tmp_path}")
    for content, said in (
        ((CONF / "model" / "unet.yaml").read_text(), "data.steps=0: must be"),  # the very same
        ("name: unet\n", f"{mine / 'unet.yaml'}: mambaseg has a config of this name too"),
    ):
        (mine / "unet.yaml").write_text(content)
        assert entered("train.py", f"--config-dir={mine.parent}", *words, cwd=tmp_path) == 1
        assert said in capsys.readouterr().err
