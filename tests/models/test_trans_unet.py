"""TransUNet against torch's own transformer, by its published size, and with foreign weights."""

import numpy as np
import pytest
import torch
from torch import nn

from mambaseg.errors import UserError
from mambaseg.models import TransUNet
from mambaseg.models.trans_unet import StandardConv2d, TransformerBlock


def small(**options):
    return TransUNet(**{"units": (1, 1, 1), "dim": 64, "depth": 2, "heads": 4, "hidden": 96,
                        "image_size": 64, **options})  # fmt: skip


@pytest.mark.parametrize(("size", "parameters"), [(224, 105_276_356), (256, 105_322_436)])
def test_it_has_the_published_number_of_parameters(size, parameters):
    with torch.device("meta"):
        network = TransUNet(image_size=size)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_a_block_is_torchs_pre_normed_encoder_layer():
    ours = TransformerBlock(64, 4, 96, dropout=0.0).double().eval()
    theirs = nn.TransformerEncoderLayer(
        64, 4, 96, dropout=0.0, activation="gelu", batch_first=True, norm_first=True,
        layer_norm_eps=1e-6, dtype=torch.float64,
    ).eval()  # fmt: skip
    names = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.out.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.3.",
    }

    def renamed(key):
        for old, new in names.items():
            key = key.replace(old, new)
        return key

    ours.load_state_dict({renamed(k): v for k, v in theirs.state_dict().items()})
    x = torch.rand(2, 7, 64).double()
    torch.testing.assert_close(ours(x), theirs(x))


def test_kernels_are_standardised():
    conv = StandardConv2d(3, 5, 3, 1).double()
    kernel = conv.weight.detach().flatten(1)
    kernel = (kernel - kernel.mean(1, keepdim=True)) / (kernel.var(1, correction=0) + 1e-5).sqrt()[
        :, None
    ]
    x = torch.rand(1, 3, 6, 6).double()
    expected = nn.functional.conv2d(x, kernel.view_as(conv.weight), padding=1)
    torch.testing.assert_close(conv(x), expected)


def test_the_position_embedding_is_interpolated_to_other_grids():
    network = small().eval()
    with torch.no_grad():
        network.encoder.position.copy_(torch.linspace(0, 1, 4).expand(1, 64, 4, 4))
    network.encoder.dropout.register_forward_hook(lambda m, i, o: seen.append(o))
    network.encoder.embedding.register_forward_hook(lambda m, i, o: seen.append(o))
    seen: list[torch.Tensor] = []
    network(torch.rand(1, 1, 32, 112))
    embedded, tokens = seen
    added = tokens.transpose(1, 2).view_as(embedded) - embedded
    torch.testing.assert_close(added[0, 0, 0], torch.linspace(0, 1, 7), rtol=0, atol=1e-5)


def published(network, heads):
    """The arrays of such a file, filled with the network's own weights in the file's layouts."""
    arrays = {"cls": np.zeros((1, 1, 64), np.float32), "head/kernel": np.zeros((64, 9), np.float32)}
    grid = network.encoder.position.detach().flatten(2).transpose(1, 2).numpy()
    arrays["Transformer/posembed_input/pos_embedding"] = np.concatenate([arrays["cls"], grid], 1)
    attention = "MultiHeadDotProductAttention_1"
    blocks = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_2", "mlp.0": "MlpBlock_3/Dense_0",
              "mlp.3": "MlpBlock_3/Dense_1", "attention.out": f"{attention}/out"}  # fmt: skip
    for name, value in network.encoder.state_dict().items():
        words, value = name.split("."), value.numpy()
        stem, part = ".".join(words[:-1]), words[-1]
        kind = "bias" if part == "bias" else "scale" if value.ndim == 1 else "kernel"
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        if name == "position":
            continue
        if words[0] == "blocks":
            root, inner = f"Transformer/encoderblock_{words[1]}", ".".join(words[2:-1])
            if inner == "attention.qkv":
                for which, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                    piece = piece.T.reshape(-1, heads, 16) if kind == "kernel" else piece
                    shape = piece.shape if kind == "kernel" else (heads, 16)
                    arrays[f"{root}/{attention}/{which}/{kind}"] = piece.reshape(shape)
                continue
            if kind == "kernel":
                value = value.T.reshape(heads, 16, -1) if inner == "attention.out" else value.T
            arrays[f"{root}/{blocks[inner]}/{kind}"] = value
        elif words[:2] == ["resnet", "blocks"]:
            unit = f"block{int(words[2]) + 1}/unit{int(words[3]) + 1}/{words[4]}"
            arrays[f"{unit}/{kind}"] = value.reshape(1, 1, 1, -1) if value.ndim == 1 else value
        else:
            top = {"resnet.conv_root": "conv_root", "resnet.gn_root": "gn_root",
                   "embedding": "embedding", "norm": "Transformer/encoder_norm"}  # fmt: skip
            arrays[f"{top[stem]}/{kind}"] = value
    return arrays


def test_published_weights_fill_the_whole_encoder(tmp_path):
    source, target = small(), small()
    with torch.no_grad():
        source.encoder.position.normal_()
    np.savez(tmp_path / "vit.npz", **published(source, heads=4))
    report = target.load_pretrained_encoder(tmp_path / "vit.npz")
    for name, value in source.encoder.state_dict().items():
        torch.testing.assert_close(target.encoder.state_dict()[name], value, msg=name)
    assert set(report.ignored) == {"cls", "head/kernel"}
    assert all(not name.startswith("encoder.") for name in report.missing)


def test_published_weights_of_another_grid_are_resized(tmp_path):
    source, target = small(), small(image_size=112)
    with torch.no_grad():
        source.encoder.position.copy_(torch.linspace(0, 1, 4).expand(1, 64, 4, 4))
    np.savez(tmp_path / "vit.npz", **published(source, heads=4))
    target.load_pretrained_encoder(tmp_path / "vit.npz")
    torch.testing.assert_close(target.encoder.position[0, 0, 3], torch.linspace(0, 1, 7))


@pytest.mark.parametrize("shape", [(1, 1 + 7, 64), (1, 0, 64), (50, 64)])
def test_positions_of_no_square_grid_are_refused_with_the_file(shape, tmp_path):
    arrays = published(small(), heads=4)
    arrays["Transformer/posembed_input/pos_embedding"] = np.zeros(shape, np.float32)
    np.savez(tmp_path / "vit.npz", **arrays)
    with pytest.raises(UserError, match=r"vit\.npz has a position embedding of \("):
        small().load_pretrained_encoder(tmp_path / "vit.npz")


def test_other_files_are_refused_with_their_name(tmp_path):
    (tmp_path / "no.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", a=np.zeros(3, np.float32))
    for name in ("absent", "no", "pickled", "other"):
        with pytest.raises(UserError, match=name):
            small().load_pretrained_encoder(tmp_path / f"{name}.npz")
