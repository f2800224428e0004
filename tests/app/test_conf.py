"""Every config of every group composes, and what it describes can be built."""

from pathlib import Path

import pytest
import torch
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import mambaseg.app.build  # noqa: F401  # registers what the configuration asks of the machine
from mambaseg.app.check import CONF, check_targets, checked, plain_tree
from mambaseg.app.schema import NAMED
from mambaseg.training.checks import require_logits
from mambaseg.training.losses import taken_label
from runs import composed
from small_networks import NAMES, ZOO, full_network
from tiny_nnunet import write_nnunet

GROUPS = ("model", "data", "augmentation", "loss", "optim", "trainer", "callbacks", "logger",
          "metric", "experiment")  # fmt: skip
CONFIGS = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
          for group in (*GROUPS, "optim/own")}  # fmt: skip


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS for name in CONFIGS[group]], ids=str
)
def test_every_config_composes_fits_the_schema_and_resolves(group, name, tmp_path):
    words = ["data=phantom"] * (group not in ("data", "experiment")) + [f"{group}={name}"]
    if name == "nnunet":  # it asks the data set what it is
        words.append(f"data.root={write_nnunet(tmp_path / 'Dataset001_Tiny')}")
    cfg = composed(*words)
    fitting = checked(cfg, "config", words)
    empty = {name: {} for name in NAMED}  # where nothing is chosen
    assert plain_tree(fitting) == {**empty, **plain_tree(cfg)}
    if name not in ZOO:
        check_targets(fitting)
    cfg.run_dir = str(tmp_path)  # filled in by the run, as names are
    for logger in cfg.logger.values():
        if logger and OmegaConf.is_missing(logger, "name"):
            logger.name = "x"
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert resolved["data"]["steps"] > 0 and "minutes" in resolved["data"]


@pytest.mark.parametrize("name", NAMES)
def test_every_network_takes_any_size_and_gives_logits_as_it_begins(name):
    changes = {"grid": 16} if name == "uvm_net" else {}  # 64 takes as long as ten other networks
    with torch.no_grad():
        logits = full_network(name, **changes).train()(torch.rand(2, 1, 45, 70))
    label = torch.zeros(2, 45, 70, dtype=torch.long)
    require_logits(logits, label, num_classes=4, network=name)


@pytest.mark.parametrize("name", CONFIGS["model"])
def test_a_model_config_holds_a_network_and_carries_its_own_name(name):
    cfg = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    assert cfg.name == name and cfg.get("pretrained") is None
    assert not {"optimizer", "lr", "loss", "batch_size", "size"} & set(cfg)


@pytest.mark.parametrize("name", CONFIGS["loss"])
def test_every_loss_gives_a_scalar_with_a_gradient(name):
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    truth = torch.rand(2, 4, 8, 8) if name == "l1" else torch.randint(4, (2, 8, 8))
    function = instantiate(composed(f"loss={name}", "data.regions={heart: [1, 2, 3]}").loss)
    loss = function(logits, taken_label(function, truth))
    loss.backward()
    assert loss.shape == () and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("name", CONFIGS["optim"])
def test_every_optimizer_follows_its_schedule_down_to_zero(name):
    cfg = composed("data=phantom", "data.steps=5", f"optim={name}").optim
    optimizer = instantiate(cfg.optimizer)([{"params": [torch.nn.Parameter(torch.ones(1))]}])
    schedule = instantiate(cfg.scheduler)(optimizer)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    first = cfg.optimizer.lr
    assert rates == pytest.approx([first * (1 - k / 5) ** 0.9 for k in range(5)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


RECIPES = [path for path in sorted((CONF / "optim").rglob("*.yaml")) if "scheduler:" in
           path.read_text()]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_rate_of_an_optimizer_is_the_highest_of_its_schedule(path):
    cfg = OmegaConf.create({"data": {"steps": 200}, "optim": OmegaConf.load(path)})
    assert cfg.optim.optimizer.lr != 0.5
    cfg.optim.optimizer.lr = 0.5
    optimizer = instantiate(cfg.optim.optimizer)([torch.nn.Parameter(torch.ones(1))])
    schedule = instantiate(cfg.optim.scheduler)(optimizer)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.5)


def test_paper_experiment_is_the_published_protocol():
    cfg = composed("experiment=acdc_paper")
    assert (cfg.data.size, cfg.data.batch_size, cfg.data.steps, cfg.data.val_every) == (
        224, 24, 10_000, 200,
    )  # fmt: skip
    sgd = cfg.optim.optimizer
    assert (sgd.lr, sgd.momentum, sgd.weight_decay) == (0.01, 0.9, 1e-4)
    assert cfg.optim.decay == "all" and cfg.optim.scheduler.power == 0.9
    assert (cfg.loss.ce_weight, cfg.loss.dice_weight) == (0.5, 0.5)
    assert (cfg.seed, cfg.data.split, cfg.data.preprocessing) == (1337, "ssl4mis", "paper")
    assert cfg.callbacks.checkpoint.monitor == "val/dice" and cfg.name == "acdc_paper"


def test_cpu_experiment_differs_from_the_paper_in_its_budget_only():
    paper = OmegaConf.to_container(composed("experiment=acdc_paper"), resolve=True)
    cpu = OmegaConf.to_container(composed("experiment=acdc_cpu"), resolve=True)
    budget = {"size": 128, "batch_size": 12, "steps": 1500, "val_every": 150}
    paper["data"].update(budget)
    paper["optim"]["scheduler"]["total_iters"] = 1500
    for part in ("data", "optim", "loss", "model", "trainer", "callbacks", "evaluation"):
        assert cpu[part] == paper[part]


@pytest.mark.parametrize(
    ("name", "method", "partners", "batch", "seed"),
    [
        ("acdc_semi_paper", "semi_mamba_unet", ["mamba_unet"], 16, 1337),
        ("promise12_semi_paper", "semi_mamba_unet", ["mamba_unet"], 16, 1337),
        ("acdc_scribble_paper", "weak_mamba_unet", ["mamba_unet", "swin_unet"], 24, 2022),
    ],
)
def test_experiments_with_few_labels_are_the_published_protocols(
    name, method, partners, batch, seed
):
    cfg = composed(f"experiment={name}")
    assert (cfg.model.name, cfg.method.name, cfg.method.partner) == ("unet", method, partners)
    data = cfg.data
    assert (data.size, data.batch_size, data.steps, data.val_every) == (224, batch, 30_000, 200)
    sgd = cfg.optim.optimizer
    assert (sgd.lr, sgd.momentum, sgd.weight_decay) == (0.01, 0.9, 1e-4)
    assert (cfg.seed, cfg.name) == (seed, name)


@pytest.mark.parametrize("kind", ["semi", "scribble"])
def test_small_experiments_with_few_labels_differ_in_their_budget_only(kind):
    paper = composed(f"experiment=acdc_{kind}_paper", "method=dmpls", "optim=adamw")
    cpu = composed(f"experiment=acdc_cpu_{kind}", "method=dmpls")
    for key in ("size", "batch_size", "steps", "val_every", "split"):
        paper.data[key] = cpu.data[key]
    for part in ("data", "optim", "loss", "model", "method", "trainer", "evaluation", "seed"):
        assert cpu[part] == paper[part], part


def test_the_experiment_on_the_phantom_takes_any_network():
    assert composed("experiment=phantom_semi").model.widths == [8, 16, 32, 64]
    assert composed("experiment=phantom_semi", "model.widths=[4,8]").model.widths == [4, 8]
    assert composed("experiment=phantom_semi", "model=mamba_unet").model.name == "mamba_unet"


def test_a_methods_partners_are_the_published_networks_that_the_first_is_not():
    def partners(method, model):
        return composed(f"method={method}", f"model={model}").method.partner

    assert partners("cross_teaching", "unet") == ["swin_unet"]
    assert partners("cross_teaching", "swin_unet") == ["unet"]
    assert partners("semi_mamba_unet", "vm_unet") == ["unet"]
    assert partners("weak_mamba_unet", "unet") == ["mamba_unet", "swin_unet"]
    assert partners("weak_mamba_unet", "mamba_unet") == ["swin_unet", "unet"]


def test_recipes_are_of_networks():
    assert CONFIGS["optim/own"] == CONFIGS["model"]


@pytest.fixture(scope="module")
def paper():
    return composed("experiment=acdc_paper", "data.steps=200")


@pytest.mark.parametrize("name", CONFIGS["model"])
def test_each_network_has_its_authors_recipe_and_one_budget(name, paper):
    words = ["experiment=acdc_own_recipe", f"model={name}", "data.steps=200"]
    cfg = composed(*words)
    fitting = checked(cfg, "config", words)
    if name not in ZOO:
        check_targets(fitting)
    assert plain_tree(cfg.model) == plain_tree(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    assert (cfg.data, cfg.loss, cfg.seed) == (paper.data, paper.loss, paper.seed)
    assert (CONF / "optim" / "own" / f"{name}.yaml").read_text().startswith("# ")  # its source
    optimizer = instantiate(cfg.optim.optimizer)([torch.nn.Parameter(torch.ones(1))])
    schedule = instantiate(cfg.optim.scheduler)(optimizer)
    rates = []
    for _ in range(cfg.data.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(cfg.optim.optimizer.lr)
    if "ConstantLR" not in cfg.optim.scheduler._target_:
        assert 0 < rates[-1] < 0.02 * max(rates)  # the whole schedule fits into the budget


def test_recipes_are_the_published_ones():
    def recipe(name):
        cfg = composed("experiment=acdc_own_recipe", f"model={name}").optim
        rule = instantiate(cfg.optimizer)([torch.nn.Parameter(torch.ones(1))])
        kind, group = type(rule).__name__, rule.param_groups[0]
        return kind, group["lr"], group["weight_decay"], cfg.scheduler._target_.split(".")[-1]

    assert recipe("mamba_unet") == ("SGD", 1e-2, 1e-4, "PolynomialLR")
    assert recipe("swin_unet") == ("SGD", 5e-2, 1e-4, "PolynomialLR")
    assert recipe("trans_unet") == ("SGD", 1e-2, 1e-4, "PolynomialLR")
    assert recipe("nnunet_2d") == ("SGD", 1e-2, 3e-5, "PolynomialLR")
    assert recipe("mednext_s") == ("AdamW", 1e-3, 3e-5, "PolynomialLR")
    nnunet = composed("experiment=acdc_own_recipe", "model=nnunet_2d").optim.optimizer
    assert nnunet.nesterov and nnunet.momentum == 0.99


def test_a_network_without_a_recipe_is_refused_by_the_name_of_the_missing_file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "new_net.yaml").write_text("name: new_net\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    assert composed(search, "model=new_net").model.name == "new_net"
    with pytest.raises(MissingConfigException, match="optim/own/new_net"):
        composed(search, "experiment=acdc_own_recipe", "model=new_net")
    assert composed(search, "experiment=acdc_own_recipe", "model=new_net", "optim=sgd")


@pytest.mark.parametrize(("script", "below"), [("config", "/default"), ("benchmark", "")])
def test_a_sweep_keeps_its_files_in_the_home_folder_that_outputs_names(script, below):
    words = ["outputs='~/runs'", *["what=scan"] * (script == "benchmark")]
    cfg = composed(*words, script=script, hydra=True)
    assert cfg.hydra.sweep.dir == f"{Path.home()}/runs{below}"


def test_experiment_values_can_be_overridden():
    cfg = composed("experiment=acdc_cpu", "optim=adamw", "model=unet", "data.size=96")
    assert "AdamW" in cfg.optim.optimizer._target_
    assert (cfg.model.name, cfg.data.size) == ("unet", 96)


def test_default_data_are_acdc_where_found_and_the_phantom_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACDC_ROOT", raising=False)
    assert composed().data.name == "phantom"
    (tmp_path / "data" / "ACDC").mkdir(parents=True)
    assert composed().data.name == "acdc"
    monkeypatch.setenv("ACDC_ROOT", str(tmp_path / "absent"))
    assert composed().data.name == "acdc"  # a wrong path is an error, not synthetic data
    monkeypatch.setenv("ACDC_ROOT", str(tmp_path))
    assert composed().data.name == "acdc"
    assert Path(composed().data.root) == tmp_path
    assert composed("data=phantom").data.name == "phantom"


def test_acdc_experiments_never_fall_back(tmp_path, monkeypatch):
    monkeypatch.setenv("ACDC_ROOT", str(tmp_path / "absent"))
    for experiment in sorted((CONF / "experiment").glob("acdc_*.yaml")):
        assert composed(f"experiment={experiment.stem}").data.name == "acdc"
