"""VM-UNet and both Swin-UMambas against forward passes written out with the original key names.

`Weights` makes an entry when it is first asked for, so that a pass also says which keys there are
and in which shapes; loading them is strict. All in float64. Blocks of convolutions are MONAI's, as
there; a visual state space block is ours, which test_vss.py compares with a loop over time.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from test_goldens import count, recipe
from test_pretrained import backbone, constants, vmamba_block

from mambaseg.errors import UserError
from mambaseg.models import (
    MambaUNet,
    MambaUNetNoScan,
    SwinUMamba,
    SwinUMambaD,
    VMUNet,
    VMUNetV2,
    VSSBlock,
)

DIM, CLASSES, STATES = 8, 5, 4


class Weights(dict):
    def get(self, key, *shape):
        if key not in self:
            self[key] = recipe(key, shape, seed=3).double()
        return self[key]

    def fill(self, module, name):
        """Give a module of known keys its weights."""
        module.double()
        state = {}
        for key, value in module.state_dict().items():
            original = re.sub("^norm", "ln_1", key).replace("ss2d", "self_attention")
            state[key] = self.get(f"{name}.{original}", *value.shape)
        module.load_state_dict(state)
        return module.eval()

    def norm(self, name, x):
        dim = x.shape[-1:]
        return F.layer_norm(
            x, dim, self.get(f"{name}.weight", *dim), self.get(f"{name}.bias", *dim)
        )

    def conv(self, name, x, out, size, **options):
        weight = self.get(f"{name}.weight", out, x.shape[1], size, size)
        return F.conv2d(x, weight, self.get(f"{name}.bias", out), **options)

    def linear(self, name, x, out):
        return x @ self.get(f"{name}.weight", out, x.shape[-1]).T

    def embed(self, name, image, patch):
        return self.norm(
            f"{name}.norm",
            self.conv(f"{name}.proj", image, DIM, patch, stride=patch).permute(0, 2, 3, 1),
        )

    def blocks(self, name, x, depth):
        for index in range(depth):
            block = VSSBlock(x.shape[-1], d_state=STATES, scan_backend="reference")
            x = self.fill(block, f"{name}.blocks.{index}")(x)
        return x

    def merge(self, name, x):
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        joined = self.norm(f"{name}.norm", torch.cat(quarters, -1))
        return self.linear(f"{name}.reduction", joined, 2 * x.shape[-1])

    def expand(self, name, x, out, factor):
        tokens = self.linear(f"{name}.expand", x, factor**2 * out)
        batch, height, width, _ = x.shape
        pixels = tokens.view(batch, height, width, factor, factor, out).transpose(2, 3)
        return self.norm(
            f"{name}.norm", pixels.reshape(batch, factor * height, factor * width, out)
        )


def image_first(x):
    return x.permute(0, 3, 1, 2)


def vm_unet(w, image):
    depths, decoder_depths = (1, 2, 1, 1), (1, 2, 1, 1)
    x, skips = w.embed("patch_embed", image.repeat(1, 3, 1, 1), 4), []
    for i, depth in enumerate(depths):
        skips.append(x)
        x = w.blocks(f"layers.{i}", x, depth)
        x = w.merge(f"layers.{i}.downsample", x) if i < 3 else x
    for i, depth in enumerate(decoder_depths):
        if i:
            x = w.expand(f"layers_up.{i}.upsample", x + skips[-i], x.shape[-1] // 2, 2)
        x = w.blocks(f"layers_up.{i}", x, depth)
    x = w.expand("final_up", x, DIM // 4, 4)
    return [w.conv("final_conv", image_first(x), CLASSES, 1)]


def vmamba_encoder(w, x, depths):
    outputs = []
    for i, depth in enumerate(depths):
        outputs.append(w.blocks(f"vssm_encoder.layers.{i}", x, depth))
        if i < len(depths) - 1:
            x = w.merge(f"vssm_encoder.downsamples.{i}", outputs[-1])
    return outputs


def swin_umamba(w, image):
    options = {"spatial_dims": 2, "kernel_size": 3, "norm_name": "instance", "res_block": True}

    def basic(name, x, out):
        return w.fill(UnetrBasicBlock(in_channels=x.shape[1], out_channels=out, stride=1,
                                      **options), name)(x)  # fmt: skip

    def up(name, x, skip):
        block = UnetrUpBlock(in_channels=x.shape[1], out_channels=skip.shape[1],
                             upsample_kernel_size=2, **options)  # fmt: skip
        return w.fill(block, name)(x, skip)

    stem = w.conv("stem.0", image, DIM // 2, 7, stride=2, padding=3)
    affine = w.get("stem.1.weight", DIM // 2), w.get("stem.1.bias", DIM // 2)
    stem = F.instance_norm(stem, weight=affine[0], bias=affine[1])
    tokens = w.embed("vssm_encoder.patch_embed", stem, 2)
    x1, x2, x3, x4 = map(image_first, vmamba_encoder(w, tokens, (1, 1, 2, 1)))
    x, decoded = x4, []
    sources = [image, stem, x1, x2, x3]
    for level in (5, 4, 3, 2, 1):
        skip = basic(f"encoder{level}", sources[level - 1], DIM // 2 * 2 ** (level - 1))
        x = up(f"decoder{level + 1}", x, skip)
        decoded.append(x)
    features = [basic("decoder1", x, DIM // 2), *decoded[-2::-1]]
    return [
        w.fill(UnetOutBlock(2, y.shape[1], CLASSES), f"out_layers.{i}")(y)
        for i, y in enumerate(features[:4])
    ]


def swin_umamba_d(w, image):
    tokens = w.embed("vssm_encoder.patch_embed", image, 4)
    *skips, x = vmamba_encoder(w, tokens, (1, 1, 2, 1))
    logits = []
    for i, skip in enumerate(reversed(skips)):
        x = w.expand(f"decoder.expand_layers.{i}", x, skip.shape[-1], 2)
        x = w.linear(f"decoder.concat_back_dim.{i}", torch.cat([x, skip], -1), skip.shape[-1])
        x = x + w.get(f"decoder.concat_back_dim.{i}.bias", skip.shape[-1])
        x = w.blocks(f"decoder.stages.{i}", x, 2)
        logits.append(w.conv(f"decoder.seg_layers.{i}", image_first(x), CLASSES, 1))
    x = w.expand("decoder.expand_layers.3", x, DIM, 4)
    logits.append(w.conv("decoder.seg_layers.3", image_first(x), CLASSES, 1))
    return logits[::-1]


def small(network, **options):
    depths = {"depths": (1, 1, 2, 1)}
    if network is VMUNet:
        depths = {"depths": (1, 2, 1, 1), "decoder_depths": (1, 2, 1, 1)}
    return network(num_classes=CLASSES, embed_dim=DIM, d_state=STATES, **depths, **options)


ORIGINALS = {VMUNet: vm_unet, SwinUMamba: swin_umamba, SwinUMambaD: swin_umamba_d}
each_network = pytest.mark.parametrize("network", ORIGINALS, ids=lambda n: n.__name__)


@each_network
def test_network_is_the_original_written_out(network):
    weights, image = Weights(), torch.rand(2, 1, 64, 96, dtype=torch.float64)
    ours = small(network).double().eval()
    with torch.no_grad():
        expected = ORIGINALS[network](weights, image)
        ours.load_original_state_dict(weights)
        torch.testing.assert_close(ours(image), expected[0])


@each_network
def test_original_state_dict_must_fit_exactly(network):
    weights = Weights()
    with torch.no_grad():
        ORIGINALS[network](weights, torch.rand(1, 1, 32, 32, dtype=torch.float64))
    wrapped = {"vmunet." + key: value for key, value in weights.items()}
    if network is VMUNet:  # the original keeps its network under a wrapper
        small(network).load_original_state_dict(wrapped)
    removed = next(key for key in weights if key.endswith("layers.1.blocks.0.ln_1.weight"))
    del weights[removed]
    with pytest.raises(UserError, match=r"encoder\.1\.blocks\.0\.norm\.weight is missing"):
        small(network).load_original_state_dict(weights)


@each_network
def test_scan_backends_give_the_same_logits(network):
    fast, slow = (small(network, scan_backend=name).eval() for name in ("numba", "reference"))
    slow.load_state_dict(fast.state_dict())
    image = torch.rand(1, 1, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast(image), slow(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "options", "parameters"),
    [
        (VMUNet, {}, 27_427_636),
        (VMUNet, {"num_classes": 1}, 27_427_561),
        (VMUNet, {"depths": (2, 2, 9, 2), "decoder_depths": (2, 9, 2, 2)}, 44_273_908),
        (SwinUMamba, {}, 59_882_128 - 4 * (96 + 192 + 384 + 3)),
        (SwinUMambaD, {}, 27_490_000 - 4 * (96 + 192 + 384 + 3)),
        (MambaUNetNoScan, {}, 15_900_672),
    ],
    ids=str,
)
def test_parameter_count_is_that_of_the_original(network, options, parameters):
    assert count(network, **options) == parameters


def rates(blocks):
    return [block.drop_path.rate for block in blocks]


def test_drop_path_rises_along_the_encoder_and_falls_along_the_decoder():
    with torch.device("meta"):  # the rates only
        network, other = VMUNet(), SwinUMambaD()
    assert rates(network.decoder[0].blocks) == pytest.approx([0.2, 0.2 * 5 / 6])
    assert rates(network.decoder[3].blocks) == [0.0]
    assert rates(other.encoder[3].blocks) == pytest.approx([0.2 * 13 / 14, 0.2])
    assert rates(other.decoder[0].blocks) == pytest.approx([0.2, 0.16])
    assert rates(other.decoder[2].blocks) == pytest.approx([0.04, 0.0])


def published(tmp_path, depths):
    weights = constants(backbone(96, depths, vmamba_block))
    torch.save({"model": weights}, tmp_path / "vmamba.pth")
    return weights, tmp_path / "vmamba.pth"


EMBEDDING, NORM, HEAD = 4_896, 1_536, 769_000
BLOCKS = (105_408, 339_840, 1_195_776, 4_455_936)  # parameters of a block per stage
VMAMBA_T = 22_124_448


def test_vmamba_s_fills_encoder_and_mirrored_decoder_of_vm_unet(tmp_path):
    weights, path = published(tmp_path, (2, 2, 27, 2))
    network = VMUNet()
    report = network.load_pretrained_encoder(path)
    assert report.parameters["loaded"] == VMAMBA_T - NORM - 7 * BLOCKS[2]
    assert report.parameters["mirrored"] == 2 * sum(BLOCKS) - BLOCKS[0]
    assert report.parameters["ignored"] == 25 * BLOCKS[2] + NORM + HEAD
    assert report.mismatched == ()
    for ours, theirs in {
        "encoder.3.blocks.1": "layers.3.blocks.1",
        "decoder.0.blocks.1": "layers.3.blocks.1",
        "decoder.1.blocks.0": "layers.2.blocks.0",
        "decoder.3.blocks.0": "layers.0.blocks.0",
    }.items():
        scan = weights[f"{theirs}.self_attention.A_logs"]
        assert torch.equal(network.get_submodule(ours).ss2d.A_logs.data, scan), ours
    alone = VMUNet().load_pretrained_encoder(path, mirror=False)
    assert alone.parameters["mirrored"] == 0


@pytest.mark.parametrize(
    ("network", "in_channels", "embedding"),
    [(SwinUMamba, 1, 0), (SwinUMamba, 3, 0), (SwinUMambaD, 1, 0), (SwinUMambaD, 3, EMBEDDING)],
)
def test_vmamba_t_fills_the_encoder_of_swin_umamba(network, in_channels, embedding, tmp_path):
    weights, path = published(tmp_path, (2, 2, 9, 2))
    ours = network(in_channels=in_channels)
    report = ours.load_pretrained_encoder(path)
    assert report.parameters["loaded"] == VMAMBA_T - NORM - EMBEDDING + embedding
    assert report.parameters["ignored"] == NORM + HEAD + EMBEDDING - embedding
    assert report.parameters["mirrored"] == 0
    assert report.mismatched == ()
    merging = "layers.2.downsample.reduction.weight"
    assert torch.equal(ours.encoder[2].downsample.reduction.weight.data, weights[merging])


def test_vmamba_t_fills_the_stages_that_vm_unet_v2_has(tmp_path):
    _, path = published(tmp_path, (2, 2, 9, 2))
    report = VMUNetV2(add_coarser_head=True).load_pretrained_encoder(path)
    assert report.parameters["loaded"] == VMAMBA_T - NORM - 2 * BLOCKS[3]
    assert not any(key.startswith(("patch_embed", "encoder")) for key in report.missing)


def test_twin_differs_from_mamba_unet_in_the_mixing_alone():
    """With weights that make both mixings a multiplication by four, the logits are the same."""
    mamba, twin = MambaUNet(embed_dim=8).eval(), MambaUNetNoScan(embed_dim=8).eval()
    state = mamba.state_dict()
    scan = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    shared = {key: value for key, value in state.items() if not key.endswith(scan)}
    left = twin.load_state_dict(shared, strict=False)
    assert left.unexpected_keys == []
    assert all(".ss2d.mixer." in key for key in left.missing_keys)
    image = torch.rand(1, 1, 32, 64)
    with torch.no_grad():
        assert not torch.allclose(mamba(image), twin(image), rtol=1e-3)
        for name, parameter in mamba.named_parameters():
            if name.endswith("x_proj_weight"):
                parameter.zero_()  # no state is read: the sum of four skips D x remains
        for name, parameter in twin.named_parameters():
            if ".mixer." in name:
                parameter.zero_()
            if name.endswith(".mixer.weight"):
                parameter[:, :, 3, 3] = 4.0
        torch.testing.assert_close(twin(image), mamba(image), rtol=1e-4, atol=1e-5)


def test_vmamba_t_fills_what_the_twin_shares_with_mamba_unet(tmp_path):
    _, path = published(tmp_path, (2, 2, 9, 2))
    report = MambaUNetNoScan().load_pretrained_encoder(path)
    assert all("mixer" in key for key in report.missing if key.startswith("encoder."))
    assert report.mismatched == ()
    assert any(key.endswith("A_logs") for key in report.ignored)
