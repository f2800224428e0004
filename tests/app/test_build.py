"""From a configuration to a run folder, in process."""

import csv
import json

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from mambaseg.app.check import checked
from mambaseg.app.devices import no_graph
from mambaseg.app.networks import require_channels
from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from runs import UNET, built, composed, trained


@pytest.fixture(scope="module")
def run(shared_run):
    """One finished run; tests only read it."""
    return trained("model=unet", *shared_run)


def test_a_run_leaves_everything_in_its_folder(run):
    folder = run.folder.path
    assert folder.parent.name == "default"
    assert folder.name == f"unet-phantom-seed1337-{run.key}"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "run.json", "train.log", "metrics.csv", "cases.csv", "metrics.json",
        "overlays.npz", "checkpoints", "figures",
    }  # fmt: skip
    assert {path.name for path in folder.glob("checkpoints/*")} == {"best.ckpt", "last.ckpt"}
    assert len(list(folder.glob("figures/*.png"))) == 3
    record = run.folder.record
    assert record["status"] == "done" and record["parameters"] == 1_813_764
    cost = record["cost"]
    assert cost["image"] == [1, 32, 32] and cost["macs"] > 1e6 and cost["scan_flops"] == 0
    assert cost["seconds_per_case"] > 0 and cost["peak_memory_bytes"] > 0
    assert record["split"]["hash"] == run.data.split.hash
    assert record["data"]["fingerprint"] == run.data.fingerprint
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["size"] == 32
    assert record["data"]["title"] == "synthetic phantom, not ACDC"
    assert (folder / "train.log").is_file()


def test_summary_is_the_mean_of_the_cases(run):
    with (run.folder.path / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    tested = set(run.data.split.test)
    assert {row["patient"] for row in rows} == tested
    assert len(rows) == len(tested) * 2 * 4  # two phases, four classes
    summary = json.loads((run.folder.path / "metrics.json").read_text())
    means = []
    for name in ("RV", "MYO", "LV"):
        values = [float(r["dice"]) for r in rows if r["class_name"] == name]
        means.append(sum(values) / len(values))
        assert summary["classes"][name]["dice"]["mean"] == pytest.approx(means[-1])
    assert summary["foreground"]["dice"]["mean"] == pytest.approx(sum(means) / 3)
    assert summary["data"] == "synthetic phantom, not ACDC"
    assert summary["preprocessing"]["name"] == "paper"


def test_last_checkpoint_is_the_true_last_state_and_best_the_best(run):
    last, best = (
        torch.load(run.folder.path / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for name in ("last", "best")
    )
    assert last["global_step"] == 4
    assert best["global_step"] in (2, 4)
    tested = run.task.state_dict()
    assert all(torch.equal(best["state_dict"][k], tested[k]) for k in tested)


def test_a_checkpoint_describes_itself_with_plain_data(run):
    checkpoint = torch.load(run.folder.path / "checkpoints" / "best.ckpt", weights_only=True)
    about = checkpoint["mambaseg"]
    assert about["model"]["name"] == "unet"
    assert about["model"]["arguments"]["num_classes"] == 4
    assert about["preprocessing"] == Preprocessing("paper", 32).describe()
    assert about["classes"] == ["background", "RV", "MYO", "LV"]
    assert about["split"]["hash"] == run.data.split.hash
    assert "_target_" not in json.dumps(about)


def test_the_score_for_a_sweeper_is_the_best_validation_dice(run):
    with (run.folder.path / "metrics.csv").open() as stream:
        values = [float(r["val/dice"]) for r in csv.DictReader(stream) if r["val/dice"]]
    assert len(values) == 2 and run.score == pytest.approx(max(values))


def test_the_same_configuration_returns_the_finished_result(small_run):
    small_run = [*small_run, "data.steps=2"]
    first = trained("model=unet", *small_run)
    marker = (first.folder.path / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = trained("model=unet", *small_run, "data.num_workers=0", "trainer=cpu")
    assert again.finished and again.score == first.score
    assert again.folder.path == first.folder.path
    assert (again.folder.path / "checkpoints" / "last.ckpt").stat().st_mtime_ns == marker
    repeated = trained("model=unet", *small_run, "rerun=true")
    assert not repeated.finished and repeated.score == first.score  # same seed, same machine


def test_another_seed_is_another_run_on_the_same_split(run, shared_run):
    first, second = run, built("model=unet", *shared_run, "seed=7")
    assert first.folder.path != second.folder.path
    assert len({first.plan, second.plan}) == 2 and first.plan != second.plan
    assert built("model=unet", *shared_run).plan == first.plan
    assert first.config["trainer"]["precision"] != "auto"
    assert first.data.split == second.data.split


def test_a_failed_run_keeps_its_error(small_run, monkeypatch):
    from mambaseg.training.segmentation import SegmentationTask

    def broken(self, batch, index):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(SegmentationTask, "training_step", broken)
    with (
        pytest.raises(ZeroDivisionError),
        built("model=unet", *small_run) as run,
    ):
        run.fit()
    record = run.folder.record
    assert record["status"] == "failed" and "on purpose" in record["error"]


def test_accumulated_batches_keep_the_global_batch(small_run):
    run = trained("model=unet", *small_run, "trainer.accumulate_grad_batches=2", "test=false")
    assert run.trainer.global_step == 4
    with (run.folder.path / "metrics.csv").open() as stream:
        steps = {int(r["step"]) for r in csv.DictReader(stream) if r["val/dice"]}
    assert steps == {1, 3}  # validation counts optimizer steps, not micro-batches


def test_float16_is_refused_for_a_network_with_a_scan(small_run):
    with pytest.raises(UserError, match="bf16-mixed or 32-true"):
        built("model=mamba_unet", "trainer.precision=16-mixed", *small_run)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "16"])
def test_float16_on_the_cpu_which_lightning_makes_bfloat16_is_refused(precision, small_run):
    words = ["model=unet", "trainer=cpu", f"trainer.precision={precision}"]
    with pytest.raises(UserError, match=f"precision={precision}: float16 needs a GPU"):
        built(*words, *small_run)


def test_gradients_are_clipped_although_the_recipe_has_a_fused_optimizer(small_run):
    words = ["trainer=cpu", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1"]
    run = trained("model=unet", *small_run, *words, "data.steps=1", "data.val_every=1")
    assert run.config["optim"]["optimizer"]["fused"] is False


def test_a_network_of_bfloat16_trains_and_is_scored_on_data_that_are_not_rounded(small_run):
    words = ("model=mamba_unet", "model.embed_dim=16", "model.depths=[1,1,1,1]")
    words += ("data.steps=1", "data.val_every=1", "data.batch_size=2")
    run = trained(*small_run, *words, "trainer.precision=bf16-true")
    parameters = dict(run.task.network.named_parameters())
    narrow = {name for name, p in parameters.items() if p.dtype == torch.bfloat16}
    exact = {name for name in parameters if name.endswith(("A_logs", "Ds", "dt_projs_bias"))}
    assert exact and narrow == parameters.keys() - exact
    assert run.folder.finished
    assert run.config["trainer"]["precision"] == "bf16-true"


def test_the_budget_cannot_be_set_in_two_places(small_run):
    with pytest.raises(UserError, match=r"data\.steps"):
        checked(composed("+trainer.max_steps=7", *small_run), "config")


def test_a_gpu_that_is_not_there_is_refused(small_run):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="trainer=cpu"):
        built("trainer=gpu", *small_run)


def test_graphs_without_a_gpu_are_left_out_with_the_reason_and_change_no_identity(
    small_run, caplog
):
    plain = built("model=unet", "trainer=cpu", *small_run)
    graphed = built("model=unet", "trainer=cpu", "trainer.graph=true", *small_run)
    assert "trainer.graph=true: CUDA graphs need an NVIDIA GPU" in caplog.text
    assert graphed.key == plain.key
    assert graphed.config["trainer"]["graph"] is False


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["trainer.devices=2"], "one device"),
        (["trainer.accumulate_grad_batches=2"], "overwrites its gradients"),
        ([], ""),
    ],
)
def test_graphs_are_refused_where_they_would_be_wrong(words, reason):
    cfg = composed("model=unet", "trainer=gpu", "trainer.graph=true", *words)
    why = no_graph(cfg, gpu=True)
    assert reason in why and bool(why) == bool(reason)


def backbone_weights(network):
    """What an ImageNet backbone of this shape would hold, under the published key names."""
    weights = {}
    for key, value in network.state_dict().items():
        for theirs, ours in network.backbone_names().items():
            if key.startswith(ours):
                name = theirs + key.removeprefix(ours)
                for their_part, our_part in network.original_parts.items():
                    name = name.replace(our_part, their_part)
                weights[name] = torch.full_like(value, 0.125)
    return weights


def test_pretrained_weights_are_reported_in_the_log_and_the_record(small_run, tmp_path, caplog):
    from mambaseg.models import MambaUNet

    tiny = MambaUNet(embed_dim=12, depths=(1, 1, 1, 1))
    path = tmp_path / "backbone.pth"
    torch.save({"model": backbone_weights(tiny)}, path)
    caplog.set_level("INFO")
    words = ["model=mamba_unet", "model.embed_dim=12", "model.depths=[1,1,1,1]", "logger=csv"]
    with built(*words, f"model.pretrained={path}", *small_run) as run:
        network = run.task.network.network
    report = run.folder.record["pretrained"]
    assert report["path"] == str(path) and report["parameters"]["loaded"] > 0
    assert report["mirrored"] and not report["mismatched"]
    assert "loaded into the encoder" in caplog.text
    loaded = network.encoder[0].blocks[0].ss2d.in_proj.weight
    mirrored = network.decoder[-1].blocks[0].ss2d.in_proj.weight
    assert (loaded == 0.125).all() and (mirrored == 0.125).all()
    assert not (network.head.weight == 0.125).any()


@pytest.mark.parametrize("word", ["data.name=my:data", f"data.class_names=[a,b,c,{'d' * 101}]"])
def test_a_name_that_no_command_could_read_again_is_refused_before_the_first_step(small_run, word):
    with pytest.raises(
        UserError, match=r"could read a checkpoint of this run, for its (data|class)"
    ):
        trained(*small_run, *UNET, word, "test=false")


@pytest.mark.parametrize(("words", "said"), [
    (["model.dropout=[2,0]"], r"mambaseg\.models\.UNet: rate of a Dropout must lie in \[0, 1\)"),
    (["loss=dice_focal", "+loss.reduction=most"], r"monai\.losses\.DiceFocalLoss: 'most' is not"),
])  # fmt: skip
def test_a_value_that_a_class_refuses_is_told_with_its_class(small_run, words, said):
    with pytest.raises(UserError, match=said):
        trained(*small_run, *UNET, *words)


def test_a_network_for_other_channels_than_the_images_have_is_refused(small_run):
    said = r"model\.in_channels=3 \(model={}\): the images of data=phantom have {} channels\. Leave"
    with pytest.raises(UserError, match=said.format("unet", 1)):
        built(*small_run, *UNET, "model.in_channels=3")
    with pytest.raises(UserError, match=said.format("unet", 5)):
        built(*small_run, *UNET, "model.in_channels=3", "data.neighbours=2")


def test_partners_are_asked_for_their_channels_too_but_no_networks_of_other_projects():
    cfg = {"data": {"name": "acdc", "in_channels": 1}, "model": {"_target_": "my_nets.Coloured"}}
    cfg["model"] |= {"name": "mine", "in_channels": 3}
    require_channels(OmegaConf.create(cfg | {"method": None}))
    partner = {"name": "yours", "_target_": "monai.networks.nets.UNet", "in_channels": 3}
    with pytest.raises(UserError, match=r"model\.in_channels=3 \(model=yours\)"):
        require_channels(OmegaConf.create(cfg | {"method": {"networks": [partner]}}))


def test_a_schedule_that_divides_by_zero_at_its_end_is_refused(small_run):
    with pytest.raises(UserError, match=r"optim\.scheduler\.power=-1: must be 0 or more"):
        built(*small_run, *UNET, "optim.scheduler.power=-1")


@pytest.mark.parametrize("word", ["data.name=my/data", "model.name=a/b", f"data.name={'d' * 200}"])
def test_a_name_that_no_folder_can_have_is_refused_before_there_is_one(small_run, tmp_path, word):
    with pytest.raises(UserError, match=r"no name for a run folder. Give model\.name, data\.name"):
        trained(*small_run, *UNET, word)
    assert not (tmp_path / "outputs").exists()


def test_a_schedule_that_waits_for_a_score_is_refused_before_there_is_a_folder(small_run, tmp_path):
    words = ["optim.scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau",
             "~optim.scheduler.total_iters", "~optim.scheduler.power"]  # fmt: skip
    with pytest.raises(UserError, match=r"optim\.scheduler\._target_=.*ReduceLROnPlateau: .*step"):
        trained(*small_run, *UNET, *words)
    assert not list(tmp_path.rglob("run.json"))


def test_an_optimizer_that_runs_the_network_itself_is_refused(small_run, tmp_path):
    words = ["optim.optimizer._target_=torch.optim.LBFGS", "~optim.optimizer.momentum",
             "~optim.optimizer.weight_decay", "~optim.optimizer.fused"]  # fmt: skip
    with pytest.raises(UserError, match=r"optim\.optimizer\._target_=torch\.optim\.LBFGS: it runs"):
        trained(*small_run, *UNET, *words)
    assert not list(tmp_path.rglob("run.json"))


def test_on_a_gpu_partners_and_teachers_are_laid_out_like_the_network(small_run, monkeypatch):
    """Of a network whose weights stay as they are on a CPU."""
    monkeypatch.setattr("mambaseg.app.build.device_type", lambda *_: "cuda")
    words = ["model=segresnet", "method=mean_teacher", "data.labelled=2", "trainer.devices=1"]
    with built(*small_run, *words) as run:
        weights = [one for one in run.task.parameters() if one.ndim == 4]
        teacher = [one for one in run.task.method.parameters() if one.ndim == 4]
        assert len(weights) > len(list(run.task.network.parameters())) // 4 and teacher
        last = torch.channels_last
        assert all(one.is_contiguous(memory_format=last) for one in (*weights, *teacher))


@pytest.fixture
def parent(small_run):
    """Words of a training that starts from another one, and that one's weights."""
    run = trained(*small_run, *UNET, "data.steps=1", "data.val_every=1", "test=false")
    return [*small_run, *UNET, f"init_from={run.folder.path}"], run.task.network.state_dict()


@pytest.mark.parametrize("named", ["newest", "{outputs}/default/unet*", "{outputs}/default"])
def test_a_start_that_is_another_run_tomorrow_is_refused_with_the_one_to_type(
    named, small_run, parent, tmp_path
):
    """Each job of a sweep would find it anew, and a repeated command the result of the first."""
    named, path = named.format(outputs=tmp_path / "outputs"), parent[0][-1].partition("=")[2]
    for more in ([], ["data.minutes=1"]):  # whose trial has outputs of its own
        with pytest.raises(UserError) as error:
            built(*small_run, *UNET, f"init_from={named}", *more)
        assert f"use init_from={path}" in str(error.value)


def test_a_partner_starts_from_its_own_weights_and_a_random_encoder_is_not_frozen(parent, caplog):
    """Two networks of the same weights would teach each other nothing."""
    words, weights = parent
    words += ["method=cps", "method.partner=unet", "data.labelled=2", "optim.freeze_encoder=2"]
    with built(*words, "test=false") as run:
        one, other = run.task.method.networks
        run.task.configure_optimizers()
        frozen = {id(parameter) for parameter in run.task._encoders}
    assert "init_from fills model=unet alone" in caplog.text and "method.partner" in caplog.text
    key = "network.encoder.0.0.weight"
    assert torch.equal(one.state_dict()[key], weights[key])
    assert not torch.equal(other.state_dict()[key], weights[key])
    assert id(one.get_parameter(key)) in frozen and id(other.get_parameter(key)) not in frozen


def test_without_given_weights_the_encoders_of_all_networks_wait(small_run):
    words = ["method=cps", "method.partner=unet", "data.labelled=2", "optim.freeze_encoder=2"]
    with built(*small_run, *UNET, *words, "test=false") as run:
        run.task.configure_optimizers()
        frozen = {id(parameter) for parameter in run.task._encoders}
        own = [one.get_parameter("network.encoder.0.0.weight") for one in run.task.method.networks]
    assert {id(parameter) for parameter in own} <= frozen
