"""docs/models.md says what the configs and the code say."""

import pytest
import torch
from omegaconf import OmegaConf

from mambaseg.app.entry import CONF
from mambaseg.app.networks import build_network
from mambaseg.evaluation.costs import count_operations
from runs import composed
from small_networks import ZOO
from tables import EXACT, HEADERS, networks_page, read_header

PAGE = CONF.parent / "docs" / "models.md"
NETWORKS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
# MONAI's Swin UNETR looks at values while it is built: it has to be there
NOT_WITHOUT_MEMORY = ("swin_unetr",)
REMEDY = "run `make models`"


def config_of(name):
    return (CONF / "model" / f"{name}.yaml").read_text("utf-8")


def cells(columns, row):
    return f"| {' | '.join(column.cell(row) for column in columns)} |"


def costs(name, size):
    """Parameters and operations of a network at full width, without computing anything."""
    data = {"in_channels": 1, "num_classes": 4}
    config = OmegaConf.create({"data": data, "model": OmegaConf.load(CONF / f"model/{name}.yaml")})
    with torch.device("cpu" if name in NOT_WITHOUT_MEMORY else "meta"):
        network, _ = build_network(config.model)
        operations = count_operations(network, torch.rand(1, 1, size, size))
    parameters = sum(p.numel() for p in network.parameters())
    multiple = network.multiples[0]
    return {"network": name, "parameters": parameters, "size_multiple": multiple, **operations}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_rows_are_those_of_its_config_and_code(name):
    lines = PAGE.read_text("utf-8").splitlines()
    assert cells(HEADERS, read_header(name, config_of(name))) in lines, REMEDY
    if name in ZOO:
        pytest.skip("needs the extra zoo")
    exact = cells(EXACT, costs(name, size=224))
    assert sum(line.startswith(exact) for line in lines) == 1, f"{REMEDY}: {exact}"


def test_the_page_has_no_other_networks():
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(2 * NETWORKS), REMEDY


def test_the_numbers_are_those_that_are_published():
    lines = PAGE.read_text("utf-8").splitlines()
    for name, parameters, macs in [
        ("unet", "1,813,764", "2.258"),
        ("swin_unet", "27,168,420", "6.086"),
        ("mamba_unet", "19,121,664", "4.447"),
        ("trans_unet", "105,276,356", "29.190"),
        ("vm_unet", "27,427,636", "4.053"),
    ]:
        (row,) = [line for line in lines if line.startswith(f"| `{name}` | {parameters} |")]
        assert f" {macs} |" in row


def test_the_quick_start_gives_all_networks_the_same_steps():
    heavy = {path.stem for path in (CONF / "model" / "quick").glob("*.yaml")}
    assert {"uvm_net"} <= heavy <= set(NETWORKS)
    for name in (*heavy, "mednext_l", "mamba_unet"):
        config = composed("experiment=quickstart", f"model={name}")
        assert (config.data.steps, config.data.val_every) == (300, 100)
    assert composed("experiment=quickstart", "model=uvm_net").model.grid == 16


def test_a_config_without_its_comment_says_what_belongs_there():
    with pytest.raises(ValueError, match="summary, Source:, Differs:"):
        read_header("unet", "# A network.\nname: unet\n")


def test_the_page_says_how_its_time_was_measured():
    row = {**costs("unet", size=32), "median_s": 0.0123, "step_s": 0.0456}
    configs = {"unet": config_of("unet")}
    record = {
        "rows": [row], "settings": {"size": 32, "repeats": 5}, "command": "COMMAND",
        "device": "cpu", "precision": "32-true", "started": "2026-01-02T00:00",
        "versions": {"torch": "2.13", "numba": "0.60"},
        "hardware": {"gpus": [], "cpu": "a CPU", "threads": 2},
        "instructions": {"torch": "AVX2", "numba": "AVX-512"},
    }  # fmt: skip
    text = networks_page(record, configs)
    assert f"{cells(EXACT, row)} 12 | 46 |" in text and "32 × 32 pixels" in text
    measured = (
        "`COMMAND`: a CPU, threads: 2, 32-true, instruction sets: torch AVX2, numba AVX-512; "
    )
    measured += "torch 2.13, numba 0.60, 2026-01-02."
    assert measured in text.replace("\n", " ") and "median of 5 calls" in text
