import json

import numpy as np
import pytest
import torch
from test_goldens import GOLDEN, count

from mambaseg.errors import UserError
from mambaseg.models import UMamba
from mambaseg.models.u_mamba import ResidualBlock

SEVEN_STAGES = {"widths": (32, 64, 128, 256, 512, 512, 512), "num_classes": 14}
SMALL = {"widths": (4, 8, 16, 16), "blocks": 1, "d_state": 4}


@pytest.mark.parametrize(
    ("mamba", "options", "parameters"),
    [
        ("bottom", {}, 40_506_676),
        ("encoder", {}, 42_800_180),
        ("none", {}, 38_810_932),
        ("bottom", SEVEN_STAGES, 63_344_180),
        ("encoder", SEVEN_STAGES, 67_333_428),
    ],
)
def test_parameter_count_is_the_published_one(mamba, options, parameters):
    assert count(UMamba, mamba=mamba, **options) == parameters


def test_twin_differs_by_one_norm_and_one_mamba_block_only():
    with torch.device("meta"):
        bottom, none = UMamba(mamba="bottom"), UMamba(mamba="none")
    extra = set(bottom.state_dict()) - set(none.state_dict())
    assert set(none.state_dict()) <= set(bottom.state_dict())
    assert {".".join(name.split(".")[:3]) for name in extra} == {
        "mamba_layers.5.norm",
        "mamba_layers.5.mamba",
    }


def test_only_the_coarse_heads_are_frozen():
    frozen = {name for name, p in UMamba(**SMALL).named_parameters() if not p.requires_grad}
    assert frozen == {f"heads.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}


@pytest.mark.parametrize("mamba", ["bottom", "encoder", "none"])
def test_only_the_encoder_variant_begins_with_closed_branches(mamba):
    blocks = [m for m in UMamba(mamba=mamba, **SMALL).modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 7
    assert [bool(block.conv2.norm.weight.any()) for block in blocks] == [mamba != "encoder"] * 7


def test_convolutions_begin_as_in_nnunet():
    block = UMamba().encoder[3][1]  # 256 channels, 3 × 3
    expected = (2 / (1 + 0.01**2) / (256 * 9)) ** 0.5
    assert block.conv1.conv.weight.std().item() == pytest.approx(expected, rel=0.01)
    assert not block.conv1.conv.bias.any()


def test_shortcut_is_pooled_and_projected_only_where_it_has_to_be():
    kinds = [
        [type(part).__name__ for part in ResidualBlock(*widths, stride=stride).skip]
        for widths, stride in [((4, 4), 1), ((4, 4), 2), ((4, 8), 1), ((4, 8), 2)]
    ]
    assert kinds == [[], ["AvgPool2d"], ["ConvNorm"], ["AvgPool2d", "ConvNorm"]]


def test_image_that_does_not_fit_or_comes_down_to_one_pixel_is_an_error_for_the_user():
    network = UMamba(**SMALL)
    assert network(torch.rand(1, 1, 8, 16)).shape == (1, 4, 8, 16)
    with pytest.raises(UserError, match=r"multiples of 8, got 20 × 16.*AnySize"):
        network(torch.rand(1, 1, 20, 16))
    with pytest.raises(UserError, match=r"8 × 8 pixels comes down to one pixel.*data\.size"):
        network(torch.rand(1, 1, 8, 8))


def test_unknown_placement_is_an_error_for_the_user():
    with pytest.raises(UserError, match=r"model\.mamba is 'top'.*bottom, encoder, none"):
        UMamba(mamba="top")


def test_original_weights_of_another_variant_do_not_load():
    keys = json.loads(str(np.load(GOLDEN / "u_mamba_bot_narrow.npz")["keys"]))
    state_dict = {key: torch.zeros(shape) for key, shape in keys.items()}
    network = UMamba(mamba="none", widths=(8, 16, 32, 32, 32))
    with pytest.raises(UserError, match=r"mamba_layers\.4\.norm\.weight is left over"):
        network.load_original_state_dict(state_dict)
