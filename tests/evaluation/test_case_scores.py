import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mambaseg.errors import UserError
from mambaseg.evaluation.case_scores import CaseScores
from mambaseg.evaluation.metrics import score_case
from mambaseg.evaluation.summary import summarise

CLASSES = ("background", "RV", "MYO")


@dataclass(frozen=True)
class FakeCase:
    id: str
    patient: str = "patient001"
    phase: str = "ED"
    group: str | None = "DCM"


def volumes(seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (2, 3, 6, 6), np.uint8))


def test_rows_say_which_case_they_are_of_and_hold_what_score_case_says():
    scores = CaseScores(class_names=CLASSES, policy="penalty", tolerance_mm=3.0, tolerance_vox=2.0)
    scores.update(FakeCase("b_ED"), *volumes(1), spacing=(5.0, 1.0, 1.0))
    scores.update(FakeCase("a_ES", "patient002", "ES", None), *volumes(2))
    assert [row["case"] for row in scores.rows] == ["a_ES"] * 3 + ["b_ED"] * 3
    first, last = scores.rows[0], scores.rows[-1]
    assert first["patient"] == "patient002" and first["phase"] == "ES" and first["group"] is None
    assert last["class_name"] == "MYO" and last["class"] == 2
    expected = score_case(
        *volumes(1).numpy(), num_classes=3, spacing=(5.0, 1.0, 1.0), policy="penalty",
        tolerance_mm=3.0, tolerance_vox=2.0,
    )  # fmt: skip
    assert [{key: row[key] for key in expected[0]} for row in scores.rows[3:]] == expected


def test_compute_summarises_all_cases_and_a_case_seen_twice_counts_once():
    scores = CaseScores(class_names=CLASSES)
    scores.update(FakeCase("a_ED"), *volumes(1))
    scores.update(FakeCase("b_ES", phase="ES"), *volumes(2))
    once = scores.compute()
    scores.update(FakeCase("a_ED"), *volumes(1))
    assert scores.compute() == once == {**summarise(scores.rows, CLASSES), "slices": 3}
    assert once["cases"] == 2 and set(once["by_phase"]) == {"ED", "ES"}


def test_reset_forgets_all_cases():
    scores = CaseScores(class_names=CLASSES)
    scores.update(FakeCase("a_ED"), *volumes(1))
    scores.compute()
    scores.reset()
    scores.update(FakeCase("b_ED"), *volumes(2))
    assert scores.compute()["cases"] == 1


def test_nothing_of_the_scores_is_in_a_checkpoint():
    scores = CaseScores(class_names=CLASSES)
    scores.update(FakeCase("a_ED"), *volumes(1))
    assert torch.nn.ModuleDict({"val": scores}).state_dict() == {}


def test_an_error_names_the_case():
    prediction, reference = volumes(1)
    reference[0, 0, 0] = 7
    with pytest.raises(UserError, match=r"patient042_ES: .*0 to 7"):
        CaseScores(class_names=CLASSES).update(FakeCase("patient042_ES"), prediction, reference)


SECOND_RANK = """
import json, sys
from test_case_scores import compute_as_rank
print(json.dumps(compute_as_rank(1, sys.argv[1])))
"""


def compute_as_rank(rank, folder):
    """Summary and rows as one of two ranks sees them; case 1 fills up the second rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        scores = CaseScores(class_names=CLASSES)
        for seed in ([1, 2], [3, 1])[rank]:
            scores.update(FakeCase(f"case{seed}"), *volumes(seed))
        return [scores.compute(), scores.rows]
    finally:
        dist.destroy_process_group()


def test_two_ranks_agree_with_one_process_on_summary_and_rows(tmp_path):
    command = [sys.executable, "-c", SECOND_RANK, str(tmp_path)]
    here = Path(__file__).parent
    with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True) as second:
        first = compute_as_rank(0, tmp_path)
        answers = [first, json.loads(second.communicate(timeout=120)[0])]
    alone = CaseScores(class_names=CLASSES)
    for seed in (1, 2, 3):
        alone.update(FakeCase(f"case{seed}"), *volumes(seed))
    assert answers == [[alone.compute(), alone.rows]] * 2


def test_only_partial_references_may_leave_pixels_open():
    reference = torch.zeros(1, 8, 8, dtype=torch.uint8)
    reference[:, 2:6, 2:6] = 1
    prediction = reference.clone()
    prediction[:, 6:] = 1  # wrong, where nothing is known
    reference[:, 6:] = 255
    with pytest.raises(UserError, match="patient042_ES"):
        CaseScores(class_names=CLASSES).update(FakeCase("patient042_ES"), prediction, reference)
    scores = CaseScores(class_names=CLASSES, partial=True)
    scores.update(FakeCase("patient042_ES"), prediction, reference)
    known = CaseScores(class_names=CLASSES)  # as if what is not known were not there
    known.update(FakeCase("patient042_ES"), prediction[:, :6], reference[:, :6])
    assert scores.rows == known.rows
    assert [row["dice"] for row in scores.rows] == [1.0, 1.0, None]
    with pytest.raises(UserError, match="patient042_ES"):
        scores.update(FakeCase("patient042_ES"), prediction[:, :4], reference)


def test_distances_are_in_voxels_where_the_spacing_of_a_case_is_unknown():
    mask = np.zeros((2, 4, 4), np.uint8)
    mask[:, 1:3] = 1
    known, unknown = (score_case(mask, mask, num_classes=2, spacing=s) for s in ((5, 1, 1), None))
    for rows, unit in ((known, "mm"), (unknown, "vox"), ([*known, *unknown], "vox")):
        assert summarise(rows, ("background", "RV"))["convention"]["distances"] == unit
