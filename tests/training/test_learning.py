"""Trainings with few labels: every method by its config, resumed exactly, used like any network."""

import contextlib
import copy
import csv
import json
import math
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

import ranks
from frozen_norms import freeze
from mambaseg.app.check import checked
from mambaseg.app.ensemble import restore_predictor
from mambaseg.app.entry import CONF
from mambaseg.app.networks import restore_network
from mambaseg.data.batches import TwoStreams
from mambaseg.data.classes import IGNORED
from mambaseg.data.labelling import labelled_patients
from mambaseg.data.phantoms.synthetic import NOTE
from mambaseg.data.seen import fingerprint_of
from mambaseg.data.splits import make_split
from mambaseg.errors import UserError
from mambaseg.inference.bundle import write_bundle
from mambaseg.inference.trained import read_checkpoint
from mambaseg.reporting.reading import read_run
from mambaseg.training.nonfinite import NonFinite
from mambaseg.training.overview import overview
from mambaseg.training.segmentation import SegmentationTask
from mambaseg.training.task import Task
from runs import QUIET, UNET, assert_same, built, composed, entered, state_of, trained
from typed import ROOT, typed

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
PARTNERS = {
    "cps": "unet", "cross_teaching": "unet", "weak_mamba_unet": "[unet, unet]",
    "semi_mamba_unet": "ultralight_vm_unet",
}  # fmt: skip


def words_of(method):
    partner = [f"method.partner={PARTNERS[method]}"] if method in PARTNERS else []
    network = ["model=unet", "model.widths=[4,4,8,8,8]"] if method == "urpc" else UNET
    small = ["method.width=4"] if method == "deep_adversarial" else []
    if method == "scribble2label":
        sure = ["method.every=2", "method.start=0", "method.threshold=0.06"]
        return [f"method={method}", *UNET, "data.labels=scribble", "loss=partial_ce", *sure]
    loss = ["loss=partial_ce"] if method == "partial_ce" else []
    return [f"method={method}", *partner, *small, *loss, "data.labelled=2", *network]


def copied_before(step, monkeypatch, outputs):
    """Lets the training leave a copy of its run folder when a step begins, as if killed there.

    The list that it returns gets the batch of that step.
    """
    whole, batches = SegmentationTask.training_step, []

    def training_step(self, batch, index):
        if batch["step"] == step:
            folder = Path(self.trainer.default_root_dir)
            shutil.copytree(folder, outputs / "default" / folder.name)
            batches.append(batch)
        return whole(self, batch, index)

    monkeypatch.setattr(SegmentationTask, "training_step", training_step)
    return batches


@pytest.mark.parametrize("method", [*METHODS, "deep_adversarial callbacks=ema"])
def test_a_method_resumes_exactly_and_trains_in_bfloat16(method, small_run, monkeypatch, tmp_path):
    method, *more = method.split()
    words = [*small_run, *words_of(method), *more, "test=false"]
    words.append(f"model.dropout={[0.1, 0.2] if 'model.widths=[4,8]' in words else [0.1] * 5}")
    with monkeypatch.context() as patch:
        batches = copied_before(3, patch, tmp_path / "killed")
        undisturbed = trained(*words, *QUIET)
    resumed = trained(*words, *QUIET, f"outputs={tmp_path / 'killed'}")
    assert [pause["step"] for pause in resumed.folder.record["resumed"]] == [2]
    assert_same(state_of(undisturbed), state_of(resumed))

    task, (batch,) = resumed.task.train(), batches
    exact = task.training_loss(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = task.training_loss(batch)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)
    rounded.backward()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_what_is_logged_of_a_step_is_the_mean_of_its_micro_batches(small_run, monkeypatch):
    whole, seen = Task.training_loss, []

    def training_loss(self, batch):
        loss = whole(self, batch)
        seen.append({"loss": float(loss.detach()), **self._terms})
        return loss

    monkeypatch.setattr(Task, "training_loss", training_loss)
    words = [*small_run, *words_of("entropy"), "data.batch_size=8", "data.steps=2", "test=false"]
    more = ["trainer.accumulate_grad_batches=4", "trainer.log_every_n_steps=1", "trainer=cpu"]
    run = trained(*words, *more)
    rows = list(csv.DictReader((run.folder.path / "metrics.csv").open()))
    assert len(seen) == 8
    for name in ("loss", "supervised", "entropy"):
        logged = [float(row[f"train/{name}"]) for row in rows if row[f"train/{name}"]]
        means = [sum(float(one[name]) for one in seen[at : at + 4]) / 4 for at in (0, 4)]
        assert logged == pytest.approx(means, rel=1e-5), name


def test_two_processes_learn_what_one_does(small_run, tmp_path):
    """Pairs, masks, sums, teachers and a discriminator of the whole batch, of every method."""
    words = [*small_run, "data.batch_size=8", "data.steps=2", "trainer=cpu", "loss=dice_ce"]
    more = {"scribble2label": ["method.every=1"], "fixmatch": ["method.threshold=0.3"]}
    more["ict"] = ["model.dropout=[0.1,0.2]"]  # what is dropped in a mix is its place's
    trainings = {name: [*words, *words_of(name), *more.get(name, [])] for name in METHODS}
    torch.multiprocessing.spawn(ranks.learn, (2, trainings, tmp_path), nprocs=2)
    ranks.learn(0, 1, trainings, tmp_path)
    for method in METHODS:
        alone, one, other = (torch.load(tmp_path / f"{method}.{rank}.pt", weights_only=True)
                             for rank in ("0of1", "0of2", "1of2"))  # fmt: skip
        assert all(term > 0 for term in alone.pop("largest").values()), method
        del one["largest"], other["largest"]  # of their shares
        assert_same(one, other, method)
        for name, value in alone.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(
                    one[name], value, rtol=1e-13, atol=1e-14, msg=f"{method} {name}"
                )


@pytest.mark.timeout(600)
def test_ddp_trains_a_method_with_a_network_of_its_own(small_run, tmp_path, monkeypatch):
    """Norms keep their statistics."""
    words = [*small_run, *UNET, "method=deep_adversarial", "data.labelled=2", "data.batch_size=8",
             "optim.optimizer.lr=0.1", "test=false"]  # fmt: skip
    done = typed(
        *words, *QUIET, "trainer=ddp", "trainer.accelerator=cpu", f"outputs={tmp_path / 'two'}",
        script=ROOT / "tests" / "helpers" / "frozen_norms.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(SegmentationTask, "on_train_batch_start", freeze, raising=False)
    alone = trained(*words, "trainer=cpu", f"outputs={tmp_path / 'one'}")
    (together,) = (tmp_path / "two" / "default").glob("unet-*-seed*")
    one, two = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
                for path in (alone.folder.path, together))  # fmt: skip
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_the_network_that_validates_best_is_the_result(small_run, monkeypatch):
    whole = SegmentationTask.values

    def values(self, stage, summary):
        found = whole(self, stage, summary)
        if stage == "val":  # the second network's scores come second
            monkeypatch.setattr(self, "told", getattr(self, "told", 0) + 1, raising=False)
            found["val/dice"] = 0.1 * self.told
        return found

    monkeypatch.setattr(SegmentationTask, "values", values)
    run = trained(*small_run, *words_of("cps"))
    summary = json.loads((run.folder.path / "metrics.json").read_text())
    assert summary["network"] == "unet_2" and list(summary["networks"]) == ["unet_1", "unet_2"]
    assert summary["foreground"] == summary["networks"]["unet_2"]["foreground"]
    assert (run.folder.path / "cases_unet_1.csv").is_file()
    header = (run.folder.path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/unet_1/dice", "val/unet_2/dice", "train/pseudo_1"} <= {*header}
    assert "-cps-seed" in run.folder.path.name
    patients = len({case.patient for case in run.data.cases["train"]})
    assert summary["supervision"] == {"labelled": 2, "patients": patients, "labels": "dense"}
    cost, (own, other) = run.folder.record["cost"], map(count, run.task.method.networks)
    assert (cost["parameters"], cost["method"]["parameters"]) == (other, own + other)
    assert cost["method"]["macs"] > cost["macs"] > 0
    told = read_run(run.folder.path)
    assert (told.chosen, told.model, told.method) == ("unet_2", "unet_1 + unet_2", "cps")
    checkpoint = read_checkpoint(run.folder.path)
    widths = checkpoint.about["model"]["arguments"]["widths"]
    assert widths == [4, 8]  # the partner is the same UNet as the model
    network, _ = restore_network(run.folder.path)
    bundle = write_bundle(network, checkpoint, run.folder.path / "bundle")
    ensemble = restore_predictor([run.folder.path, bundle], device="cpu")  # as predict and demo
    expected = run.task.method.partners[0].state_dict()
    for one in (network, *(member.network for member in ensemble.members)):
        assert_same(dict(one.state_dict()), dict(expected))
    monkeypatch.undo()
    again = trained(f"checkpoint={bundle}", *small_run, script="evaluate")
    assert (again.folder.path / "cases.csv").read_text() == (
        run.folder.path / "cases.csv"
    ).read_text()
    assert read_run(again.folder.path).supervision == told.supervision == f"2 of {patients}"


def acdc(small_run, root):
    """The overrides for a changed copy of the phantom, which must not be taken for the phantom."""
    (root / NOTE).unlink()
    own = [word for word in small_run if not word.startswith(("data=", "data.root", "data.prep"))]
    return ["data=acdc", f"data.root={root}", "data.split=random", *own]


def test_labels_of_unlabelled_cases_are_never_read(small_run, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(next(w for w in small_run if w.startswith("data.root="))[10:], root)
    words = [*acdc(small_run, root), "data.labelled=2", *UNET]
    plain = built(*words)
    kept = {c.patient for part in ("val", "test") for c in plain.data.cases[part]}
    kept |= {case.patient for case in plain.data.cases["train"] if case.labelled}
    poisoned = [path for path in root.rglob("*_gt.nii.gz") if path.parent.name not in kept]
    assert poisoned
    for path in poisoned:
        path.write_bytes(b"poison")
    run = trained(*words, "method=mean_teacher", f"data.cache_dir={tmp_path / 'cache'}")
    assert run.folder.record["status"] == "done"
    assert run.folder.record["labelled"] == sorted(kept & {*run.data.split.train})
    said = overview(run.config, run.folder.record)["data"]
    assert said.endswith(", labels of 4 of 10 training cases")
    numbers = [run.data.cache.position(c.id) for c in run.data.cases["train"] if not c.labelled]
    assert numbers and all((run.data.cache.label(n) == IGNORED).all() for n in numbers)


def test_images_that_never_had_a_label_train_too(small_run, tmp_path):
    more, words = tmp_path / "more", [*small_run, *UNET, "test=false"]
    image = cine = np.random.default_rng(0).random((40, 44, 3, 2), np.float32)  # of two frames
    for name in ("a", "b/c"):
        (more / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(image, np.diag([1.5, 1.5, 8, 1])), more / f"{name}.nii")
        image = image[..., :1]
    unlabelled = f"data.unlabelled_images={more}"
    run = trained(*words, "method=mean_teacher", unlabelled)
    assert run.data.counts["train"]["cases"] - run.data.counts["train"]["labelled"] == 2
    assert len(run.data.cache.image(run.data.cache.position("unlabelled/a"))) == 6
    assert "2 further images without labels train." in run.data.split.note
    seen = {one for case in run.data.known("train") for one in case.prints}
    assert {fingerprint_of(cine[..., frame][:, None]) for frame in (0, 1)} < seen
    plain = trained(*words)
    assert plain.data.split.hash == run.data.split.hash
    assert plain.data.scored == run.data.scored and plain.data.fingerprint != run.data.fingerprint
    assert plain.key != run.key
    with pytest.raises(UserError, match=r"unlabelled_images: method=supervised learns from labels"):
        built(*words, unlabelled)

    tested = run.data.cases["test"][0]
    cine = tested.image_path.with_name(f"{tested.patient}_4d.nii.gz")
    with pytest.raises(UserError, match=f"{tested.patient}_4d shows the same as {tested.patient}"):
        built(*words, "method=mean_teacher", f"data.unlabelled_images={cine}")
    shutil.copy(tested.image_path, more / "copy.nii.gz")
    with pytest.raises(UserError, match=f"copy shows the same as {tested.patient}"):
        built(*words, "method=mean_teacher", unlabelled)
    with pytest.raises(UserError, match=r"data\.unlabelled_images: there is no file or folder"):
        built(*words, "method=mean_teacher", f"{unlabelled}/nowhere")


def test_the_published_patients_have_the_labels(tmp_path):
    split = make_split("ssl4mis", [f"patient{n:03d}" for n in range(1, 101)])
    three, seven = labelled_patients(split, 3), labelled_patients(split, 7)
    assert three == ("patient038", "patient050", "patient099") and {*three} < {*seven}
    four = labelled_patients(split, 4)
    assert {*four} < {*labelled_patients(split, 0.2)} < {*split.train}
    assert labelled_patients(split, ["patient003"]) == ("patient003",)
    for wrong in (0, 71, 1.5, math.nan, ["patient001"], "7"):
        with pytest.raises(UserError, match=r"data\.labelled"):
            labelled_patients(split, wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=mean_teacher"], "say whose, such as data.labelled=7"),
        (["method=cps", "method.partner=[]", "data.labelled=2"], "trains two or more"),
        (["method=cps", "method.partner=[nothing]", "data.labelled=2"], "no conf/model/nothing"),
        (["method=dmpls", "model=segresnet"], "needs the decoder of a UNet"),
        (["method=mean_teacher", "data.labelled=2", "data.batch_size=5"], "multiple of 2"),
        (["data.ignore_label=2"], "stands for no class"),
    ],
)
def test_what_a_method_lacks_is_said_before_anything_is_trained(words, message, small_run):
    own = () if any(word.startswith("model=") for word in words) else UNET
    with pytest.raises((UserError, InstantiationException), match=message):
        trained(*small_run, *own, *words)


def test_two_streams_give_each_micro_batch_both_halves():
    options = {"labelled": 5, "batch_size": 8, "steps": 7, "seed": 3}
    whole = list(TwoStreams(17, **options))
    parts = [
        list(TwoStreams(17, **options, rank=rank, world_size=2, accumulate=2)) for rank in (0, 1)
    ]
    for step, batch in enumerate(whole):
        assert all((draw.item < 5) == (place < 4) for place, draw in enumerate(batch))
        together = [d for part in parts for micro in part[2 * step : 2 * step + 2] for d in micro]
        assert sorted(together) == sorted(batch)
        assert [len(micro) for part in parts for micro in part] == [2] * 28
    seen = [draw.item for batch in whole for draw in batch[4:]]
    assert len({*seen[:12]}) == 12  # a permutation of all without labels


def test_ignored_pixels_are_neither_learnt_nor_scored(small_run, phantom_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(phantom_root, root)
    for path in root.rglob("*_gt.nii.gz"):
        image = nibabel.load(path)
        label = np.asarray(image.dataobj).astype(np.uint8)
        label[:, ::2] = 9
        nibabel.save(nibabel.Nifti1Image(label, image.affine, image.header), path)
    words = [*acdc(small_run, root), *UNET, f"data.cache_dir={tmp_path / 'cache'}"]
    run = trained(*words, "data.ignore_label=9", "augmentation=none")
    assert run.task.loss.partial and run.data.augmentation.beyond == IGNORED
    data = built(*words, "data.ignore_label=9", "rerun=true").data
    batch = data.transfer_batch_to_device(
        next(iter(data.train_dataloader())), torch.device("cpu"), 0
    )
    values = set(data.on_after_batch_transfer(batch, 0)["label"].unique().tolist())
    assert IGNORED in values and values <= {0, 1, 2, 3, IGNORED}
    voxels = sum(sum(entry.class_voxels) for entry in data.cache.entries)
    assert 0.4 < voxels / data.cache.entries[-1].stop < 0.6
    assert run.folder.record["counts"]["train"]["labelled in part"] == len(run.data.cases["train"])
    note = json.loads((run.folder.path / "metrics.json").read_text())["split"]["note"]
    assert "6 of 6 validation and test cases" in note and "scores leave them out" in note
    with np.load(run.folder.path / "overlays.npz") as kept:
        assert all((kept[key] == IGNORED).any() for key in kept if key.endswith("/truth"))
    with pytest.raises(UserError, match="cannot leave out pixels"):
        trained(*words, "data.ignore_label=9", "loss=dice_focal")


def test_the_phantom_has_scribbles_to_learn_from(small_run):
    run = trained(*small_run, *UNET, "data.labels=scribble", "method=dmpls", "loss=partial_ce")
    train = [run.data.cache.position(case.id) for case in run.data.cases["train"]]
    labels = [run.data.cache.label(number) for number in train]
    assert all(0.9 < (label == IGNORED).mean() < 1 for label in labels)
    assert "Training reads scribbles" in run.data.split.note
    assert "validation and test cases" not in run.data.split.note  # they are dense
    assert overview(run.config, run.folder.record)["data"].endswith(", scribbles")


def test_the_runs_monitor_chooses_among_the_networks(small_run, monkeypatch):
    """By distance, where that chooses the best state: the first network is the nearest."""
    whole = SegmentationTask.values

    def values(self, stage, summary):
        found = whole(self, stage, summary)
        monkeypatch.setattr(self, "told", getattr(self, "told", 0) + 1, raising=False)
        return {**found, "val/dice": 0.1 * self.told, "val/hd95_mm": float(self.told)}

    monkeypatch.setattr(SegmentationTask, "values", values)
    words = [*small_run, *words_of("cps"), "data.steps=2", "test=false"]
    for monitor, chosen in (("val/dice", 1), ("val/hd95_mm", 0)):
        run = trained(*words, f"callbacks.checkpoint.monitor={monitor}")
        assert run.task.chosen == chosen, monitor


@pytest.mark.parametrize("method", ["mean_teacher", "deep_adversarial"])
def test_nothing_follows_a_skipped_step(method, small_run, monkeypatch):
    """Teacher, discriminator and its optimizer are as if there had been no such step."""
    whole = Task.training_loss

    def training_loss(self, batch):
        return whole(self, batch) * (float("nan") if batch["step"] == 2 else 1)

    states = {}

    def on_train_batch_start(self, trainer, task, *_):
        states[trainer.global_step] = copy.deepcopy(task.method.state_dict())
        start(self, trainer, task, *_)

    start = NonFinite.on_train_batch_start
    monkeypatch.setattr(Task, "training_loss", training_loss)
    monkeypatch.setattr(NonFinite, "on_train_batch_start", on_train_batch_start)
    skip = "callbacks.nonfinite.on_nonfinite=skip"
    trained(*small_run, *words_of(method), skip, "data.steps=5", "test=false")
    assert_same(states[2], states[3])
    assert str(states[3]) != str(states[4])


def test_a_skipped_step_leaves_the_statistics_of_all_networks(small_run):
    run = built(*small_run, *words_of("cps"), "callbacks.nonfinite.on_nonfinite=skip")
    with run:
        callback = next(c for c in run.trainer.callbacks if isinstance(c, NonFinite))
        run.fit()
        kept = [buffer.data_ptr() for buffer in callback._buffers]
        for network in run.task.method.networks:
            norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            assert norms and all(norm.running_mean.data_ptr() in kept for norm in norms)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=mean_teacher", "trainer.precision=bf16-true"], "32-true or bf16-mixed"),
        (["method=deep_adversarial", "trainer.precision=bf16-true"], "32-true or bf16-mixed"),
        (["method=ict", "+method.noise=0.5"], "noise"),
        (["method=cps", "method.partner=nnunet_2d", "model=nnunet_2d", "loss=deep_supervision"],
         "model.deep_supervision=false"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_train_with_is_refused_with_its_remedy(words, said, small_run):
    network = [] if "model=nnunet_2d" in words else UNET
    with pytest.raises((UserError, InstantiationException), match=said):
        built(*small_run, *network, "trainer=cpu", "data.labelled=2", *words).__enter__()


@pytest.mark.parametrize(("loss", "right"), [
    ("loss=dice_ce", False), ("loss=boundary", False), ("loss=focal", False),
    ("loss=deep_supervision", False), ("loss=top_k loss.dice_weight=1", False),
    ("loss=partial_ce", True), ("loss=cross_entropy", True), ("loss=top_k", True),
    ("loss=deep_supervision loss@loss.loss=partial_ce", True),
])  # fmt: skip
def test_partial_ce_takes_cross_entropy_alone(loss, right):
    words = ["data=phantom", "method=partial_ce", *loss.split()]
    said = "add loss=partial_ce, or choose method=supervised"
    with contextlib.nullcontext() if right else pytest.raises(UserError, match=said):
        checked(composed(*words), "config", words)
    cfg = composed(*words)
    if "dice_weight" in cfg.loss:
        OmegaConf.set_struct(cfg, False)
        del cfg.loss["dice_weight"]  # which then is the class's own, 0.5
        with pytest.raises(UserError, match=said):
            checked(cfg, "config", words)


def test_a_method_refuses_a_network_that_gives_several_outputs(small_run):
    words = ["method=mean_teacher", "data.labelled=2", "model=nnunet_2d", "data.size=64",
             "model.deep_supervision=true", "model.deep_supr_num=1", "model.filters=[4,8,8]",
             "model.strides=[1,2,2]", "model.kernel_size=[3,3,3]",
             "model.upsample_kernel_size=[2,2]", "model.size_multiple=4"]  # fmt: skip
    with pytest.raises(UserError, match=r"model\.deep_supervision=false"):
        trained(*small_run, *words, "trainer=cpu")


def test_a_discriminators_optimizer_follows_its_weights(small_run):
    """To another type here, as to another device: the optimizer is restored before they move."""
    with built(*small_run, *words_of("deep_adversarial"), "trainer=cpu") as run:
        method = run.task.method
        for parameter in method.discriminator.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.optimizer.step()
        method.set_extra_state(method.get_extra_state())
        method.discriminator.to(torch.float64)
        method.begin(None)
        kept = [one for own in method.optimizer.state.values() for key, one in own.items()
                if key != "step"]  # fmt: skip
        assert kept and {one.dtype for one in kept} == {torch.float64}


def test_a_partner_in_a_folder_of_configs_is_found_again(small_run, tmp_path):
    own = tmp_path / "conf" / "model" / "mine"
    own.mkdir(parents=True)
    text = (CONF / "model" / "unet.yaml").read_text().replace("name: unet", "name: deep")
    text = text.replace("[16, 32, 64, 128, 256]", "[4, 8]")
    (own / "deep.yaml").write_text(text.replace("[0.05, 0.1, 0.2, 0.3, 0.5]", "[0, 0]"))
    words = [*small_run, *UNET, "method=cps", "method.partner=mine/deep", "data.labelled=2",
             "trainer=cpu", "test=false", "name=own", *QUIET]  # fmt: skip
    assert entered("train.py", f"--config-dir={tmp_path / 'conf'}", *words) == 0
    (path,) = tmp_path.glob("**/checkpoints/best.ckpt")
    (partner,) = read_checkpoint(path).about["partners"]
    assert (partner["name"], partner["config"]) == ("deep", "mine/deep")
