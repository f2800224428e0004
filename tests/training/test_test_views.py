"""evaluation.tta: the test averages several views of each slice, validations do not."""

import json

import numpy as np
import torch

from mambaseg.app.networks import restore_network
from mambaseg.inference.segment import Member, segment
from runs import QUIET, UNET, trained


def test_the_test_averages_views_and_validations_do_not(small_run, tmp_path):
    words = [*small_run, *UNET, *QUIET, "trainer=cpu", "augmentation=modern", "data.steps=20",
             "data.val_every=10", "optim=adamw"]  # fmt: skip
    plain = trained(*words)
    run = trained(*words, "evaluation.tta=true")
    assert run.key != plain.key and run.score == plain.score
    summary = json.loads((run.folder.path / "metrics.json").read_text())
    assert summary["views"] == "flips"
    assert "views" not in json.loads((plain.folder.path / "metrics.json").read_text())

    network, checkpoint = restore_network(run.folder.path / "checkpoints" / "best.ckpt")
    case = run.data.cases["test"][0]
    image = torch.from_numpy(run.data.cache.image(run.data.cache.position(case.id)).copy())
    spacing = run.data.cache.entry(case.id).spacing
    counts = {}
    for views in ("none", "flips"):
        member = Member(network.eval(), checkpoint.preprocessing, views)
        labels = segment([member], [image], spacing=spacing).labels
        counts[views] = np.bincount(labels.flatten(), minlength=4).tolist()
    told = [row["voxels"] for row in run.task.results["rows"] if row["case"] == case.id]
    assert told == counts["flips"] != counts["none"]
    passes = [one.folder.record["cost"]["passes"] for one in (plain, run)]
    assert passes == [1.0, 4.0]  # the multiply-adds of a slice in a report are these times as many
