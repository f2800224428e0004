import numpy as np
import pytest
import torch
from test_goldens import NARROW, count, read_golden

from mambaseg.errors import UserError
from mambaseg.models import UVMNet
from mambaseg.models.uvm_net import BiSSM

COLOUR = {"in_channels": 3, "num_classes": 3}
SMALL = {"widths": (4, 8, 16), "grid": 4, "d_state": 3}
BLOCK = {"wide_scan": False, "d_state": 3, "scan_backend": "auto"}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 56_166_825),
        (COLOUR, 56_166_760),
        (COLOUR | {"wide_scan": True}, 1_003_940_200),
    ],
    ids=str,
)
def test_parameter_count_is_that_of_the_code(options, parameters):
    assert count(UVMNet, **options) == parameters


def test_tokens_are_values_that_follow_each_other_in_memory():
    block = BiSSM(2, 3, attention=False, **BLOCK)
    seen = []
    block.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.nn.init.zeros_(block.local[2].weight)
    torch.nn.init.zeros_(block.local[2].bias)
    block(torch.arange(18.0).view(1, 2, 3, 3))
    assert torch.equal(seen[0], torch.arange(18.0).view(1, 9, 2))


def test_attention_that_is_the_same_everywhere_changes_nothing():
    with_attention = BiSSM(2, 3, attention=True, **BLOCK)
    without = BiSSM(2, 3, attention=False, **BLOCK)
    without.load_state_dict(with_attention.state_dict(), strict=False)
    x = torch.rand(2, 2, 3, 3)
    with torch.no_grad():
        assert not torch.allclose(with_attention(x), without(x), rtol=1e-4)
        with_attention.attention.out_proj.weight.zero_()
        torch.testing.assert_close(with_attention(x), without(x))


def test_wide_scan_runs_and_learns():
    network = UVMNet(**COLOUR, wide_scan=True, **SMALL)
    network(torch.rand(2, 3, 8, 12)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


def test_original_weights_need_the_wide_scan_and_fill_the_attention():
    network, options = NARROW["uvm_net_narrow"]
    golden, state_dict = read_golden("uvm_net_narrow")
    assert golden["size"].tolist() == [48, 32]
    whole = network(**options | {"attention": True})
    whole.load_original_state_dict(state_dict)
    ours = whole.encoder[2].bi_ssm.attention.A_log.detach().numpy()
    np.testing.assert_array_equal(ours, state_dict["down2.maxpool_conv.1.ub.model2.A_log"])
    with pytest.raises(UserError, match=r"bi_ssm\.wide_scan\.A_log is left over"):
        network(**options | {"wide_scan": False}).load_original_state_dict(state_dict)
