"""The package from Python: what the commands do, as functions; nobody has to know Hydra.

Overrides are those of the command line, one string each, so every page of the documentation holds
here too: `train("model=unet", "data.size=128")`. All functions raise `UserError` for what the user
can mend, and leave a Hydra application that calls them as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from yaml import YAMLError

from mambaseg.app.check import check_targets, checked
from mambaseg.app.entry import explained_errors
from mambaseg.app.overrides import arranged, composition_error, parsed
from mambaseg.app.own import search_path
from mambaseg.app.schema import TABLE, did_you_mean, take
from mambaseg.errors import UserError
from mambaseg.inference.found import distinct, find_run
from mambaseg.reporting.reading import read_identity, read_run
from mambaseg.reporting.runs import SEGMENTATION
from mambaseg.reporting.tables import headline
from mambaseg.storage.files import keep_caches

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from mambaseg.data.geometry import Preprocessing
    from mambaseg.data.volume import Spacing, Volume
    from mambaseg.inference.predictor import Outcome, Predictor
    from mambaseg.training.run import Run


class LoadOptions(TypedDict, total=False):
    """How a network labels images; conf/predict.yaml has the defaults."""

    device: str  #: `auto`, `cpu`, `cuda` or `mps`
    precision: Literal["auto", "32-true", "bf16-mixed"]  #: `auto` follows the device
    scan_backend: str  #: of networks that scan
    tta: bool | str  #: average over views of each slice; `True` takes those of the training
    keep_largest: bool | Literal["auto"]  #: the largest 3-D component; `auto`: as training chose
    calibrated: bool  #: divide logits by the temperature that an evaluation has fitted
    batch_size: int  #: slices at a time


class PredictOptions(LoadOptions, total=False):
    """The same, and what is written beside each label map."""

    probabilities: bool  #: `<name>_probabilities.nii.gz`
    uncertainty: bool  #: a map, and uncertainty.csv with flags
    overlay: bool  #: `<name>_overlay.png`
    dicom_seg: bool | Literal["auto"]  #: `<name>_seg.dcm` of a DICOM series
    rerun: bool  #: predict finished images again


@dataclass(frozen=True)
class Scores:
    """The scores of a test set.

    Attributes:
        path: the run folder that holds them.
        cases: a dictionary per case and class, as the lines of `cases.csv`: `case`, `patient`,
            `class_name`, `dice`, `hd95_mm`, ...; None where a score is undefined.
            `pandas.DataFrame(scores.cases)` takes them.
        summary: means and conventions, as `metrics.json`.
    """

    path: Path
    cases: Sequence[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def mean(self) -> float | None:
        """The mean foreground Dice, in 0..1; None where no case has one."""
        return headline(self.summary)[1]

    def __str__(self) -> str:
        return headline(self.summary)[0]


@dataclass(frozen=True)
class TrainedRun:
    """A trained network with all it needs to label images; `load_run` makes it.

    Attributes:
        path: the run folder or .ckpt file.
        predictor: network, preprocessing and options; what the command `predict` runs.
    """

    path: Path
    predictor: Predictor = field(repr=False)

    @property
    def network(self) -> nn.Module:
        """The network (B, C, H, W) -> logits (B, K, H, W) of any size, in evaluation mode.

        It takes images that `preprocessing` has scaled.
        """
        return self.predictor.members[0].network

    @property
    def preprocessing(self) -> Preprocessing:
        """The `Preprocessing` of the network's training."""
        return self.predictor.members[0].preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ..., the background first."""
        return tuple(self.predictor.class_names)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as config.yaml holds it.

        Raises:
            UserError: this is a .ckpt file without its run folder.
        """
        return read_identity(self.path)[1]

    @property
    def scores(self) -> Scores:
        """The scores of its test set.

        Raises:
            UserError: it was not scored.
        """
        return _scores(self.path)

    def predict(
        self, image: str | Path | npt.ArrayLike | Tensor, *, spacing: Spacing | None = None
    ) -> npt.NDArray[np.uint8]:
        """Labels of one image on its own grid, uint8 in 0..K-1.

        Args:
            image: a file or the folder of a DICOM series; or grey values as they are in a file,
                (H, W), (Z, H, W) or (Z, C, H, W), an array or a tensor.
            spacing: voxel size of an array in mm (z, y, x); None where it is unknown.

        Returns:
            (H, W) of a picture, (Z, H, W) of a volume, (T, Z, H, W) of a cine.

        Raises:
            UserError: the image cannot be read, or the network takes another number of channels.
        """
        if isinstance(image, str | Path):
            volume = self._read(Path(image))
            flat, single = volume.flat, len(volume.image) == 1
        else:
            import numpy as np

            from mambaseg.inference.arrays import volume_of

            volume = volume_of(image, channels=self.predictor.channels, spacing=spacing)
            flat, single = np.ndim(image) == 2, True
        labels = self.predictor.segment(volume).labels
        return labels[0, 0] if flat else labels[0] if single else labels

    def _read(self, path: Path) -> Volume:
        from mambaseg.data.formats.images import find_images, group_channels

        found = find_images(str(path), outside=path / "nothing is left out")
        if len(images := group_channels(found, self.predictor.channels)) != 1:
            raise UserError(
                f"{path} holds {len(images)} images: name one of them, or label them all with "
                "mambaseg.predict(run, input, output)"
            )
        return self.predictor.read(images[0])


def load_run(
    run: str | Path, *, config_dir: str | Path | None = None, **options: Unpack[LoadOptions]
) -> TrainedRun:
    """The trained network of a run.

    Args:
        run: a run folder (its best checkpoint) or a .ckpt file of this project; `newest` (of the
            runs in outputs/), a pattern that fits one run, or the folder of an experiment: its best
            run by validation score.
        config_dir: the folder with the config of a network of one's own, as `--config-dir`.
        **options: see `LoadOptions`.

    Raises:
        UserError: there is no such run, or it cannot be used.
    """
    path = find_run(run, segmenting=True)
    return TrainedRun(path.absolute(), _predictor([path], config_dir, options))


def train(*overrides: str, config_dir: str | Path | None = None) -> TrainedRun:
    """Trains a network, scores it on its test set, and loads it.

    The same overrides again give the finished run, or resume an interrupted one.

    Args:
        *overrides: as on the command line: `"model=unet"`, `"data.size=128"`.
        config_dir: a folder of one's own configs, as `--config-dir`.

    Raises:
        UserError: what the overrides ask for cannot be done.
    """
    with _run("config", overrides, config_dir) as run:
        if not run.finished:
            run.fit()
            run.evaluate()
    return load_run(run.folder.path, config_dir=config_dir)


def evaluate(
    run: str | Path | TrainedRun, *overrides: str, config_dir: str | Path | None = None
) -> Scores:
    """Scores a run on a test set: that of its own data, or of others.

    The scores are kept in a run folder of their own, below `outputs/evaluate`.

    Args:
        run: as `load_run` has it, or what it returned.
        *overrides: as on the command line: `"data=acdc"`, `"data.root=/another/hospital"`,
            `"evaluation.keep_largest=true"`, `"calibration=true"`.
        config_dir: as `load_run` has it.

    Raises:
        UserError: the data are missing, do not fit, or were seen in training.
    """
    path = run.path if isinstance(run, TrainedRun) else Path(run).expanduser()
    with _run("evaluate", (f"run={path}", *overrides), config_dir) as scoring:
        if not scoring.finished:
            scoring.evaluate()
    return _scores(scoring.folder.path)


def predict(
    run: str | Path | TrainedRun | Sequence[str | Path | TrainedRun],
    input: str | Path,
    output: str | Path,
    *,
    config_dir: str | Path | None = None,
    **options: Unpack[PredictOptions],
) -> Outcome:
    """Writes a label map, and what its labels mean, for each image.

    Args:
        run: as `evaluate` has it; several are an ensemble, whose probabilities are averaged.
        input: a file, a folder (with all below it) or a pattern such as `scans/*.nii.gz`.
        output: the folder for the results. Finished images are not predicted again.
        config_dir: as `load_run` has it.
        **options: see `PredictOptions`.

    Returns:
        Which images are done, were there already, or hold nothing but background.

    Raises:
        UserError: an image failed (the others are done), or the runs cannot be used.
    """
    from mambaseg.app.ensemble import predict_files

    runs = [run] if isinstance(run, str | Path | TrainedRun) else run
    paths = distinct(
        one.path if isinstance(one, TrainedRun) else find_run(one, segmenting=True) for one in runs
    )
    _, outcome = predict_files(
        str(input), Path(output).expanduser(), lambda: _predictor(paths, config_dir, options)
    )
    outcome.require_all()
    return outcome


def report(folder: str | Path, *, images: bool = True) -> Path:
    """Compares the finished runs of an experiment: tables, statistics, figures and one page.

    Args:
        folder: the folder of its run folders, `outputs/<experiment>`.
        images: False leaves out all pictures of patients, for a page that is published.

    Returns:
        The page, `<folder>/report/index.html`.

    Raises:
        UserError: no such folder, or no finished run.
    """
    from mambaseg.reporting.report import write_report

    return write_report(Path(folder).expanduser(), images=images)


def _predictor(
    paths: Sequence[Path], config_dir: str | Path | None, options: LoadOptions
) -> Predictor:
    from mambaseg.app.ensemble import restore_predictor

    if not paths:
        raise UserError("run: no run is named")
    for name in options:
        if name not in PredictOptions.__annotations__:
            near = did_you_mean(name, PredictOptions.__annotations__)
            raise UserError(f"{name}: there is no such option of a prediction{near}")
    given: Any = {
        key: take(key, value) if key in TABLE else value for key, value in options.items()
    }
    with explained_errors(UserError), our_hydra(config_dir):
        return restore_predictor(paths, **given)


def _scores(path: Path) -> Scores:
    run = read_run(path)
    return Scores(path, run.rows, dict(run.summary))


# ---- Hydra, out of sight ------------------------------------------------------------------------


@contextmanager
def _run(script: str, words: Sequence[str], config_dir: str | Path | None) -> Iterator[Run]:
    """The entered run of conf/<script>.yaml under these overrides."""
    from mambaseg.app.build import build
    from mambaseg.app.calibrate import prepare_calibration
    from mambaseg.app.run_data import with_run_data

    if strange := [word for word in words if not isinstance(word, str)]:
        raise UserError(
            f"{strange[0]!r}: each override is a string of its own, such as "
            f'mambaseg.train("model=unet", "data.size=128")'
        )
    options, overrides = arranged(words)
    if options:
        raise UserError(f"{options[0]}: options are for the command line; give overrides only")
    keep_caches()
    with explained_errors(UserError), our_hydra(config_dir):
        cfg = composed(script, overrides)
        if script == "config" and (task := cfg.data.get("task", SEGMENTATION)) != SEGMENTATION:
            raise UserError(
                f"data.task={task}: mambaseg.train loads what it has trained, and only networks "
                f"that segment can be loaded. The command `mambaseg train` trains for {task}."
            )
        run = build(with_run_data(cfg) if script == "evaluate" else cfg)
        calibrate = prepare_calibration(run, cfg)
        with run:
            yield run
        calibrate()


def composed(script: str, overrides: list[str]) -> DictConfig:
    """As the entry of the command composes and checks it."""
    cfg = composition(script, overrides)
    HydraConfig.instance().set_config(cfg)
    cfg = checked(cfg, script, overrides)
    check_targets(cfg)
    return cfg


def composition(script: str, overrides: list[str]) -> DictConfig:
    """As the entry of the command composes it, Hydra's own part too; UserError: it cannot be."""
    try:
        if swept := next((one for one in parsed(overrides) if one.is_sweep_override()), None):
            raise UserError(f"{swept.input_line}: a call takes one value: call it for each")
        return compose(script, overrides, return_hydra_config=True)
    except (HydraException, ValueError, AssertionError, YAMLError) as error:
        if (said := composition_error(error, script, overrides)) is None:
            raise
        raise UserError(said) from None


@contextmanager
def our_hydra(config_dir: str | Path | None) -> Iterator[None]:
    """Our configs as Hydra's for a while; what Hydra knew before comes back."""
    folder = None if config_dir is None else Path(config_dir).expanduser().resolve()
    if folder is not None and not folder.is_dir():
        raise UserError(f"config_dir={config_dir}: there is no such folder")
    before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        version.setbase("1.3")
        Hydra.create_main_hydra2("mambaseg", search_path([folder] if folder else []))
        yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = before
