"""Encoders that learn later or more slowly than the rest of their network."""

from itertools import pairwise

import pytest
import torch

from mambaseg.errors import UserError
from mambaseg.models import AnySize, SwinUNet, encoder_depths
from mambaseg.training.parameters import parameter_groups
from mambaseg.training.segmentation import SegmentationTask
from runs import UNET, assert_same, small_overrides, stop_before, trained
from small_networks import NAMES, small_network


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_of_every_network_is_known(name):
    network = small_network(name)
    depths = encoder_depths(network)
    assert 0 < len(depths) < len(list(network.parameters()))
    assert set(depths.values()) == set(range(max(depths.values()) + 1)) and max(depths.values()) > 1
    assert not any("decoder" in key or "head" in key.split(".") for key in depths)


def test_layers_beside_a_list_of_stages_are_as_deep_as_their_stage():
    for name, twin, stage in (
        ("u_mamba_enc", "mamba_layers.2.norm.weight", "encoder.2."),
        ("ultralight_vm_unet", "encoder_norms.2.weight", "encoder.2."),
    ):
        depths = encoder_depths(small_network(name))
        at = {depth for key, depth in depths.items() if key.startswith(f"network.{stage}")}
        assert at == {depths[f"network.{twin}"]}


@pytest.mark.parametrize("name", ["swin_umamba", "swin_umamba_d"])
def test_what_no_file_of_weights_fills_learns_from_the_first_step(name):
    assert all(".encoder." in key for key in encoder_depths(small_network(name)))


def groups_of_two(network):
    return parameter_groups([network], "matrices")


def test_stages_of_an_encoder_learn_the_slower_the_further_they_are_from_the_decoder():
    network = AnySize(SwinUNet(embed_dim=12, heads=(1, 2, 2, 4)), 32)
    groups = parameter_groups([network], "matrices", [network], 0.5)
    found = {id(p): group.get("share", 1.0) for group in groups for p in group["params"]}
    assert sorted(found) == sorted(map(id, network.parameters()))
    shares = {name: found[id(p)] for name, p in network.named_parameters()}
    expected = {"patch_embed": 0.5**6, "encoder.0": 0.5**5, "encoder.3": 0.5**2,
                "bottom_norm": 0.5, "decoder": 1.0, "head": 1.0}  # fmt: skip
    for part, share in expected.items():
        at = f"network.{part}."
        assert {its for name, its in shares.items() if name.startswith(at)} == {share}
    spared = {id(p) for group in groups if "weight_decay" in group for p in group["params"]}
    assert len(spared) == len(groups_of_two(network)[1]["params"])


def test_a_network_without_an_encoder_is_refused_with_the_key_to_set():
    with pytest.raises(UserError, match=r"model\.encoder_parts"):
        encoder_depths(AnySize(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1)), 1))
    named = AnySize(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1)), 1, encoder_parts=["0"])
    assert set(encoder_depths(named)) == {"network.0.weight", "network.0.bias"}


@pytest.mark.parametrize("optimizer", [["optim=adamw", "optim.layer_decay=0.5"], ["optim=sgd"]])
def test_a_frozen_encoder_starts_to_learn_at_its_step_and_resumes(
    optimizer, phantom_root, tmp_path, monkeypatch
):
    def words(outputs):
        return [*small_overrides(phantom_root, outputs), *UNET, "trainer=cpu", *optimizer,
                "optim.freeze_encoder=2", "callbacks.checkpoint.every=1"]  # fmt: skip

    seen = []
    step_of = SegmentationTask.training_step

    def training_step(task, batch, index):
        state = task.network.state_dict()
        seen.append({part: state[f"network.{part}"].clone() for part in PARTS})
        return step_of(task, batch, index)

    PARTS = ("encoder.0.0.weight", "head.weight")
    monkeypatch.setattr(SegmentationTask, "training_step", training_step)
    whole = trained(*words(tmp_path / "whole"))
    encoder, head = ([torch.equal(a[p], b[p]) for a, b in pairwise(seen)] for p in PARTS)
    assert encoder == [True, True, False] and head == [False, False, False]
    with monkeypatch.context() as patch:
        stop_before(3, patch)
        with pytest.raises(ZeroDivisionError):
            trained(*words(tmp_path / "cut"))
    again = trained(*words(tmp_path / "cut"))
    ends = [torch.load(run.folder.path / "checkpoints" / "last.ckpt", weights_only=False)
            for run in (whole, again)]  # fmt: skip
    for key in ("state_dict", "optimizer_states"):
        assert_same(ends[0][key], ends[1][key], key)
