"""Backbones of ImageNet into the U-shapes, with the published files' keys and shapes."""

import json
import pathlib
import re
import zlib
from dataclasses import asdict, fields

import pytest
import torch
from safetensors.torch import save_file

from mambaseg.errors import UserError
from mambaseg.models import LoadReport, MambaUNet, SwinUNet, UNet
from mambaseg.models.pretrained import Pretrained, read_weights
from small_networks import full_network


def constants(shapes):
    """A tensor per key, each filled with a number of its own (and stored as that one number)."""
    return {
        key: torch.full((1,), zlib.crc32(key.encode()) / 2**32).expand(shape)
        for key, shape in shapes.items()
    }


def backbone(dim, depths, block, in_channels=3):
    """Keys and shapes of a hierarchical backbone with a classifier for 1000 classes."""
    shapes = {"patch_embed.proj.weight": (dim, in_channels, 4, 4), "patch_embed.proj.bias": (dim,)}
    shapes |= norm("patch_embed.norm", dim)
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        for index in range(depth):
            shapes |= block(f"layers.{stage}.blocks.{index}", width, stage, index)
        if stage < len(depths) - 1:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= norm(f"layers.{stage}.downsample.norm", 4 * width)
    shapes |= norm("norm", width)
    return shapes | {"head.weight": (1000, width), "head.bias": (1000,)}


def norm(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def vmamba_block(name, dim, stage, index):
    rank, inner, scan = -(-dim // 16), 2 * dim, f"{name}.self_attention"
    return norm(f"{name}.ln_1", dim) | {
        f"{scan}.x_proj_weight": (4, rank + 32, inner),
        f"{scan}.dt_projs_weight": (4, inner, rank),
        f"{scan}.dt_projs_bias": (4, inner),
        f"{scan}.A_logs": (4 * inner, 16),
        f"{scan}.Ds": (4 * inner,),
        f"{scan}.in_proj.weight": (2 * inner, dim),
        f"{scan}.conv2d.weight": (inner, 1, 3, 3),
        f"{scan}.conv2d.bias": (inner,),
        **norm(f"{scan}.out_norm", inner),
        f"{scan}.out_proj.weight": (dim, inner),
    }


def swin_block(name, dim, stage, index):
    shapes = norm(f"{name}.norm1", dim) | norm(f"{name}.norm2", dim)
    layers = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (4 * dim, dim),
        "mlp.fc2": (dim, 4 * dim),
    }
    for layer, shape in layers.items():
        shapes |= {f"{name}.{layer}.weight": shape, f"{name}.{layer}.bias": shape[:1]}
    shapes[f"{name}.attn.relative_position_bias_table"] = (169, 3 * 2**stage)
    shapes[f"{name}.attn.relative_position_index"] = (49, 49)
    if index % 2 and stage < 3:
        shapes[f"{name}.attn_mask"] = (4 ** (3 - stage), 49, 49)
    return shapes


def count(weights):
    derived = ("relative_position_index", "attn_mask")
    return sum(value.numel() for key, value in weights.items() if not key.endswith(derived))


@pytest.fixture(scope="module")
def vmamba():
    weights = constants(backbone(96, (2, 2, 9, 2), vmamba_block))
    assert count(weights) == 22_893_448  # VMamba-T with its head
    return weights


@pytest.fixture
def vmamba_path(vmamba, tmp_path):
    torch.save({"model": vmamba, "epoch": 292}, tmp_path / "vssmtiny.pth")
    return tmp_path / "vssmtiny.pth"


def test_vmamba_fills_encoder_and_mirrored_decoder_as_the_original_does(vmamba, vmamba_path):
    network = MambaUNet()
    initial = {key: value.clone() for key, value in network.state_dict().items()}
    report = network.load_pretrained_encoder(vmamba_path, mirror=True)
    assert report.parameters == {
        "loaded": 13_754_016,
        "mirrored": 3_282_048,
        "missing": 2_085_600,
        "ignored": 7 * 1_195_776 + 769_000,  # stage 2's blocks 2 to 8, the classifier
    }
    assert len(report.missing) == 21
    assert report.mismatched == ()
    weights = network.state_dict()
    for ours, theirs in {
        "patch_embed.proj.weight": "patch_embed.proj.weight",
        "encoder.0.downsample.reduction.weight": "layers.0.downsample.reduction.weight",
        "encoder.2.blocks.1.ss2d.A_logs": "layers.2.blocks.1.self_attention.A_logs",
        "encoder.3.blocks.0.norm.weight": "layers.3.blocks.0.ln_1.weight",
        "bottom_norm.bias": "norm.bias",
        "decoder.0.blocks.1.ss2d.Ds": "layers.2.blocks.1.self_attention.Ds",
        "decoder.1.blocks.0.norm.bias": "layers.1.blocks.0.ln_1.bias",
        "decoder.2.blocks.1.ss2d.in_proj.weight": "layers.0.blocks.1.self_attention.in_proj.weight",
    }.items():
        assert torch.equal(weights[ours], vmamba[theirs]), ours
    for key in report.missing:
        assert torch.equal(weights[key], initial[key]), key
    assert {"head.weight", "norm.weight", "final_expand.expand.weight"} <= set(report.missing)


def test_without_mirroring_the_decoder_stays_as_initialised(vmamba_path):
    network = MambaUNet()
    initial = {key: value.clone() for key, value in network.state_dict().items()}
    report = network.load_pretrained_encoder(vmamba_path, mirror=False)
    assert report.parameters["loaded"] == 13_754_016
    assert report.parameters["mirrored"] == 0
    assert report.parameters["missing"] == 3_282_048 + 2_085_600
    for key, value in network.state_dict().items():
        assert torch.equal(value, initial[key]) == key.startswith(
            ("decoder.", "norm.", "final_expand.", "head.")
        ), key


def test_network_with_the_backbones_depths_takes_all_of_it(vmamba_path):
    report = MambaUNet(depths=(2, 2, 9, 2)).load_pretrained_encoder(vmamba_path)
    assert report.parameters["loaded"] == 22_124_448  # VMamba-T without its head
    assert report.ignored == ("head.weight", "head.bias")


def test_swin_t_fills_encoder_and_mirrored_decoder(tmp_path):
    weights = constants(backbone(96, (2, 2, 6, 2), swin_block))
    assert count(weights) == 28_288_354  # Swin-T with its head
    torch.save({"model": weights}, tmp_path / "swin.pth")
    network = SwinUNet()
    report = network.load_pretrained_encoder(tmp_path / "swin.pth")
    block = 1_776_492  # of 384 channels; Swin-T has four more of them
    assert report.parameters["loaded"] == 28_288_354 - 769_000 - 4 * block
    assert report.parameters["ignored"] == 4 * block + 769_000
    assert report.mismatched == ()
    table = "layers.1.blocks.0.attn.relative_position_bias_table"
    mirrored = network.decoder[1].blocks[0].attn.relative_position_bias_table
    assert torch.equal(mirrored.data, weights[table])


def small(**options):
    return MambaUNet(embed_dim=8, depths=(1, 1), **options)


def small_weights():
    shapes = backbone(8, (1, 1), vmamba_block)
    return {key: value.contiguous() for key, value in constants(shapes).items()}


def test_safetensors_are_read(tmp_path):
    weights = small_weights()
    save_file(weights, tmp_path / "weights.safetensors")
    network = small()
    report = network.load_pretrained_encoder(tmp_path / "weights.safetensors")
    assert (
        report.parameters["loaded"] == count(weights) - count({"": weights["head.weight"]}) - 1000
    )
    assert torch.equal(network.bottom_norm.weight.data, weights["norm.weight"])


def test_report_accounts_for_every_key(tmp_path):
    weights = small_weights()
    weights["patch_embed.proj.weight"] = torch.rand(8, 3, 2, 2)
    torch.save(weights, tmp_path / "weights.pth")
    network = small(in_channels=3)
    report = network.load_pretrained_encoder(tmp_path / "weights.pth")
    parts = [report.loaded, report.mirrored, report.missing]
    assert sorted(sum(parts, ())) == sorted(network.state_dict())
    assert report.mismatched == (
        "patch_embed.proj.weight is (8, 3, 2, 2) in the file, (8, 3, 4, 4) in the network",
    )
    assert "patch_embed.proj.weight" in report.missing
    assert set(report.ignored) == {"patch_embed.proj.weight", "head.weight", "head.bias"}
    filled = sum(report.parameters[part] for part in ("loaded", "mirrored", "missing"))
    assert filled == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_filters_of_three_colours_serve_images_of_other_channels(channels, tmp_path):
    weights = small_weights()
    torch.save(weights, tmp_path / "weights.pth")
    network = small(in_channels=channels)
    report = network.load_pretrained_encoder(tmp_path / "weights.pth")
    assert report.mismatched == () and "patch_embed.proj.weight" in report.loaded
    filters, colours = network.patch_embed.proj.weight.data, weights["patch_embed.proj.weight"]
    torch.testing.assert_close(filters[:, 1], colours[:, 1] * 3 / channels)
    if channels == 6:  # each colour twice
        torch.testing.assert_close(filters.sum(1), colours.sum(1))


@pytest.mark.parametrize("wrapped", [
    lambda weights: {f"module.{key}": value for key, value in weights.items()},
    lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}},
    lambda weights: {"state_dict": weights},
    lambda weights: {"state_dict": {f"net.{key}": value for key, value in weights.items()}},
    lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
], ids=["parallel", "parallel model", "plain", "lightning", "parallel state dict"])  # fmt: skip
def test_weights_load_as_wrappers_of_networks_save_them(wrapped, tmp_path):
    weights = small_weights()
    torch.save(wrapped(weights), tmp_path / "weights.pth")
    network = small()
    assert network.load_pretrained_encoder(tmp_path / "weights.pth").unfilled == ()
    assert torch.equal(network.bottom_norm.weight.data, weights["norm.weight"])


def test_original_weights_of_a_parallel_network_load(tmp_path):
    source, target = UNet(), UNet()
    names = {ours: theirs for theirs, ours in source.original_names().items()}
    saved = {}
    for key, value in source.state_dict().items():
        start = next(ours for ours in names if key.startswith(ours))
        saved[f"module.{names[start]}{key.removeprefix(start)}"] = value
    torch.save(saved, tmp_path / "weights.pth")
    target.load_original_state_dict(read_weights(tmp_path / "weights.pth"))
    assert torch.equal(target.head.weight, source.head.weight)


@pytest.mark.parametrize(("name", "changes", "dropped", "said"), [
    ("mamba_unet", {}, None, ""),
    ("mamba_unet_no_scan", {}, None, ""),  # whose convolutions no file has
    ("mamba_unet", {"d_state": 8}, None, "A_logs is .* in the file"),
    ("mamba_unet", {"patch_size": 2}, None, "patch_embed.proj.weight is"),
    ("mamba_unet", {}, "norm.", "of the encoder, not filled: bottom_norm.weight, bottom_norm.bias"),
])  # fmt: skip
def test_an_encoder_that_is_filled_in_part_is_warned_of(
    name, changes, dropped, said, tmp_path, caplog
):
    weights = constants(backbone(24, (1, 1), vmamba_block))
    kept = {k: v for k, v in weights.items() if not (dropped and k.startswith(dropped))}
    torch.save(kept, tmp_path / "weights.pth")
    caplog.set_level("INFO")
    changes |= {"embed_dim": 24, "depths": [1, 1], "pretrained": str(tmp_path / "weights.pth")}
    full_network(name, 3, **changes)
    levels = {record.levelname for record in caplog.records if "weights from" in record.message}
    assert levels == {"WARNING" if said else "INFO"}
    assert re.search(said, caplog.text)


class Grey(Pretrained):
    """A network that takes one channel as it is."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 4, 3)

    def backbone_names(self):
        return {"stem.": "stem."}


def test_one_channel_gets_the_sum_of_the_colour_filters(tmp_path):
    weights, network = torch.nn.Conv2d(3, 4, 3).state_dict(prefix="stem."), Grey()
    torch.save(weights, tmp_path / "weights.pth")
    assert network.load_pretrained_encoder(tmp_path / "weights.pth").missing == ()
    image = torch.rand(1, 1, 8, 8)
    colours = torch.nn.functional.conv2d(
        image.repeat(1, 3, 1, 1), weights["stem.weight"], weights["stem.bias"]
    )
    torch.testing.assert_close(network.stem(image), colours)


def test_report_reads_well_and_survives_json(vmamba_path):
    report = MambaUNet().load_pretrained_encoder(vmamba_path)
    text = report.summary()
    assert str(vmamba_path) in text
    for number in ("13,754,016", "3,282,048", "2,085,600"):
        assert number in text
    record = json.loads(json.dumps(asdict(report)))
    assert set(record) == {field.name for field in fields(LoadReport)}
    assert record["parameters"]["loaded"] == 13_754_016
    assert record["missing"] == list(report.missing)


def write_nothing(path):
    pass


def write_text(path):
    path.write_text("<html>404: not found</html>")


def write_truncated(path):
    torch.save({"model": small_weights()}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_object(path):
    torch.save({"model": small_weights(), "config": pathlib.PurePosixPath("x")}, path)


def write_no_tensors(path):
    torch.save({"model": {"epoch": 3}}, path)


def write_list(path):
    torch.save([torch.zeros(3)], path)


def write_other_network(path):
    torch.save(UNet().state_dict(), path)


def write_little(path):
    kept = ("patch_embed", "layers.0", "head")
    torch.save({k: v for k, v in small_weights().items() if k.startswith(kept)}, path)


def write_few_blocks(path):
    kept = ("patch_embed", "layers.0")
    torch.save({k: v for k, v in small_weights().items() if k.startswith(kept)}, path)


def write_whole_numbers(path):
    torch.save({k: (10 * v).to(torch.int8) for k, v in small_weights().items()}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_nothing, "there is no weights file"),
        (write_text, "cannot be read as weights"),
        (write_truncated, "cannot be read as weights"),
        (write_object, "cannot be read as weights .*save its 'model' entry alone"),
        (write_no_tensors, "holds no tensors"),
        (write_list, "holds no tensors"),
        (write_other_network, "fills only 0% of the encoder"),
        (write_little, r"fills only \d+% of the encoder.*\(not used: head"),
        (write_few_blocks, r"fills only \d+% of the encoder.*\(not filled: .*model\.depths"),
        (write_whole_numbers, "fills only 0% of the encoder"),
    ],
)
def test_wrong_file_is_an_error_that_names_it_and_changes_nothing(write, message, tmp_path):
    path = tmp_path / "weights.pth"
    write(path)
    network = small()
    initial = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        network.load_pretrained_encoder(path)
    assert str(path) in str(error.value)
    for key, value in network.state_dict().items():
        assert torch.equal(value, initial[key]), key


def test_damaged_safetensors_are_an_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no header")
    with pytest.raises(UserError, match="cannot be read as weights"):
        small().load_pretrained_encoder(path)
