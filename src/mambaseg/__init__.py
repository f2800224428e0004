"""Mamba-UNet and its baselines for medical image segmentation.

Everything public is here: `from mambaseg import MambaUNet, load_run, train`. Names are imported
when they are first asked for, so `import mambaseg` alone imports neither torch nor Hydra.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambaseg.app.api import TrainedRun as TrainedRun
    from mambaseg.app.api import evaluate as evaluate
    from mambaseg.app.api import load_run as load_run
    from mambaseg.app.api import predict as predict
    from mambaseg.app.api import report as report
    from mambaseg.app.api import train as train
    from mambaseg.data.datamodule import SegmentationDataModule as SegmentationDataModule
    from mambaseg.data.geometry import Preprocessing as Preprocessing
    from mambaseg.errors import UserError as UserError
    from mambaseg.models import EMCAD as EMCAD
    from mambaseg.models import AnySize as AnySize
    from mambaseg.models import AttentionUNet as AttentionUNet
    from mambaseg.models import MambaUNet as MambaUNet
    from mambaseg.models import MambaUNetNoScan as MambaUNetNoScan
    from mambaseg.models import MambaUNetV2 as MambaUNetV2
    from mambaseg.models import MSVMUNet as MSVMUNet
    from mambaseg.models import RWKVUNet as RWKVUNet
    from mambaseg.models import SwinUMamba as SwinUMamba
    from mambaseg.models import SwinUMambaD as SwinUMambaD
    from mambaseg.models import SwinUNet as SwinUNet
    from mambaseg.models import TransUNet as TransUNet
    from mambaseg.models import UltraLightVMUNet as UltraLightVMUNet
    from mambaseg.models import UMamba as UMamba
    from mambaseg.models import UNet as UNet
    from mambaseg.models import UVMNet as UVMNet
    from mambaseg.models import VMUNet as VMUNet
    from mambaseg.models import VMUNetV2 as VMUNetV2
    from mambaseg.training.losses import DiceCE as DiceCE
    from mambaseg.training.segmentation import SegmentationTask as SegmentationTask

__version__ = "0.1.0"
_NAMES = {
    "mambaseg.app.api": "TrainedRun evaluate load_run predict report train",
    "mambaseg.data.datamodule": "SegmentationDataModule",
    "mambaseg.data.geometry": "Preprocessing",
    "mambaseg.errors": "UserError",
    "mambaseg.models": "AnySize AttentionUNet EMCAD MambaUNet MambaUNetNoScan MambaUNetV2 MSVMUNet "
    "RWKVUNet SwinUMamba SwinUMambaD SwinUNet TransUNet UMamba UNet UVMNet UltraLightVMUNet VMUNet "
    "VMUNetV2",
    "mambaseg.training.losses": "DiceCE",
    "mambaseg.training.segmentation": "SegmentationTask",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
