"""The protocol box, and overlays as cards."""

import base64
import io
import shlex

import numpy as np
from fake_runs import write_run
from PIL import Image

from mambaseg.reporting.cards import deck
from mambaseg.reporting.cautions import cautions
from mambaseg.reporting.collect import collect, repeats
from mambaseg.reporting.figures import overlay, overlay_cells
from mambaseg.reporting.protocol import commands, protocol_grid
from mambaseg.storage.colours import CLASS_COLOURS


def runs_with(folder, *overrides):
    """Runs of networks and seeds that their overrides name."""
    for words in overrides:
        named = dict(word.split("=", 1) for word in words if "=" in word)
        write_run(folder, named["model"], seed=int(named["seed"]), patients=(1,), size=16,
                  record={"overrides": list(words)})  # fmt: skip
    ((comparison,), _, _) = collect(folder)
    return comparison


def test_the_command_of_a_sweep_is_put_together_without_this_machines_places(tmp_path):
    own = ("data.root=/home/me/scans", "outputs=/scratch/x", "model.pretrained=/home/me/swin.pth",
           "data.patient_pattern='^(.+)_'")  # fmt: skip
    jobs = [(*own, f"model={m}", f"seed={s}") for m in ("unet", "mamba_unet") for s in (1, 2)]
    comparison = runs_with(tmp_path / "full", *jobs)
    shared = "model.pretrained=swin.pth \"data.patient_pattern='^(.+)_'\""
    line = f"mambaseg train -m {shared} model=unet,mamba_unet seed=1,2"
    assert commands(comparison.runs) == [line]
    some = runs_with(tmp_path / "some", *jobs[:3])
    assert commands(some.runs) == [
        f"mambaseg train -m {shared} model=unet seed=1,2",
        f"mambaseg train {shared} model=mamba_unet seed=1",
    ]
    rows = dict(protocol_grid(some).rows)
    assert rows["command"] == ";\n".join(commands(some.runs)), "Markdown has it in one line"
    assert rows["seeds"] == "unet: 1, 2; mamba_unet: 1"
    assert (rows["learning rate"], rows["device"]) == ("0.01", "a CPU, precision 32-true")


def test_a_config_in_a_folder_keeps_its_name_in_the_command(tmp_path):
    words = ["model=mine/deep", "seed=1", "init_from=/home/me/weights.pth"]
    write_run(tmp_path, "deep", patients=(1,), size=16, record={"overrides": words})
    ((comparison,), _, _) = collect(tmp_path)
    assert commands(comparison.runs) == [
        "mambaseg train model=mine/deep seed=1 init_from=weights.pth"
    ]


def test_a_command_keeps_its_values_as_they_were_typed(tmp_path):
    words = ["model=unet", "seed=1", "data.class_names=[background,left ventricle]",
             "data.patient_pattern='^(.+)/scan'", "callbacks.checkpoint.monitor=val/hd95_mm",
             "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping",
             "data.find_cases.extra=[/home/me/a,/home/me/b]"]  # fmt: skip
    write_run(tmp_path, "unet", patients=(1,), size=16, record={"overrides": words})
    ((comparison,), _, _) = collect(tmp_path)
    (line,) = commands(comparison.runs)
    words[-1] = "data.find_cases.extra=[a,b]"
    assert shlex.split(line) == ["mambaseg", "train", *words]


def test_a_training_that_ended_early_is_told_with_its_steps(tmp_path):
    steps = {"data.steps": 8, "data.val_every": 1}
    write_run(tmp_path, patients=(1,), size=16, config=steps, record={"steps": 8})
    write_run(tmp_path, seed=2, patients=(1,), size=16, config=steps, record={"steps": 2})
    ((comparison,), _, _) = collect(tmp_path)
    rows = dict(protocol_grid(comparison).rows)
    assert rows["steps"] == "8, validation every 1 / 8, ended after 2, validation every 1"
    early = [line for line in cautions(comparison) if "ended trainings early" in line]
    assert early == [
        "A callback or trainer.max_time ended trainings early: unet-sgd-seed2 (step 2)."
    ]


def test_weights_that_a_training_began_with_are_told_apart(tmp_path):
    for number in (1, 2):
        start = f"/home/me/out/unet-seed{number}-ab/checkpoints/best.ckpt"
        write_run(tmp_path, name=f"ft{number}", patients=(1,), size=16,
                  config={"init_from": start})  # fmt: skip
    ((comparison,), _, _) = collect(tmp_path)
    labels = sorted(entry.label for entry in comparison.entries)
    assert [f"unet-seed{number}-ab/best.ckpt" in label for number, label in
            enumerate(labels, start=1)] == [True, True]  # fmt: skip
    assert any("start from pretrained weights" in line for line in cautions(comparison))


def test_trainings_are_counted_with_their_folds(tmp_path):
    for fold in (0, 1):
        write_run(tmp_path, fold=fold, patients=(fold + 1,), size=16)
    ((comparison,), _, _) = collect(tmp_path)
    assert dict(protocol_grid(comparison).rows)["seeds"] == "1 (2 trainings per network)"
    assert repeats(comparison.entries[0]) == "1 × 2 folds"
    write_run(tmp_path, fold=0, seed=2, patients=(1,), size=16)
    write_run(tmp_path, "mamba_unet", fold=0, patients=(1,), size=16)
    write_run(tmp_path, "mamba_unet", fold=0, seed=2, patients=(1,), size=16)
    ((comparison,), _, _) = collect(tmp_path)
    assert dict(protocol_grid(comparison).rows)["seeds"] == "1, 2 (2 to 3 trainings per network)"
    assert [repeats(entry) for entry in comparison.entries] == ["2 (3 runs)", "2 × 1 fold"]


def test_a_command_that_deletes_a_key_is_told_as_it_is_typed(tmp_path):
    comparison = runs_with(tmp_path, ("model=unet", "seed=1", "~augmentation.flip"))
    assert commands(comparison.runs) == ["mambaseg train model=unet seed=1 '~augmentation.flip'"]


def test_what_differs_is_told_with_its_networks(tmp_path):
    write_run(tmp_path, "unet", patients=(1,), size=16)
    write_run(tmp_path, "mamba_unet", patients=(1,), size=16, optim="adamw",
              record={"scan_backend": "numba"})  # fmt: skip
    rows = dict(protocol_grid(collect(tmp_path)[0][0]).rows)
    assert "unet" in rows["optimizer"] and "AdamW (betas=[0.9,0.999])" in rows["optimizer"]
    assert rows["scan"].startswith("mamba_unet") and rows["scan"].endswith(": numba")
    assert "command" not in rows  # not recorded: by an earlier version


def test_a_prediction_of_another_slice_is_not_put_on_an_image():
    shown = {name: np.zeros((2, 20, 24), np.uint8) for name in ("image", "truth", "prediction")}
    other = {**shown, "prediction": np.stack([np.full((20, 24), k, np.uint8) for k in (1, 2)])}
    shown["slices"], other["slices"] = np.array([3, 5], np.int16), np.array([5, 7], np.int16)
    rows, _ = overlay_cells({"ED": {"a": shown, "b": other}}, ["a", "b"])
    assert rows[0][-2:] == [None, None]
    assert np.array_equal(
        rows[1][-2], overlay(np.zeros((20, 24)), np.ones((20, 24)), CLASS_COLOURS)
    )


def test_each_network_has_a_card_beside_image_and_truth():
    shown = {name: np.zeros((2, 20, 24), np.uint8) for name in ("image", "truth", "prediction")}
    shown["slices"] = np.array([3, 5], np.int16)
    shown["truth"][:, 8:12, 8:12] = 1
    cards = deck({"ED": {"a": shown}}, headings={"a": "a\n0.9", "b": "b"},
                 class_names=("background", "LV"))  # fmt: skip
    assert [card.columns for card in cards.cards] == [
        ("image", "truth"), ("prediction", "error"), ("prediction", "error")
    ]  # fmt: skip
    assert cards.rows == ("ED slice 4", "ED slice 6") and cards.legend["LV"].startswith("#")
    truth, a, b = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(card.png))).convert("RGB"))
        for card in cards.cards
    )
    assert truth.shape == a.shape == b.shape
    assert truth.max() > 100 and a.max() > 100  # the missed structure is an error
    assert b.max() < 40, "a network without this case has an empty card"
