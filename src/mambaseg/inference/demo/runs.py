"""The run that the page takes when none is named."""

from __future__ import annotations

from pathlib import Path

from mambaseg.errors import UserError
from mambaseg.reporting.runs import is_other_task
from mambaseg.storage.run_folder import RunFolder


def newest_run(outputs: Path) -> Path:
    """The run that ended last, of the finished ones that gave a network which labels.

    Args:
        outputs: folder of experiments, which hold run folders.

    Raises:
        UserError: there is none.
    """
    ended: list[tuple[str, Path]] = []
    for path in outputs.glob("*/*/checkpoints/best.ckpt"):
        folder = RunFolder(path.parent.parent)
        if folder.path.suffix == ".previous":
            continue
        if folder.trained and not is_other_task(folder.path):
            ended.append((str(folder.record.get("ended", "")), folder.path))
    if not ended:
        raise UserError(
            f"{outputs} holds no finished run: give run=<run folder or .ckpt>, or train one first "
            "(make train does, on the synthetic phantom)"
        )
    return max(ended)[1]
