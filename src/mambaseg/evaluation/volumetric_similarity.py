"""Volumetric similarity (Taha and Hanbury, BMC Medical Imaging 15:29, 2015, section 3.2)."""

import numpy as np
import numpy.typing as npt

from mambaseg.evaluation.metrics import Metric
from mambaseg.evaluation.surface import Spacing


class VolumetricSimilarity(Metric):
    """One minus the difference of two volumes relative to their sum, in [0, 1]."""

    def __init__(self) -> None:
        super().__init__("volumetric_similarity", "volumetric similarity")

    def measure(
        self,
        prediction: npt.NDArray[np.bool_],
        reference: npt.NDArray[np.bool_],
        spacing: Spacing | None,
    ) -> float | None:
        """The score; None where both masks are empty."""
        first, second = int(prediction.sum()), int(reference.sum())
        return None if first + second == 0 else 1 - abs(first - second) / (first + second)
