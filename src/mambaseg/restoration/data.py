"""Crops of image pairs for training, whole images for evaluation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mambaseg.data.batches import Draw
from mambaseg.data.classes import check_class_names
from mambaseg.data.counter import AUGMENTATION, uniforms
from mambaseg.data.fingerprint import fingerprint
from mambaseg.data.loaders import Batch, StepDataModule
from mambaseg.data.seen import Known
from mambaseg.data.splits import PARTS, Split, make_split
from mambaseg.errors import UserError
from mambaseg.restoration.pairs import SMALLEST, Pair, check_pair, digests_of, find_pairs

VALIDATION = 0.1  # of the training scenes, where the folders name no validation part
log = logging.getLogger(__name__)


class RestorationDataModule(StepDataModule):
    """Training batches of random crops, evaluation on whole images.

    A training batch is `image` and `clear` (B, 3, S, S) float32 in [0, 1], `case` (list of ids),
    `step` (int) and `position` (B,): the places in the global batch of that step. An evaluation
    batch is one pair: `case` (the `Pair`), `image` and `clear` (1, 3, H, W).

    Scenes, not images, are split: all hazy images of a scene are in one part.

    Args:
        root: folder of the pairs, see `mambaseg.restoration.pairs`.
        class_names: of the output's `num_classes` channels, which are 3.
        prepare: makes the data set in `root` on first use.
        split_seed: of a random split; the run's seed does not change what is tested.
        cache_dir: not used: images are decoded as they are needed.
        **options: see `StepDataModule`; `size` is the side of the crops.
    """

    tasks: ClassVar[Mapping[str, str]] = {
        "restoration": "mambaseg.restoration.task.RestorationTask"
    }

    def __init__(
        self,
        *,
        root: str | Path,
        class_names: Sequence[str],
        num_classes: int = 3,
        prepare: Callable[[Path], object] | None = None,
        split_seed: int = 0,
        augmentation: Mapping[str, object] | None = None,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_class_names(class_names, "data.class_names")
        channels = (self.in_channels, num_classes, len(class_names))
        if not isinstance(self.size, int):
            raise UserError(f"data.size={self.size}: crops are squares, give the pixels of a side")
        self.side: int = self.size
        if channels != (3, 3, 3) or self.side < SMALLEST:
            raise UserError(
                f"data.in_channels={self.in_channels}, data.num_classes={num_classes}, data.size="
                f"{self.side}: images have three channels, crops at least {SMALLEST} pixels a side"
            )
        if augmentation:
            raise UserError(
                f"augmentation: data={self.name} draws crops and mirrors them; the operations of "
                "conf/augmentation are for segmentation, choose augmentation=none"
            )
        self.root = Path(root).expanduser()
        self._prepare, self._split_seed = prepare, split_seed
        self.pairs: Mapping[str, list[Pair]] = {}
        self._digests: dict[Path, str] = {}  # of every file, which are read once

    def load(self) -> None:
        """Find the pairs, look at every file's head and split the scenes; later calls do nothing.

        Raises:
            UserError: The data cannot be used.
        """
        if self.pairs:
            return
        if self._prepare is not None:
            self._prepare(self.root)
        found, pairs = find_pairs(self.root), {}
        self.split = _split(found, seed=self._split_seed, root=self.root)
        for part in PARTS:
            scenes = set(getattr(self.split, part))
            pairs[part] = [pair for pair in found if pair.scene in scenes]
            for pair in pairs[part]:
                check_pair(pair, smallest=self.side if part == "train" else SMALLEST)
        of_pairs, self._digests = digests_of(found)
        self.fingerprint, self.pairs = fingerprint(of_pairs), pairs
        for part, counts in self.counts.items():
            log.info("%s: %d pairs of %d scenes", part, counts["pairs"], counts["scenes"])

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of scenes and pairs of each part."""
        return {
            part: {"scenes": len({pair.scene for pair in pairs}), "pairs": len(pairs)}
            for part, pairs in self.pairs.items()
        }

    def known(self, part: str) -> list[Known]:
        """Return the pairs of a part with the digests of their two files, of which one is enough.

        The files, not what they show: images are decoded only as they are needed.
        """
        return [
            Known(pair.id, pair.scene, tuple(self._digests[path] for path in pair.sources()))
            for pair in self.pairs[part]
        ]

    def describe(self) -> dict[str, Any]:
        """Return the way to the network: 8 bits to [0, 1]; `size` is that of the crops."""
        return {"name": "unit", "size": self.side}

    def training_data(self) -> tuple[Dataset[Any], Callable[[Sequence[Any]], Batch]]:
        """Return the training pairs as crops, and what stacks them."""
        return CropDataset(self.pairs["train"], size=self.side, seed=self.seed), _stacked

    def evaluation_data(self, part: str) -> Dataset[Any]:
        """Return the whole images of a part."""
        return _Pairs(self.pairs[part])

    def transferred(self, batch: Batch) -> Sequence[str]:
        """Name both images: they are compared on the device."""
        return "image", "clear"


class _Pairs(Dataset[Batch]):
    """Whole pairs: `case` (the `Pair`), `image` and `clear` (1, 3, H, W) float32 in [0, 1]."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Batch:
        image, clear = map(_tensor, self.pairs[index].read())
        return {"case": self.pairs[index], "image": image[None], "clear": clear[None]}


class CropDataset(_Pairs):
    """Random crops of pairs, asked for by a `Draw`: `image` and `clear` (3, S, S) and its place.

    The crop and a left-right flip (half of the samples) are functions of (seed, step, position).
    The pairs are at least S = `size` pixels high and wide.
    """

    def __init__(self, pairs: Sequence[Pair], *, size: int, seed: int) -> None:
        super().__init__(pairs)
        self.size, self.seed = size, seed

    def __getitem__(self, draw: Draw) -> Batch:
        pair, size, place = self.pairs[draw.item], self.size, (draw.step, draw.position)
        images = pair.read()
        height, width = images[0].shape[:2]
        u = uniforms(self.seed, AUGMENTATION, step=draw.step, position=draw.position, count=3)
        top, left = int(u[0] * (height - size + 1)), int(u[1] * (width - size + 1))
        across = -1 if u[2] < 0.5 else 1
        image, clear = (
            _tensor(image[top : top + size, left : left + size][:, ::across]) for image in images
        )
        return {"image": image, "clear": clear, "case": pair.id, "place": place}


def _tensor(image: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) bytes -> (3, H, W) float32 in [0, 1]; by NumPy alone: it runs in workers."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    return torch.from_numpy(planes / np.float32(255))


def _stacked(items: Sequence[Batch]) -> Batch:
    """A training batch of the items of one (part of a) step; by NumPy alone."""
    steps, positions = zip(*(item["place"] for item in items), strict=True)
    batch: Batch = {
        key: torch.from_numpy(np.stack([item[key].numpy() for item in items]))
        for key in ("image", "clear")
    }
    batch |= {"case": [item["case"] for item in items], "step": steps[0]}
    return {**batch, "position": torch.tensor(positions)}


def _split(pairs: Sequence[Pair], *, seed: int, root: Path) -> Split:
    """The split that the folders give, or one of the scenes drawn by `seed`, in part or whole."""
    scenes = {part: sorted({p.scene for p in pairs if p.part == part}) for part in ("", *PARTS)}
    loose, train, val, test = scenes.values()
    drawn = train if not (loose or val) else loose
    if drawn and len(drawn) < (3 if loose else 2):
        raise UserError(
            f"{root}: 3 or more scenes are needed for training, validation and test, or 2 in "
            f"train/ where there is no val/; there are {len(drawn)}. Add images."
        )
    if loose:
        return make_split("random", loose, seed=seed, unit="scene")
    note = "As the folders train, val and test say."
    if not val:
        train.sort(key=lambda scene: hashlib.sha256(f"{seed}:{scene}".encode()).digest())
        count = max(1, round(VALIDATION * len(train)))
        val, train = sorted(train[:count]), sorted(train[count:])
        note = (
            f"As the folders train and test say; {count} of {count + len(train)} training scenes, "
            f"drawn with seed {seed}, are for validation."
        )
    return Split("folders", tuple(train), tuple(val), tuple(test), note)
