"""Calibrates a trained network: its temperature, how reliable it is, and when to look twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaseg.data.classes import IGNORED
from mambaseg.errors import UserError
from mambaseg.evaluation.calibration import REGIONS, Reliability, fit_temperature
from mambaseg.inference.segment import Member, case_uncertainty, native_logits, segment

LARGEST = 2**26  # logits that are kept to fit the temperature: 256 MiB
QUANTILE = 0.95  # of the validation cases' uncertainties, above which a case is flagged
Cases = Sequence[dict[str, Any]]  # of a data module: `image`, `label`, `spacing`


def calibrate(
    member: Member,
    validation: Cases,
    test: Cases,
    *,
    fitted: dict[str, Any] | None = None,
    batch_size: int = 24,
) -> dict[str, Any]:
    """Fits a network's temperature on the validation cases and measures it on the test cases.

    All voxels with a label of all cases at native resolution count; where they are more than
    `LARGEST` / K, every n-th one fits the temperature. `foreground` are the voxels that the
    reference or the network does not call background.

    Args:
        member: the network in one view; its own temperature is not used.
        validation: cases that chose the network's best state; not read where `fitted` is given.
        test: cases to measure it on.
        fitted: the result of an earlier call, whose temperature and thresholds are taken.
        batch_size: slices per forward pass.

    Returns:
        `temperature`, `fitted_on` (cases, voxels, of which every n-th), `flag` (quantile, cases,
        thresholds of `case_uncertainty` with and without the temperature), `test` (cases; region ->
        `plain` and `calibrated`: see `Reliability.plain`). Plain data.

    Raises:
        UserError: there are no validation cases.
    """
    if fitted is None:
        if not len(validation):
            raise UserError("calibration=true: the data have no validation set, which fits it")
        fitted = _fit(member, validation, batch_size)
    temperatures = {"plain": 1.0, "calibrated": float(fitted["temperature"])}
    found = {region: {how: Reliability() for how in temperatures} for region in REGIONS}
    for case in test:
        for logits, truth in _voxels(member, case, batch_size):
            inside = (truth > 0) | (logits.argmax(dim=1) > 0)
            for how, temperature in temperatures.items():
                scaled = logits / temperature
                found["all"][how].update(scaled, truth)
                found["foreground"][how].update(scaled[inside], truth[inside])
    scores = {region: {how: one.plain() for how, one in of.items()} for region, of in found.items()}
    kept = {key: fitted[key] for key in ("temperature", "fitted_on", "flag")}
    return {**kept, "test": {"cases": len(test), **scores}}


def _fit(member: Member, cases: Cases, batch_size: int) -> dict[str, Any]:
    voxels = sum(int((case["label"] != IGNORED).sum()) for case in cases)
    if not voxels:
        raise UserError("calibration=true: no voxel of the validation set has a label")
    kept: list[tuple[Tensor, Tensor]] = []
    every = first = 0
    for case in cases:
        for logits, truth in _voxels(member, case, batch_size):
            every = every or math.ceil(voxels * logits.shape[1] / LARGEST)
            # copies: a view would keep the whole batch
            kept.append((logits[first::every].clone(), truth[first::every].clone()))
            first = (first - len(truth)) % every
    logits, truth = (torch.cat(parts) for parts in zip(*kept, strict=True))
    temperature = fit_temperature(logits, truth)
    thresholds = {}
    for how, value in (("plain", 1.0), ("calibrated", temperature)):
        scaled = member._replace(temperature=value)
        scores = [_uncertainty(scaled, case, batch_size) for case in cases]
        known = [score for score in scores if score is not None]
        thresholds[how] = float(np.quantile(known, QUANTILE)) if known else None
    return {
        "temperature": temperature,
        "fitted_on": {"cases": len(cases), "voxels": voxels, "every": every},
        "flag": {"quantile": QUANTILE, "cases": len(known), "thresholds": thresholds},
    }


def _voxels(
    member: Member, case: dict[str, Any], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (N, K) and classes (N,) of a case's labelled voxels on the CPU, in several parts."""
    start, how = 0, {"spacing": case["spacing"], "batch_size": batch_size}
    for logits in native_logits(member, case["image"], **how):
        truth = case["label"][start : start + len(logits)].long()
        start += len(logits)
        known = truth.flatten() != IGNORED
        yield logits.cpu().movedim(1, -1).flatten(0, -2)[known], truth.flatten()[known]


def _uncertainty(member: Member, case: dict[str, Any], batch_size: int) -> float | None:
    how = {"spacing": case["spacing"], "batch_size": batch_size}
    found = segment([member], [case["image"]], uncertainty=True, **how)
    assert found.uncertainty is not None
    return case_uncertainty(found.uncertainty, found.labels)
