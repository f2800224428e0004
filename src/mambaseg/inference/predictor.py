"""Label maps of images that have no reference: from files through networks to files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mambaseg.data.classes import Structures, structures_of
from mambaseg.data.formats import dicom_seg
from mambaseg.data.formats.images import Source, pictures_apart
from mambaseg.data.formats.nifti import to_nifti
from mambaseg.data.formats.pictures import label_picture, reduced
from mambaseg.data.seen import Seen, fingerprint_of, how_seen
from mambaseg.data.validation import DataError
from mambaseg.data.volume import Volume, slice_axis, unsliced
from mambaseg.errors import UserError, counted, within_memory
from mambaseg.evaluation.largest import keep_largest, parts_of
from mambaseg.inference.results import BESIDE, require_own_names, result_files
from mambaseg.inference.segment import Member, case_uncertainty, segment
from mambaseg.inference.uncertainty import read_about, require_own_table, write_table
from mambaseg.reporting.figures import case_slices, draw_cases
from mambaseg.reporting.views import drawn
from mambaseg.storage.files import no_room, write_whole
from mambaseg.storage.untrusted import printable, readable

_DRAWN = 1024  # pixels of a picture that are drawn
_OTHERWISE = "choose another folder with output=..."
_INSTEAD = f"{_OTHERWISE}, or rerun=true to replace it"
_write = partial(write_whole, otherwise=_OTHERWISE)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What to do and what to write beside the label map."""

    keep_largest: bool | Structures = False  # component in each volume, of all or some structures
    probabilities: bool = False
    uncertainty: bool = False
    overlay: bool = False  # a picture; of a cine its first frame
    dicom_seg: bool | Literal["auto"] = "auto"  # of a DICOM series; `auto`: where it is possible
    batch_size: int = 24  # slices per forward pass
    precision: str = "32-true"  # or `bf16-mixed`
    rerun: bool = False  # predict again what is there


@dataclass
class Outcome:
    """Names of the images by their result, and sums over those that are done."""

    done: list[str] = field(default_factory=list)  #: their label maps are written
    skipped: list[str] = field(default_factory=list)  #: their results were there
    failed: dict[str, str] = field(default_factory=dict)  #: name -> why
    empty: list[str] = field(default_factory=list)  #: of `done`, those of background alone
    flagged: list[str] = field(default_factory=list)  #: whose uncertainty says: look at it
    voxels: dict[str, int] = field(default_factory=dict)  #: of each class
    slices: int = 0  #: of all images
    seconds: float = 0.0  #: for everything

    def require_all(self) -> None:
        """Raises `UserError` where an image failed."""
        if self.failed:
            count = len(self.failed) + len(self.done) + len(self.skipped)
            listed = "".join(f"\n  {name}: {why}" for name, why in self.failed.items())
            raise UserError(printable(f"{len(self.failed)} of {count} failed:{listed}"))


class Prediction(NamedTuple):
    """(T, Z, H, W) labels; (T, K, Z, H, W) probabilities, 255 is 1, or None; likewise uncertainty.

    `uncertainty` is (T, Z, H, W), `scores` the `case_uncertainty` of each frame that has one.
    """

    labels: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.uint8] | None
    uncertainty: npt.NDArray[np.uint8] | None = None
    scores: Sequence[float | None] = ()


class Predictor:
    """Trained networks with what is done to every image.

    Args:
        members: networks of the same classes and `channels`, in evaluation mode, on one device.
        made_by: plain data that says which networks these are, for every sidecar.
        trained_on: titles of the data that they were trained on.
        slicing: how a volume is cut into slices, a rule of `slice_axis`.
        seen: the images that each network has learnt from; empty if that is not known.
        flag_above: uncertainty of an image above which it is flagged; None: it is not known.
        regions: name -> labels of what was scored in place of the classes.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        channels: int,
        class_names: Sequence[str],
        made_by: Sequence[Mapping[str, Any]],
        options: Options,
        trained_on: Sequence[str] = (),
        slicing: str = "stored",
        seen: Sequence[Seen] = (),
        flag_above: float | None = None,
        regions: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.flag_above, self.regions = flag_above, regions
        self.members, self.class_names, self.options = members, class_names, options
        self.channels, self.trained_on = channels, list(dict.fromkeys(trained_on))
        self.slicing, self.seen = slicing, seen
        # data sets that reduce pictures have one file per image
        self.one_file = any(member.preprocessing.longest_side for member in members)
        self.kept = parts_of(options.keep_largest, structures_of(class_names, regions))
        views = [member.views for member in members]
        # what decides the labels: another recipe is another result
        self.recipe: dict[str, Any] = {
            "networks": list(made_by),
            "tta": views[0] if len(set(views)) == 1 else views,
            "keep_largest": {name: list(labels) for name, labels in self.kept.items()}
            if isinstance(options.keep_largest, Mapping)
            else options.keep_largest,
            "precision": options.precision,
        }
        if slicing != "stored":
            self.recipe["slicing"] = slicing
        if any(member.temperature != 1 for member in members):
            self.recipe["temperature"] = [round(member.temperature, 6) for member in members]
        self.title = " + ".join(str(one["model"]) for one in made_by)

    def predict(self, sources: Sequence[Source], output: Path) -> Outcome:
        """Predicts what is not there yet; one image that fails does not stop the others.

        Raises:
            UserError: the folder holds results of other images, networks or options, or a package
                is missing for what is asked.
        """
        from rich.progress import track

        sources = pictures_apart(sources) if self.one_file else sources
        if self.options.dicom_seg is True:
            dicom_seg.require_series(source.series for source in sources)
        if self.options.uncertainty:
            require_own_table(output, otherwise=_OTHERWISE)
        require_own_names({source: self._written(source) for source in sources}, output)
        outcome, start = Outcome(), time.perf_counter()
        waiting: list[Source] = []
        for source in sources:
            if not self.options.rerun and self._is_finished(source, output):
                outcome.skipped.append(source.name)
            else:
                waiting.append(source)
        for source in track(waiting, description="images", disable=not waiting, transient=True):
            name = source.name
            try:
                slices, voxels = self._one(source, output)
                outcome.slices += slices
                outcome.voxels = {key: outcome.voxels.get(key, 0) + n for key, n in voxels.items()}
                if not any(list(voxels.values())[1:]):
                    outcome.empty.append(name)
                outcome.done.append(name)
            except Exception as error:  # reported at the end, whatever it is
                if no_room(error):  # all that follow would be computed for nothing
                    raise
                known = isinstance(error, UserError)
                outcome.failed[name] = str(error) if known else f"{type(error).__name__}: {error}"
                log.error("%s failed: %s", name, printable(outcome.failed[name]))
                log.debug("%s", name, exc_info=not known)
        told = sources if self.options.uncertainty else ()
        names = [source.name for source in told if source.name not in outcome.failed]
        outcome.flagged = write_table(output, names, self.flag_above, otherwise=_OTHERWISE)
        outcome.seconds = time.perf_counter() - start
        return outcome

    def _one(self, source: Source, output: Path) -> tuple[int, dict[str, int]]:
        """Reads, predicts and writes one image; returns its slices and the voxels of each class."""
        digest = source.digest()
        image = self.read(source)
        prediction = self.segment(image)
        files, beside = result_files(source, output), self._beside(source)
        before = read_about(files["about"])  # without `rerun` of the same networks and image
        anew = self.options.rerun or "unfinished" in before
        kept = set() if anew else set(before.get("beside", ()))
        counts = np.bincount(prediction.labels.ravel(), minlength=len(self.class_names))
        voxels = dict(zip(self.class_names, counts.tolist(), strict=True))
        about: dict[str, Any] = {
            "labels": {name: index for index, name in enumerate(self.class_names)},
            **({"regions": self.regions} if self.regions else {}),
            "image": readable(source.path.name),
            "image_digest": digest,
            "spacing_mm": image.spacing and [round(side, 6) for side in image.spacing],
            "voxels": voxels,
            "seen": self._seen(image),
            "made_by": self.recipe,
        }
        if "uncertainty" in beside | kept:
            about["uncertainty"] = prediction.scores or before.get("uncertainty")
        earlier = {*before.get("beside", ())}
        known = sorted(self._written(source) | earlier)  # what an interruption may leave
        _write(files["about"], _json({**about, "beside": known, "unfinished": True}))
        for other in earlier - beside - kept:
            files[other].unlink(missing_ok=True)  # it would belong to other labels
        if prediction.uncertainty is not None:
            _write(files["uncertainty"], _uncertainty_map(image, prediction.uncertainty))
        if prediction.probabilities is not None:
            content = to_nifti(prediction.probabilities, image.header, slope=1 / 255)
            _write(files["probabilities"], content)
        if self.options.overlay:
            self._draw(source, image, prediction, files["overlay"])
        _write(files["labels"], label_map(image, prediction.labels))
        if source.series and self.options.dicom_seg:
            beside |= self._write_dicom_seg(source, prediction, files["dicom_seg"])
        _write(files["about"], _json({**about, "beside": sorted(beside | kept)}))
        return int(len(image.image) * image.image.shape[(1, 3, 4)[self._axis(image)]]), voxels

    def _seen(self, image: Volume) -> dict[str, Any]:
        """Whether the networks have learnt from an image: what scores of its labels must say."""
        sides = {member.preprocessing.longest_side for member in self.members}
        prints = {
            fingerprint_of(reduced(frame, side) if image.flat else frame)
            for frame in image.image
            for side in sides
        }
        checked = bool(self.seen) and all(seen.complete for seen in self.seen)
        return {"checked": checked, "how": how_seen(sorted(prints), self.seen)}

    def read(self, source: Source) -> Volume:
        """An image as the networks take it.

        Raises:
            UserError: it cannot be read, or has another number of channels.
        """
        if self.one_file and source.is_picture and source.further:
            problem = f"is one of {1 + len(source.further)} pictures, the networks take each alone"
            raise DataError(problem, source.path, "Name one of them.")
        image = source.read(self.channels)
        if (channels := image.image.shape[2]) != self.channels:
            raise DataError(
                f"the image has {channels} channels, the networks take {self.channels}",
                source.path,
                "Predict images like those that the networks were trained on.",
            )
        return image

    def segment(self, image: Volume) -> Prediction:
        """Every frame on its own, as a volume of a training set is; on the image's own grid.

        Raises:
            UserError: the memory does not suffice.
        """
        axis = self._axis(image)
        image = image.sliced(axis)
        labels, probabilities, uncertainty, scores = [], [], [], []
        device = next(self.members[0].network.parameters(), torch.zeros(())).device
        bf16, size = self.options.precision == "bf16-mixed", self.options.batch_size
        less = f"A smaller batch_size needs less; it is {counted(size, 'slice')} at a time."
        for frame in image.image:
            scaled = []
            for used in (member.preprocessing for member in self.members):
                # pictures as large as those that the network learnt from
                shown = reduced(frame, used.longest_side) if image.flat else frame
                scaled.append(torch.from_numpy(used.scale_intensity(shown)))
            with within_memory(less), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                found = segment(
                    self.members,
                    scaled,
                    shape=(frame.shape[-2], frame.shape[-1]),
                    spacing=image.spacing,
                    probabilities=self.options.probabilities,
                    uncertainty=self.options.uncertainty,
                    batch_size=size,
                )
            volume = found.labels
            if found.uncertainty is not None:
                uncertainty.append(found.uncertainty.numpy())
                scores.append(case_uncertainty(found.uncertainty, volume))
            if self.kept:
                volume = keep_largest(volume, self.kept)
            labels.append(volume.cpu().numpy())
            if found.probabilities is not None:
                probabilities.append(found.probabilities.numpy().swapaxes(0, 1))
        kept = None
        if probabilities:  # may be large: those of a single frame are not copied
            several = len(probabilities) > 1
            stacked = np.stack(probabilities) if several else probabilities[0][None]
            kept = unsliced(stacked, axis, 2)
        maps = unsliced(np.stack(uncertainty), axis, 1) if uncertainty else None
        return Prediction(unsliced(np.stack(labels), axis, 1), kept, maps, scores)

    def _axis(self, image: Volume) -> int:
        """Which of the axes (z, y, x) of an image its slices are stacked along."""
        return slice_axis(image.spacing, self.slicing, image.grid)

    def _draw(self, source: Source, image: Volume, prediction: Prediction, path: Path) -> None:
        """Draws the slices as the networks saw them."""
        axis = self._axis(image)
        image = image.sliced(axis)
        frame = ", first frame" if len(image.image) > 1 else ""
        step = -(-max(image.image.shape[3:]) // _DRAWN) if image.flat else 1
        part = (..., slice(None, None, step), slice(None, None, step))
        labels = np.moveaxis(prediction.labels[0], axis, 0)[part]
        aspect = 1.0 if image.spacing is None else image.spacing[1] / image.spacing[2]
        draw_cases(
            {"": {"prediction": case_slices(drawn(image.image[0][part]), None, labels, aspect)}},
            headings={"prediction": "prediction"},
            class_names=self.class_names,
            title=printable(f"{source.name}{frame} · {self.title}, no reference"),
            path=path,
        )

    def _write_dicom_seg(self, source: Source, prediction: Prediction, path: Path) -> set[str]:
        """The labels as DICOM; under `auto` a series of which that cannot be said is warned of."""
        if self.options.dicom_seg == "auto" and not dicom_seg.available():
            return set()
        labels, names = prediction.labels, self.class_names
        try:
            content = dicom_seg.to_dicom_seg(
                source.series, labels, class_names=names, algorithm=self.title
            )
        except DataError as error:
            if self.options.dicom_seg != "auto":
                raise
            log.warning("%s", printable(f"no {path.name}: {error.path}: {error.problem}"))
            return set()
        _write(path, content)
        return {"dicom_seg"}

    def _beside(self, source: Source) -> set[str]:
        """Which of `BESIDE` the options ask for."""
        asked = {kind for kind in BESIDE if getattr(self.options, kind) is True}
        return asked if source.series else asked - {"dicom_seg"}

    def _written(self, source: Source) -> set[str]:
        """Which of `BESIDE` are written if they can be."""
        asked = self._beside(source)
        return asked | {"dicom_seg"} if source.series and self.options.dicom_seg else asked

    def _is_finished(self, source: Source, output: Path) -> bool:
        """Whether the results of this very image are there, made in the same way.

        Raises:
            UserError: what is there is something else, which is not replaced.
        """
        files, beside = result_files(source, output), self._beside(source)
        about, problem = read_about(files["about"]), ""
        mine = {"about", "labels", *about.get("beside", BESIDE)} if "made_by" in about else set()
        places = {kind: files[kind] for kind in ("about", "labels", *sorted(self._written(source)))}
        others = [path for kind, path in places.items() if kind not in mine and path.exists()]
        there = files["labels"]
        if others and "unfinished" not in about:
            there, problem = others[0], "was not made by this command"
        elif not mine:
            return False
        elif _ordered(about["made_by"]) != _ordered(self.recipe):
            problem = "was made by other networks or with other options (its .json says which)"
        else:
            try:
                digest = source.digest()
            except UserError:
                return False  # it will fail with its reason
            if about.get("image_digest") != digest:
                problem = f"was made from another image than {source.path}, or an earlier version"
        if problem:
            raise UserError(f"{there} {problem}: {_INSTEAD}")
        here = all(files[kind].is_file() for kind in ("labels", *beside))
        return here and "unfinished" not in about and beside <= {*about.get("beside", ())}


def _ordered(made_by: Any) -> tuple[Any, list[str]]:
    """A recipe so that it differs where the order of post-processing does."""
    kept = made_by.get("keep_largest") if isinstance(made_by, dict) else None
    return made_by, list(kept) if isinstance(kept, dict) else []


def label_map(image: Volume, labels: npt.NDArray[np.uint8]) -> bytes:
    """The content of the file that holds an image's labels (T, Z, H, W): PNG or .nii.gz."""
    if image.flat:
        return label_picture(labels[0, 0])
    return to_nifti(labels, image.header, label=True)


def _uncertainty_map(image: Volume, uncertainty: npt.NDArray[np.uint8]) -> bytes:
    """Likewise of the uncertainty, which a .nii.gz scales to 0..1."""
    if image.flat:
        return label_picture(uncertainty[0, 0])
    return to_nifti(uncertainty, image.header, slope=1 / 255)


def _json(about: Mapping[str, Any]) -> bytes:
    return (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
