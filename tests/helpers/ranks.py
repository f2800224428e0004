"""Two optimizer steps of learning methods in a process of several, without a trainer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mambaseg.training.ranks import averaged
from runs import built


def learn(rank: int, count: int, trainings: dict[str, list[str]], folder: Path) -> None:
    """Writes `<name>.<rank of count>.pt` with the state after two steps of each training.

    In float64, with heads so large that predictions differ and are certain: then each term counts,
    and is seen. Batch norms keep their statistics: on CPUs each process would take those of
    its share.
    """
    torch.set_num_threads(1)
    for name, overrides in trainings.items():
        with built(*overrides, f"outputs={folder / f'outputs{count}{rank}'}") as run:
            if count > 1:  # leaving `built` destroys the process group
                store = dist.FileStore(str(folder / f"store_{name}"), count)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
            state = _after_two_steps(run.task.double().train(), run.data, rank, count)
            torch.save(state, folder / f"{name}.{rank}of{count}.pt")


def _after_two_steps(task: Any, data: Any, rank: int, count: int) -> dict[str, Any]:
    place = {"global_rank": rank, "world_size": count, "global_step": 0}
    root = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(**place, accumulate_grad_batches=1, strategy=root, training=True)
    task.method.begin(data)
    for name, module in task.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
        elif "head" in name and isinstance(module, torch.nn.Conv2d):
            module.weight.data.mul_(20)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.01)
    largest: dict[str, Any] = {}  # of each term
    for _, batch in zip(range(2), data.train_dataloader(), strict=False):
        moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        optimizer.zero_grad()
        task.training_loss(data.on_after_batch_transfer(moved, 0)).backward()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    averaged(parameter.grad)
        largest = {key: max(float(term), largest.get(key, 0)) for key, term in task._terms.items()}
        optimizer.step()
        task.method.after(batch["step"])
    return {**task.state_dict(), "largest": largest}
