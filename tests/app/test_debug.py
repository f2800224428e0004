"""Short trainings that look for mistakes, and a config of one's own paths."""

import csv
import logging

import torch

from mambaseg.training.segmentation import SegmentationTask
from runs import UNET, built, composed, trained


def test_fast_goes_all_the_way_with_two_cases(small_run, monkeypatch):
    words = [word for word in small_run if not word.startswith(("data.steps", "data.val_every"))]
    run = trained(*UNET, *words, "debug=fast")
    assert run.folder.path.parent.name == "debug" and run.folder.finished
    with (run.folder.path / "cases.csv").open() as stream:
        assert len({row["case"] for row in csv.DictReader(stream)}) == 2
    assert run.folder.record["steps"] == 4
    assert not built(*UNET, *words, "debug=fast").finished  # it always trains again


def test_overfit_trains_on_the_same_images_and_says_how_well(small_run, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    images, whole = [], SegmentationTask.training_step

    def training_step(self, batch, index):
        images.append(batch["image"].clone())
        return whole(self, batch, index)

    monkeypatch.setattr(SegmentationTask, "training_step", training_step)
    words = ["debug=overfit", "data.steps=3", "data.val_every=3", "data.batch_size=4",
             "trainer.accumulate_grad_batches=2"]  # fmt: skip
    trained(*UNET, *small_run, *words)
    assert len(images) == 6 and not torch.equal(images[0], images[1])
    assert all(torch.equal(image, images[place % 2]) for place, image in enumerate(images))
    assert "in 3 steps on one batch" in caplog.text and "has hardly fallen" in caplog.text


def test_overfit_counts_its_steps(small_run):
    """What waits for a step, such as an encoder or a ramp, gets there on the same images, too."""
    words = [*UNET, *small_run, "debug=overfit", "data.steps=6", "data.val_every=6", "test=false",
             "optim.freeze_encoder=3"]  # fmt: skip
    with built(*words) as run:
        encoder = [p for name, p in run.task.network.named_parameters() if ".encoder." in name]
        before = [parameter.clone() for parameter in encoder]
        run.fit()
    assert encoder and not any(map(torch.equal, before, encoder))


def test_the_validation_set_is_not_predicted_whole_for_its_post_processing():
    for debug, count in (("fast", 2), ("overfit", 1), ("profile", 2)):
        assert composed("data=phantom", f"debug={debug}").trainer.limit_predict_batches == count


def test_profile_leaves_where_the_time_went(small_run):
    run = trained(*UNET, *small_run, "debug=profile", "data.steps=2", "test=false")
    assert "training_step" in (run.folder.path / "fit-profile.txt").read_text()


def test_a_config_of_ones_own_paths_is_read_and_makes_no_other_run(small_run, tmp_path):
    local = tmp_path / "configs/local"
    (local / "data").mkdir(parents=True)
    text = "# @package _global_\noutputs: mine\ndata: {cache_dir: mine/cache, num_workers: 1}\n"
    (local / "default.yaml").write_text(text)
    (local / "data/acdc.yaml").write_text("root: /my/ACDC\n")
    for script in ("config", "evaluate"):
        cfg = composed("data=acdc", script=script, configs=tmp_path / "configs")
        assert (cfg.outputs, cfg.data.cache_dir) == ("mine", "mine/cache")
        assert cfg.data.root == "/my/ACDC"
    assert composed("outputs=x", "data=phantom", configs=tmp_path / "configs").outputs == "x"
    assert composed("data=phantom", configs=tmp_path / "configs").data.root == "data/phantom"
    words = [word for word in small_run if not word.startswith(("outputs", "data.cache_dir"))]
    words += [f"data.cache_dir={tmp_path / 'cache'}", "outputs=other"]
    ours = built(*UNET, *words, configs=tmp_path / "configs")
    assert ours.config["data"]["num_workers"] == 1
    assert ours.key == built(*UNET, *words).key
