"""The data of one run: cases, split, decoded cache and loaders, for any data set with a reader."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from mambaseg.data.augmentation import Augmentation, Operation
from mambaseg.data.cache import VolumeCache, open_cache
from mambaseg.data.case import Case
from mambaseg.data.classes import (
    IGNORED,
    check_class_names,
    require_named_values,
    sides_of_one,
    structures_of,
)
from mambaseg.data.fingerprint import digest_of, fingerprint, patients_with_same_images
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.intensity import CtValues, Window
from mambaseg.data.labelling import (
    Labels,
    checked_ignore,
    for_training,
    labelled_patients,
    open_note,
    supervision_note,
)
from mambaseg.data.loaders import Batch, StepDataModule
from mambaseg.data.oversampling import Foreground
from mambaseg.data.patients import Alike, find_alike, split_cases
from mambaseg.data.readers.unlabelled import find_unlabelled, of_labelled, require_unseen
from mambaseg.data.seen import Known
from mambaseg.data.slices import CaseDataset, Collate, DeviceSlices, SliceDataset
from mambaseg.data.splits import PARTS, listed
from mambaseg.data.survey import Surveyed, open_survey
from mambaseg.data.validation import checked_label_map, require_classes
from mambaseg.data.volume import slice_axis
from mambaseg.errors import UserError

Entries = TypeVar("Entries", VolumeCache, tuple[Surveyed, ...])
log = logging.getLogger(__name__)


class SegmentationDataModule(StepDataModule):
    """Training batches on the network's grid, evaluation cases at native size.

    A training batch is, after the transfer to the device, `image` (B, C, S, T) float32, `label`
    (B, S, T) int64, `case` (list of ids), `slice` (list of numbers), `step` (int), `position` (B,):
    the places in the global batch of that step, and `labelled`: how many samples, the first ones,
    have a label. An evaluation batch is one case: `case` (the `Case`), `image` (Z, C, H, W)
    float32, intensity-scaled, on the device, `label` (Z, H, W) uint8 on the CPU (where it is
    scored), `spacing` in mm (z, y, x) or None.

    `options` are those of `StepDataModule`; `size` has the sides S, T of the network's grid. With
    `on_device` the training slices are kept in the device's memory and gathered there, which
    changes no value; `auto`: on a CUDA device with room for them. `class_remarks` is (class names,
    class -> median voxels of a case that has it) -> what is odd about the sizes, for data sets that
    circulate in several orders of classes.
    """

    def __init__(
        self,
        *,
        find_cases: Callable[[Path], list[Case]],
        root: str | Path,
        class_names: Sequence[str],  # background first
        cache_dir: str | Path = "data/cache",  # of the decoded files
        num_classes: int | None = None,  # as many as there are names
        prepare: Callable[[Path], object] | None = None,  # makes the data set on first use
        split: str = "ssl4mis",  # see `make_split`
        fold: int = 0,
        folds: int = 5,  # of the split kfold
        split_by: str | None = None,  # a fact of patients whose values are the folds
        split_seed: int = 0,  # the run's seed does not change who is tested
        preprocessing: str = "paper",  # a preset, see `Preprocessing` also for the next six
        intensity: str | None = None,
        window: Window | None = None,
        spacing: float | Sequence[float] | None = None,
        ct: Sequence[CtValues | None] | None = None,
        neighbours: int = 0,  # slices above and below as channels; multiplies `in_channels`
        longest_side: int | None = None,  # what `find_cases` reduces pictures to
        augmentation: str | Mapping[str, Operation | None] = "paper",  # see `Augmentation`
        label_map: Mapping[int, int] | None = None,  # every value in the label files -> class
        regions: Mapping[str, Sequence[int]] | None = None,  # scored in place of the classes
        on_device: bool | Literal["auto"] = "auto",
        class_remarks: Callable[[Sequence[str], Mapping[str, float]], list[str]] | None = None,
        slicing: str = "stored",  # a rule of `slice_axis`
        labels: Labels = "dense",  # which of them training reads
        labelled: float | Sequence[str] | None = None,  # see `labelled_patients`
        unlabelled_images: str | Path | None = None,  # see `find_unlabelled`
        ignore_label: int | None = None,  # value in the label files that says nothing
        oversample: float = 0.0,  # share of a batch's samples that must show foreground
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_class_names(class_names, "data.class_names")
        num_classes = len(class_names) if num_classes is None else num_classes
        if len(class_names) != num_classes:
            raise UserError(
                f"data.class_names has {len(class_names)} names for num_classes={num_classes}: "
                "name every class, background first"
            )
        self.root, self.cache_dir = (Path(place).expanduser() for place in (root, cache_dir))
        self.class_names, self.num_classes = class_names, num_classes
        self.structures = structures_of(class_names, regions)  # what is scored
        self.regions = None if regions is None else self.structures
        self.preprocessing = Preprocessing(
            preprocessing,
            self.size,
            intensity=intensity or "",
            window=window,
            spacing=spacing,
            ct=ct,
            longest_side=longest_side,
            neighbours=neighbours,
        )
        self._labels, self._labelled, self._oversample = labels, labelled, oversample
        self._further = partial(
            find_unlabelled, unlabelled_images, channels=self.in_channels, longest_side=longest_side
        )
        self._how: Any = {
            "cache_dir": self.cache_dir, "num_classes": num_classes, "channels": self.in_channels,
        }  # fmt: skip
        self._ignore = checked_ignore(ignore_label, num_classes, label_map)
        self.partial = labels != "dense" or ignore_label is not None
        self.augmentation = Augmentation(
            augmentation, self.preprocessing, self.seed, beyond=IGNORED if self.partial else 0
        )
        self.views = self.augmentation.views
        self._find_cases, self._prepare = find_cases, prepare
        self._label_map = checked_label_map(label_map, num_classes)
        self._class_remarks = class_remarks
        slice_axis(None, slicing)  # which must be a known rule
        self.slicing = slicing
        self._split_name, self._fold, self._split_seed = split, fold, split_seed
        self._folds, self._split_by = folds, split_by
        self._cache: VolumeCache | None = None
        if on_device not in (True, False, "auto"):
            raise UserError(f"data.on_device={on_device}: choose auto, true or false")
        self._on_device = on_device
        self._device_slices: DeviceSlices | None = None
        # what a method knows of training labels: (labels (B, H, W), cases, slices) -> labels
        self.relabel: (
            Callable[[torch.Tensor, Sequence[str], Sequence[int]], torch.Tensor] | None
        ) = None

    def load(self) -> None:
        """Find the data, split it, and open (or build) the decoded cache; later calls do nothing.

        Afterwards `split`, `fingerprint` (of the split's cases), `scored` (of those that are not
        trained on), `cases` (part -> list of `Case`) and `counts` are there. Cases of patients
        outside the split are neither read nor hashed.
        """
        if self._cache is not None:
            return
        alike = self._find()
        used, cache = self._divided(
            partial(open_cache, preprocessing=self.preprocessing, **self._how)
        )
        if self._copies:
            shown = "; ".join(listed(group) for group in self._copies)
            log.info("the same images belong to more than one patient: %s", shown)
        members = {part: set(getattr(self.split, part)) for part in PARTS}
        members["train"].update(self._unlabelled)
        self.cases: Mapping[str, list[Case]] = {
            part: [case for case in used if case.patient in members[part]] for part in PARTS
        }
        sources = {entry.case: entry.source for entry in cache.entries}
        self.fingerprint = fingerprint(sources)
        scored = {case.id for part in ("val", "test") for case in self.cases[part]}
        self.scored = fingerprint({name: sources[name] for name in scored})
        own = (case.id for case in used if case.patient not in self._unlabelled)
        self.images = digest_of(sorted((name, cache.entry(name).content) for name in own))
        for case in used if self.preprocessing.windowed else ():
            entry = cache.entry(case.id)
            try:
                self.preprocessing.resampled(entry.label_shape[1:], entry.pixel)
            except UserError as error:
                raise UserError(f"{case.image_path}: {error}") from error
        if self.unlabelled and all(case.labelled for case in self.cases["train"]):
            raise UserError(
                "the method learns from unlabelled images too, and the training reads all labels: "
                "say whose, such as data.labelled=7 (patients) or 0.1 (a share of them), or where "
                "other images are, data.unlabelled_images=<folder>"
            )
        self._cache, entries = cache, [cache.entry(name) for name in sorted(scored)]
        note = open_note([(one.unlabelled, one.stop - one.offset) for one in entries])
        self.split = replace(self.split, note=f"{self.split.note} {note}".strip())
        self._log(cache, alike)

    @property
    def supervision(self) -> dict[str, Any]:
        """Which labels the training reads, in numbers of patients."""
        train = self.cases["train"]
        patients = {case.patient for case in train}
        labelled = {case.patient for case in train if case.labelled}
        return {"labelled": len(labelled), "patients": len(patients), "labels": self._labels}

    def _find(self) -> Alike | None:
        """Find all cases as the configuration reads them; what suggests patients among them."""
        if self._prepare is not None:
            self._prepare(self.root)
        found = [
            replace(case, label_map=self._label_map, slicing=self.slicing, ignore=self._ignore)
            for case in self._find_cases(self.root)
        ]
        named = dict(pair for case in found for pair in case.value_names)
        mapping = None if self._label_map is None else dict(self._label_map)
        require_named_values(named, self.class_names, label_map=mapping)
        self._found, alike = found, find_alike(found)
        further = (replace(case, slicing=self.slicing) for case in self._further())
        self._unlabelled = {case.patient: case for case in further}
        how: Any = {"fold": self._fold, "seed": self._split_seed, "alike": alike}
        how |= {"count": self._folds, "by": self._split_by}
        self._split = partial(split_cases, self._split_name, found, self.root, **how)
        return alike

    def _divided(self, read: Callable[[list[Case]], Entries]) -> tuple[list[Case], Entries]:
        """Split the cases, and `read` those of the split; who shows the same stays together."""
        self.split = drawn = self._split()
        before = self._used(settled=False)
        entries = read(before)
        contents = {one.case: one.content or one.source for one in entries}
        groups = patients_with_same_images(before, contents)
        self._copies = of_labelled(groups, self._unlabelled)
        self.split = self._split(duplicates=self._copies) if self._copies else drawn
        require_unseen(groups, self._unlabelled, self.split)
        used = self._used()
        return used, entries if used == before else read(used)

    def _used(self, *, settled: bool = True) -> list[Case]:
        """The split's cases with the labels that may be read."""
        split = self.split
        labelled = labelled_patients(split, self._labelled, settled=settled)
        evaluated, trained, told = {*split.val, *split.test}, set(split.train), set(labelled)
        note = supervision_note(split, labelled, self._labels, len(self._unlabelled))
        self.labelled = labelled if self._unlabelled or len(labelled) < len(split.train) else None
        self.split = replace(split, note=f"{split.note} {note}".strip())
        return [
            case if case.patient in evaluated else for_training(case, told, self._labels)
            for case in sorted(self._found, key=lambda case: case.id)
            if case.patient in evaluated or case.patient in trained
        ] + [*self._unlabelled.values()]

    def survey(self, *, greys: bool) -> list[Surveyed]:
        """What a plan is made of: shapes and voxel sizes of the training cases, and `greys`."""
        self._find()
        used, found = self._divided(partial(open_survey, greys=greys, **self._how))
        self.split.require_training()
        trained = {case.id for case in used if case.patient in self.split.train}
        return [one for one in found if one.case in trained]

    def _log(self, cache: VolumeCache, alike: Alike | None) -> None:
        """Say what the parts hold, and what about it is odd."""
        if alike:
            log.warning("%s. %s", alike.problem, alike.remedy)
        pairs = sides_of_one(self.class_names)
        if pairs and self.augmentation.views in ("flips", "all"):
            log.warning("the augmentation mirrors images and keeps their labels, so a network "
                        "cannot tell %s apart by the side; augmentation=none does not mirror",
                        ", ".join(" and ".join(pair) for pair in pairs))  # fmt: skip
        for part, counts in self.counts.items():
            held = ((n, what.removesuffix("s") if n == 1 else what) for what, n in counts.items())
            log.info("%s: %s", part, ", ".join(f"{n} {what}" for n, what in held))
        whole = [entry for entry in cache.entries if not entry.unlabelled] or cache.entries
        voxels = np.array([entry.class_voxels for entry in whole])[:, 1:]
        columns = zip(self.class_names[1:], voxels.T, strict=True)
        # of the cases that have the class: shows exchanged names
        sizes = {n: float(np.median(c[c > 0])) if c.any() else 0.0 for n, c in columns}
        log.info("median voxels of a case: %s",
                 ", ".join(f"{name} {size:,.0f}" for name, size in sizes.items()))  # fmt: skip
        for remark in self._class_remarks(self.class_names, sizes) if self._class_remarks else ():
            log.warning(remark)

    @property
    def cache(self) -> VolumeCache:
        """The decoded cache; loads the data if that has not been done."""
        self.load()
        assert self._cache is not None
        return self._cache

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of patients (where they are known), cases and slices of each part."""
        cache = self.cache
        counts = {}
        for part, cases in self.cases.items():
            known = not any(case.patient_assumed for case in cases)
            counts[part] = {"patients": len({case.patient for case in cases})} if known else {}
            entries = [cache.entry(case.id) for case in cases]
            counts[part] |= {"cases": len(cases), "slices": sum(one.shape[0] for one in entries)}
            labelled = [one for one, case in zip(entries, cases, strict=True) if case.labelled]
            if len(labelled) < len(cases):
                counts[part]["labelled"] = len(labelled)
            if in_part := sum(one.unlabelled > 0 for one in labelled):
                counts[part]["labelled in part"] = in_part
        return counts

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a training image, with its neighbours."""
        return self.in_channels * self.preprocessing.slices, *self.preprocessing.sides

    def setup(self, stage: str) -> None:
        """Load the data; `UserError` if a set has no foreground or training lacks a class."""
        cache = self.cache
        if stage == "fit":
            self.split.require_training()
        for part in {"fit": PARTS, "validate": ("val",), "test": ("test",)}.get(stage, ()):
            cases = [case for case in self.cases[part] if case.labelled]
            patients = listed({case.patient for case in cases})
            where = f"the {part} part of split {self.split.name} ({patients})"
            require_classes(
                [cache.entry(case.id).class_voxels for case in cases], self.class_names, where,
                cases[0].label_path or cases[0].image_path, every=part == "train",
            )  # fmt: skip

    def training_data(self) -> tuple[SliceDataset, Collate]:
        """Return the slices of the training cases, and what makes a batch of them."""
        labelled, others = ([case.id for case in self.cases["train"] if case.labelled == known]
                            for known in (True, False))  # fmt: skip
        unlabelled = others if self.unlabelled else ()
        slices = SliceDataset(self.cache, labelled, unlabelled, preprocessing=self.preprocessing)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self._device_slices = None
        if DeviceSlices.fit(slices, device) if self._on_device == "auto" else self._on_device:
            slices.arrays = False
            self._device_slices = DeviceSlices(slices, device)
            log.info("training slices are in the memory of %s: %d MiB",
                     device, DeviceSlices.size(slices) >> 20)  # fmt: skip
        return slices, Collate(self.augmentation)

    def required(self, dataset: Dataset[Any]) -> Foreground | None:
        """Return what draws the samples that must show foreground."""
        if not self._oversample:
            return None
        assert isinstance(dataset, SliceDataset)
        return Foreground(dataset, self.num_classes, self._oversample, self.seed)

    def teardown(self, stage: str) -> None:
        """Let go of the slices in the device's memory when a training is over."""
        self._device_slices = None

    def evaluation_data(self, part: str) -> CaseDataset:
        """Return the cases of a part."""
        return CaseDataset(self.cache, self.cases[part])

    def transferred(self, batch: Batch) -> Sequence[str]:
        """Name what the network needs; labels of evaluation cases stay where they are scored."""
        if isinstance(batch["case"], Case):  # evaluation
            return ("image",)
        slices = ("image", "label") if self._device_slices is None else ("item",)
        return (*slices, "shape", "augmentation")

    def for_task(self) -> dict[str, Any]:
        """Return the way to the grid and back, the names of the classes, the unit of distances."""
        cache, scored = self.cache, [*self.cases["val"], *self.cases["test"]]
        known = all(cache.entry(case.id).spacing is not None for case in scored)
        return {
            "preprocessing": self.preprocessing,
            "class_names": self.class_names,
            "distances": "mm" if known else "vox",
            **({"partial": True} if self.partial else {}),
            **({"regions": self.regions} if self.regions else {}),
        }

    def known(self, part: str) -> list[Known]:
        """Return the cases of a part with what their images show."""
        cache, cases = self.cache, self.cases[part]
        return [Known(case.id, case.patient, tuple(cache.entry(case.id).content.split()))
                for case in cases]  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Return the preprocessing as plain data."""
        return self.preprocessing.describe()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch on its device and bring it onto the grid."""
        if "augmentation" not in batch:
            return batch
        rest = dict(batch)
        shape, parameters = rest.pop("shape"), rest.pop("augmentation")
        if self._device_slices is None:
            image, label = rest.pop("image"), rest.pop("label")
        else:
            image, label = self._device_slices.gather(rest.pop("item"), shape, rest.pop("padded"))
        if self.relabel is not None:
            label = self.relabel(label, rest["case"], rest["slice"])
        image, label = self.augmentation(image, label, shape, parameters)
        return {"image": image, "label": label, **rest}
