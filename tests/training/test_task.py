import copy
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from mambaseg.inference.segment import segment
from mambaseg.models import MambaUNet, SwinUNet, UNet
from mambaseg.training.methods import scribble2label
from mambaseg.training.parameters import lay_out_states, parameter_groups
from mambaseg.training.segmentation import SegmentationTask
from runs import UNET, built

TINY = {"embed_dim": 12, "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize("network", [UNet(widths=(4, 8, 8, 8, 8)), MambaUNet(**TINY)])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_every_parameter_is_optimised_once(network, decay):
    grouped = [p for group in parameter_groups([network], decay) for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, network.parameters()))


def test_the_published_recipe_decays_everything():
    (group,) = parameter_groups([MambaUNet(**TINY)], "all")
    optimizer = torch.optim.SGD([group], lr=0.01, weight_decay=1e-4)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4


def test_matrices_spares_vectors_and_what_a_network_names():
    for network in (MambaUNet(**TINY), SwinUNet(embed_dim=12, heads=(1, 2, 2, 4))):
        decayed, spared = parameter_groups([network], "matrices")
        names = {id(p): name for name, p in network.named_parameters()}
        assert spared["weight_decay"] == 0.0 and "weight_decay" not in decayed
        spared_names = {names[id(p)] for p in spared["params"]}
        assert all(p.ndim >= 2 for p in decayed["params"])
        for name in names.values():
            last = name.rsplit(".", 1)[-1]
            if last in ("A_logs", "Ds", "bias", "relative_position_bias_table"):
                assert name in spared_names
        assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} <= {
            "weight", "x_proj_weight", "dt_projs_weight", "dt_projs_bias",
        }  # fmt: skip


def task_of(*layers, schedule=None, **how):
    network = nn.Sequential(*layers, nn.Conv2d(2, 2, 1))
    return SegmentationTask(
        network, nn.CrossEntropyLoss(), torch.optim.SGD, schedule,
        preprocessing=Preprocessing("paper", 4), class_names=("background", "heart"), **how,
    )  # fmt: skip


@pytest.mark.parametrize(("steps", "share"), [(10, 0.1), (100, 0.01)])
def test_a_warm_up_of_one_step_is_an_error_for_the_user_with_a_way_out(steps, share):
    def made(steps, share):
        schedule = partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=1, total_steps=steps, pct_start=share
        )
        return task_of(schedule=schedule, steps=steps).configure_optimizers()

    with pytest.raises(UserError, match=rf"data\.steps={steps + 1}, or another .*pct_start"):
        made(steps, share)
    assert made(steps + 1, share) and made(steps, 2 * share)


@pytest.mark.parametrize(
    ("norm", "batch", "remedy"),
    [
        (nn.InstanceNorm2d(2), 3, "data.size"),
        (nn.BatchNorm2d(2), 1, "data.batch_size above 1"),
    ],
)
def test_a_map_of_one_pixel_that_cannot_be_normalised_is_an_error_for_the_user(norm, batch, remedy):
    task = task_of(nn.Conv2d(1, 2, 4, stride=4), norm)
    assert task(torch.rand(batch, 1, 8, 8)).shape == (batch, 2, 2, 2)
    with pytest.raises(UserError, match=f"4 × 4 pixels to a single one.*{remedy}"):
        task(torch.rand(batch, 1, 4, 4))


def test_other_errors_of_a_network_stay_as_they_are():
    class Broken(nn.Module):
        def forward(self, image):
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        task_of(Broken())(torch.rand(1, 1, 4, 4))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_states_of_an_optimizer_are_laid_out_like_their_parameters(optimizer):
    how = {"lr": 0.1, "fused": True} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})

    def made(layout):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=layout))
        return parameter, optimizer([parameter], **how)

    def step(parameter, its_optimizer, seed):
        torch.manual_seed(seed)
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(8, 4, 3, 3))
        its_optimizer.step()

    plain, before = made(torch.contiguous_format)
    step(plain, before, seed=1)
    turned, after = made(torch.channels_last)
    after.register_load_state_dict_post_hook(lay_out_states)
    with torch.no_grad():
        turned.copy_(plain)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    step(plain, before, seed=2)
    step(turned, after, seed=2)
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-6)


def test_a_method_predicts_whole_cases_in_batches_of_the_evaluation(small_run, monkeypatch):
    asked = []

    def segmented(*args, batch_size, **options):
        asked.append(batch_size)
        return segment(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(scribble2label, "segment", segmented)
    words = ["method=scribble2label", "method.every=1", "data.labels=scribble", "data.steps=1"]
    more = ["loss=partial_ce", "evaluation.batch_size=3", "trainer=cpu", "test=false"]
    with built(*small_run, *UNET, *words, *more) as run:
        run.fit()
    assert set(asked) == {3}


def test_a_late_look_holds_no_gradients_during_the_next_backward_pass(small_run):
    """Weak references tell, for `p.grad` is None whoever holds the tensors."""
    alive, seen = [], []
    words = ["trainer=cpu", "data.steps=3", "callbacks.nonfinite.late=true"]
    with built(*small_run, *UNET, *words, "test=false") as run:
        first = next(run.task.network.parameters())

        def keep(parameter):
            alive.append(sum(one() is not None for one in seen))
            seen[:] = [weakref.ref(parameter.grad)]

        first.register_post_accumulate_grad_hook(keep)
        run.fit()
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("batches", [1, 2])
def test_no_gradient_is_kept_until_the_next_step(batches, small_run):
    held = []
    words = ["trainer=cpu", f"trainer.accumulate_grad_batches={batches}", "data.steps=3"]
    with built(*small_run, *UNET, *words, "test=false") as run:

        def look(network, inputs):
            if network.training:
                held.append(any(p.grad is not None for p in network.parameters()))

        run.task.network.register_forward_pre_hook(look)
        run.fit()
    expected = [turn % batches > 0 for turn in range(3 * batches)]  # what accumulates is kept
    assert held == expected
