"""What makes a run small enough for a test."""

from pathlib import Path


def small_overrides(phantom_root: Path, outputs: Path) -> list[str]:
    """Words for a training of seconds: the phantom of eight, a few steps at 32 pixels."""
    return [
        "data=phantom",
        f"data.root={phantom_root}",
        "data.prepare.patients=8",
        f"data.cache_dir={phantom_root.parent / 'cache'}",
        f"outputs={outputs}",
        "data.size=32",
        "data.batch_size=4",
        "data.steps=4",
        "data.val_every=2",
    ]
