import pytest
import torch

from mambaseg.models import DropPath, MambaUNet, SwinUNet, drop_path
from mambaseg.models.drop_path import draw_kept, linear_schedule


def test_branch_passes_in_eval_mode_and_without_a_rate():
    branch = torch.rand(4, 3, 2)
    assert torch.equal(DropPath(0.9).eval()(branch), branch)
    assert torch.equal(DropPath(0.0).train()(branch), branch)


def test_whole_samples_are_dropped_and_the_others_made_up_for(monkeypatch):
    kept = torch.tensor([True, False, True])
    monkeypatch.setattr(drop_path, "draw_kept", lambda batch, rate, device: kept)
    branch = torch.rand(3, 2, 2, 5)
    out = DropPath(0.2).train()(branch)
    torch.testing.assert_close(out[kept], branch[kept] / 0.8)
    assert torch.equal(out[1], torch.zeros(2, 2, 5))


def test_share_of_dropped_samples_is_the_rate():
    kept = draw_kept(20_000, 0.2, torch.device("cpu"))
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.01)


def test_dtype_of_the_branch_stays():
    assert DropPath(0.5).train()(torch.rand(2, 3).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match="drop path rate"):
        DropPath(rate)


def test_schedule_rises_linearly_over_all_blocks():
    rates = linear_schedule(0.2, (2, 2, 2, 2))
    published = [[0.0, 0.029], [0.057, 0.086], [0.114, 0.143], [0.171, 0.2]]
    assert [[round(rate, 3) for rate in stage] for stage in rates] == published


@pytest.mark.parametrize("network", [SwinUNet, MambaUNet])
def test_decoder_mirrors_the_rates_of_the_encoder(network):
    network = network(embed_dim=24, depths=(1, 2, 3, 1), drop_path_rate=0.3)

    def rates(stages):
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
