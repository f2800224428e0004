import pytest
import torch

from mambaseg.models import (
    Dropout,
    DropPath,
    MambaUNet,
    SwinBlock,
    SwinUNet,
    UNet,
    drawing,
    stochastic_layers,
)  # fmt: skip
from mambaseg.models.stochastic import linear_schedule


def test_branch_passes_in_eval_mode_and_without_a_rate():
    branch = torch.rand(4, 3, 2)
    assert torch.equal(DropPath(0.9).eval()(branch), branch)
    assert torch.equal(DropPath(0.0).train()(branch), branch)


def numbers(uniforms):
    """What `drawing` is told so that the draws are these numbers in [0, 1)."""
    return torch.tensor([[int(u * 2**53) << 10] for u in uniforms])


def test_whole_samples_are_dropped_and_the_others_made_up_for():
    layer = DropPath(0.2).train()
    branch = torch.rand(3, 2, 2, 5)
    with drawing([layer], numbers([0.21, 0.19, 0.99])):
        out = layer(branch)
    torch.testing.assert_close(out[[0, 2]], branch[[0, 2]] / 0.8)
    assert torch.equal(out[1], torch.zeros(2, 2, 5))


@pytest.mark.parametrize("layer", [DropPath(0.2), Dropout(0.2)])
@pytest.mark.parametrize("told", [False, True])
def test_share_of_what_is_dropped_is_the_rate(layer, told):
    torch.manual_seed(0)
    told = torch.randint(2**62, (20_000, 1)) * 2 if told else torch.empty(20_000, 0).long()
    with drawing([layer] * told.shape[1], told):
        out = layer.train()(torch.ones(20_000, 3))
    assert (out > 0).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert torch.unique(out).tolist() == pytest.approx([0.0, 1.25])


@pytest.mark.parametrize("layer", [DropPath(0.5), Dropout(0.5)])
def test_what_a_sample_loses_depends_on_its_number_only(layer):
    layer.train()
    x = torch.rand(6, 4, 5, 5)
    told = torch.randint(2**62, (6, 1))

    def dropped(rows):
        with drawing([layer], told[rows]):
            return layer(x[rows])

    whole = dropped(slice(None))
    torch.rand(7)  # torch's generator has no say
    assert torch.equal(dropped(slice(4, 6)), whole[4:])
    assert torch.equal(dropped(slice(0, 1)), whole[:1])
    assert not torch.equal(layer(x), whole)  # and afterwards it has again
    assert layer.numbers is None


def test_dropout_of_one_sample_differs_from_that_of_another():
    layer = Dropout(0.5).train()
    with drawing([layer], torch.tensor([[1], [2]])):
        first, second = layer(torch.ones(2, 100))
    assert not torch.equal(first, second)


def test_the_branches_of_a_swin_block_are_dropped_independently():
    block = SwinBlock(8, heads=2, window=2, shifted=False, drop_path=0.5).train()
    x, layers = torch.rand(4000, 2, 2, 8), stochastic_layers(block)
    torch.manual_seed(0)
    with drawing(layers, torch.randint(2**62, (4000, 2)) * 2):
        untouched = (block(x) == x).flatten(1).all(1)
    assert untouched.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_layers_are_released_when_a_step_fails():
    layer = DropPath(0.5)
    with pytest.raises(RuntimeError), drawing([layer], torch.zeros(1, 1, dtype=torch.int64)):
        raise RuntimeError
    assert layer.numbers is None


@pytest.mark.parametrize(("network", "count"), [(UNet, 5), (SwinUNet, 24), (MambaUNet, 12)])
def test_all_random_layers_of_a_network_are_found(network, count):
    assert len(stochastic_layers(network())) == count


def test_dtype_of_the_branch_stays():
    assert DropPath(0.5).train()(torch.rand(2, 3).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match="rate of a DropPath"):
        DropPath(rate)


def test_schedule_rises_linearly_over_all_blocks():
    rates = linear_schedule(0.2, (2, 2, 2, 2))
    published = [[0.0, 0.029], [0.057, 0.086], [0.114, 0.143], [0.171, 0.2]]
    assert [[round(rate, 3) for rate in stage] for stage in rates] == published


@pytest.mark.parametrize("network", [SwinUNet, MambaUNet])
def test_decoder_mirrors_the_rates_of_the_encoder(network):
    network = network(embed_dim=24, depths=(1, 2, 3, 1), drop_path_rate=0.3)

    def rates(stages):
        for block in (block for stage in stages for block in stage.blocks):
            assert getattr(block, "drop_mlp", block.drop_path).rate == block.drop_path.rate
        return [[block.drop_path.rate for block in stage.blocks] for stage in stages]

    assert rates(network.encoder) == linear_schedule(0.3, (1, 2, 3, 1))
    assert rates(network.decoder) == rates(network.encoder)[-2::-1]


def test_drop_path_is_active_in_training_only():
    network = MambaUNet(embed_dim=24, d_state=2, drop_path_rate=0.5)
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        network.train()
        assert not torch.equal(network(image), network(image))
        network.eval()
        assert torch.equal(network(image), network(image))


def test_a_layout_changes_no_mask_on_a_cpu():
    layer, image = Dropout(0.5), torch.ones(2, 8, 6, 6)
    layer.numbers = torch.tensor([5, 6])
    assert torch.equal(layer(image), layer(image.to(memory_format=torch.channels_last)))
