"""What every network promises: ours and the MONAI ones of conf/model, of reduced width."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mambaseg.errors import UserError
from mambaseg.models import (
    AnySize,
    AttentionUNet,
    MambaUNet,
    MambaUNetNoScan,
    SwinUMamba,
    SwinUMambaD,
    SwinUNet,
    TransUNet,
    UMamba,
    UNet,
    UVMNet,
    VMUNet,
    has_scan,
    names_without_decay,
)

CONF = Path(__file__).parents[2] / "conf" / "model"
NOT_FOR_THE_NETWORK = ("name", "pretrained", "mirror_encoder", "size_multiple")


def leaf(name, in_channels=1, num_classes=4):
    """A leaf of conf/model with its interpolations filled in, as plain containers."""
    data = {"in_channels": in_channels, "num_classes": num_classes}
    config = OmegaConf.create({"data": data, "model": OmegaConf.load(CONF / f"{name}.yaml")})
    return OmegaConf.to_container(config.model, resolve=True)


def build_leaf(name, in_channels=1, num_classes=4):
    config = leaf(name, in_channels, num_classes)
    arguments = {k: v for k, v in config.items() if k not in NOT_FOR_THE_NETWORK}
    network = instantiate(arguments, _convert_="all")
    return AnySize(network, config.get("size_multiple") or network.size_multiple)


def small_unet(in_channels=1, num_classes=4):
    return UNet(in_channels, num_classes, widths=(4, 8, 16, 32, 64))


def small_swin_unet(in_channels=1, num_classes=4):
    return SwinUNet(in_channels, num_classes, embed_dim=24, heads=(1, 2, 4, 8), window_size=4)


def small_mamba_unet(in_channels=1, num_classes=4):
    return MambaUNet(in_channels, num_classes, embed_dim=24, d_state=4)


def small_attention_unet(in_channels=1, num_classes=4):
    return AttentionUNet(in_channels, num_classes, widths=(4, 8, 16, 32, 64))


def small_trans_unet(in_channels=1, num_classes=4):
    sizes = {"units": (1, 1, 1), "dim": 48, "depth": 2, "heads": 4, "hidden": 96}
    return TransUNet(in_channels, num_classes, **sizes)


def small_mamba_unet_no_scan(in_channels=1, num_classes=4):
    return MambaUNetNoScan(in_channels, num_classes, embed_dim=24)


def small_vm_unet(in_channels=1, num_classes=4):
    return VMUNet(in_channels, num_classes, embed_dim=24, d_state=4)


def small_swin_umamba(in_channels=1, num_classes=4):
    return SwinUMamba(in_channels, num_classes, embed_dim=24, depths=(2, 1, 2, 1), d_state=4)


def small_swin_umamba_d(in_channels=1, num_classes=4):
    return SwinUMambaD(in_channels, num_classes, embed_dim=24, depths=(2, 1, 2, 1), d_state=4)


def segresnet(in_channels=1, num_classes=4):
    return build_leaf("segresnet", in_channels, num_classes).network


def swin_unetr(in_channels=1, num_classes=4):
    return build_leaf("swin_unetr", in_channels, num_classes).network


OURS = [
    small_unet,
    small_swin_unet,
    small_mamba_unet,
    small_mamba_unet_no_scan,
    small_attention_unet,
    small_trans_unet,
    small_vm_unet,
    small_swin_umamba,
    small_swin_umamba_d,
]
ALL = [*OURS, segresnet, swin_unetr]
each_network = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
each_of_ours = pytest.mark.parametrize("make", OURS, ids=lambda make: make.__name__)


@each_network
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (32, 96)], ids=str)
def test_logits_have_the_image_size_and_the_number_of_classes(make, in_channels, size):
    network = make(in_channels=in_channels, num_classes=5).eval()
    with torch.no_grad():
        logits = network(torch.rand(2, in_channels, *size))
    assert logits.shape == (2, 5, *size)
    assert logits.dtype == torch.float32


@each_network
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(make):
    network = make().eval()  # no dropout, no drop path
    network(torch.rand(2, 1, 64, 64)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@each_network
@pytest.mark.parametrize("size", [(33, 47), (70, 45), (17, 100)], ids=str)
def test_any_size_works_through_the_wrapper(make, size):
    network = AnySize(make(), multiple=32)
    logits = network(torch.rand(2, 1, *size))
    assert logits.shape == (2, 4, *size)
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@each_network
def test_state_dict_carries_the_whole_network(make, tmp_path):
    first, second = make().eval(), make().eval()
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        expected = first(image)
        assert not torch.allclose(second(image), expected)
        torch.save(first.state_dict(), tmp_path / "weights.pt")
        second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(second(image), expected)


@each_network
def test_samples_of_a_batch_do_not_mix(make):
    network = make().eval()
    images = torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(network(images), alone, rtol=1e-4, atol=1e-5)


def two_discs():
    """Two images with a bright ring and a disc in it, and their labels."""
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    label = torch.zeros(2, 32, 32, dtype=torch.int64)
    for sample, (y, x) in enumerate([(12, 18), (19, 11)]):
        distance = ((row - y) ** 2 + (column - x) ** 2).sqrt()
        label[sample][distance < 9] = 1
        label[sample][distance < 5] = 2
    image = torch.tensor([0.2, 0.5, 0.9])[label] + 0.05 * torch.randn(2, 32, 32)
    return image[:, None], label


def tiny(network):
    """Three stages of one block each: deep enough for every part, and quick."""
    own = {
        SwinUNet: {"heads": (2, 4, 8), "window_size": 4},
        VMUNet: {"decoder_depths": (1, 1, 1)},
    }
    options = own.get(network, {})
    return network(num_classes=3, embed_dim=48, depths=(1, 1, 1), **options)


@pytest.mark.parametrize(
    ("make", "rate", "steps"),
    [
        pytest.param(lambda: UNet(num_classes=3), 3e-3, 80, id="unet"),
        pytest.param(lambda: tiny(SwinUNet), 2e-3, 90, id="tiny_swin_unet"),
        pytest.param(lambda: tiny(MambaUNet), 2e-3, 90, id="tiny_mamba_unet"),
        pytest.param(lambda: tiny(MambaUNetNoScan), 2e-3, 50, id="tiny_mamba_unet_no_scan"),
        pytest.param(lambda: tiny(VMUNet), 2e-3, 60, id="tiny_vm_unet"),
        pytest.param(lambda: tiny(SwinUMamba), 2e-3, 20, id="tiny_swin_umamba"),
        pytest.param(lambda: tiny(SwinUMambaD), 2e-3, 50, id="tiny_swin_umamba_d"),
        pytest.param(
            lambda: SwinUNet(num_classes=3), 5e-4, 80, id="swin_unet", marks=pytest.mark.slow
        ),
        pytest.param(lambda: MambaUNet(num_classes=3), 1e-3, 40, id="mamba_unet"),
    ],
)
def test_network_learns_one_batch_by_heart(make, rate, steps):
    network = make().train()  # with the published dropout and drop path
    image, label = two_discs()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    for _ in range(steps):
        loss = F.cross_entropy(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        prediction = network(image).argmax(1)
    for structure in (1, 2):
        a, b = prediction == structure, label == structure
        dice = 2 * (a & b).sum().item() / (a.sum() + b.sum()).item()
        assert dice > 0.9, structure


@each_of_ours
def test_sizes_that_do_not_fit_name_the_wrapper(make):
    with pytest.raises(UserError, match=r"multiples of \d+, got 40 × 64.*AnySize"):
        make()(torch.rand(1, 1, 40, 64))


repeats_a_single_channel = pytest.mark.parametrize(
    "make", [small_swin_unet, small_mamba_unet, small_mamba_unet_no_scan, small_vm_unet]
)


@repeats_a_single_channel
def test_one_channel_is_repeated_to_three(make):
    grey, colour = make(in_channels=1).eval(), make(in_channels=3).eval()
    colour.load_state_dict(grey.state_dict())
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(grey(image), colour(image.repeat(1, 3, 1, 1)))


@repeats_a_single_channel
def test_other_channel_counts_are_taken_as_they_are(make):
    assert make(in_channels=2).patch_embed.proj.in_channels == 2


def test_networks_with_a_scan_say_so():
    assert has_scan(small_mamba_unet())
    assert has_scan(AnySize(small_mamba_unet(), 32))
    assert has_scan(small_vm_unet())
    assert has_scan(small_swin_umamba())
    assert has_scan(small_swin_umamba_d())
    assert not has_scan(small_mamba_unet_no_scan())
    assert has_scan(UMamba(widths=(4, 8)))
    assert not has_scan(UMamba(widths=(4, 8), mamba="none"))
    assert not has_scan(small_swin_unet())
    assert not has_scan(small_unet())


def test_parameters_that_decay_would_harm_are_named():
    mamba, swin = small_mamba_unet(), small_swin_unet()
    for network, parts in [(mamba, ("A_logs", "Ds")), (swin, ("relative_position_bias_table",))]:
        expected = {name for name, _ in network.named_parameters() if name.endswith(parts)}
        assert len(expected) == len(parts) * 14
        assert names_without_decay(network) == expected
    wrapped = names_without_decay(AnySize(mamba, 32))
    assert wrapped == {f"network.{name}" for name in names_without_decay(mamba)}
    assert names_without_decay(small_unet()) == set()


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONF.glob("*.yaml"))])
def test_every_leaf_is_named_like_its_file_and_builds(name):
    assert leaf(name)["name"] == name
    network = build_leaf(name, in_channels=1, num_classes=4).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 1, 50, 36)).shape == (1, 4, 50, 36)


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("unet", UNet),
        ("attention_unet", AttentionUNet),
        ("swin_unet", SwinUNet),
        ("trans_unet", TransUNet),
        ("mamba_unet", MambaUNet),
        ("mamba_unet_no_scan", MambaUNetNoScan),
        ("vm_unet", VMUNet),
        ("swin_umamba", SwinUMamba),
        ("swin_umamba_d", SwinUMambaD),
        ("u_mamba_bot", UMamba),
        ("uvm_net", UVMNet),
    ],
)
def test_leaf_says_the_defaults_of_its_network(name, network):
    from_leaf = build_leaf(name).network
    assert type(from_leaf) is network
    assert repr(from_leaf) == repr(network())


def test_importing_the_networks_loads_no_heavy_package():
    heavy = {"lightning", "monai", "numba", "hydra", "omegaconf", "safetensors", "scipy", "wandb"}
    code = f"import sys, mambaseg.models; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
