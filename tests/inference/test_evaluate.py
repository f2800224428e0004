"""Checkpoints are scored again from what they say about themselves."""

import shlex

import pytest
import torch

from mambaseg.app.networks import restore_network
from mambaseg.errors import UserError
from mambaseg.inference.bundle import write_bundle
from mambaseg.inference.trained import read_checkpoint
from mambaseg.reporting.reading import read_run
from runs import built, trained


@pytest.fixture(scope="module")
def finished(shared_run):
    """A finished run, trained with a network that is not the default one."""
    return trained("model=unet", "model.widths=[4,8,8,8,8]", *shared_run)


def evaluated(*overrides):
    return trained(*overrides, script="evaluate")


def test_a_checkpoint_needs_no_other_word_and_scores_as_before(finished, small_run):
    run = evaluated(f"checkpoint={finished.folder.path}", *small_run)
    assert run.config["model"]["widths"] == [4, 8, 8, 8, 8]
    before, after = finished.folder.summary, run.folder.summary
    assert after["foreground"] == before["foreground"]
    assert run.folder.path.parent.name == "evaluate"
    assert not list(run.folder.path.glob("checkpoints/*"))


def test_an_evaluation_without_a_test_is_refused(finished, small_run):
    with pytest.raises(UserError, match="test=false: mambaseg evaluate scores the test set"):
        evaluated(f"checkpoint={finished.folder.path}", *small_run, "test=false")


def test_the_card_of_a_bundle_has_scores_of_the_state_that_was_tested(finished, tmp_path):
    for name, scored in (("best", True), ("last", False)):
        file = finished.folder.path / "checkpoints" / f"{name}.ckpt"
        network, checkpoint = restore_network(file)
        card = write_bundle(network, checkpoint, tmp_path / name) / "README.md"
        assert ("Scores on the test set" in card.read_text()) is scored
        assert "| made with |" in card.read_text()
        assert "mambaseg train init_from=<this folder> model=unet data=" in card.read_text()
        assert "| learnt from | dense labels of 5 of 5 patients |" in card.read_text()


def test_other_preprocessing_is_said_and_the_checkpoints_is_used(finished, small_run, caplog):
    words = [word for word in small_run if not word.startswith("data.size")]
    run = evaluated(
        f"checkpoint={finished.folder.path}", *words, "data.size=48", "data.preprocessing=zscore"
    )
    assert run.data.preprocessing.describe() == finished.data.preprocessing.describe()
    assert "data.preprocessing=zscore" in caplog.text and "data.size=48" in caplog.text


def test_what_belongs_to_the_preprocessing_comes_from_the_checkpoint_too(
    finished, small_run, tmp_path, caplog
):
    def through_a_window(checkpoint):
        checkpoint["mambaseg"]["preprocessing"] |= {"intensity": "window", "window": [0.0, 400.0]}

    path = altered(finished, tmp_path, through_a_window)
    other = f"checkpoint={path}", *small_run, "data.window=[0,300]"
    with built(*other, script="evaluate") as run:
        pass
    assert run.data.preprocessing.window == (0.0, 400.0)
    assert run.config["data"]["window"] == [0.0, 400.0]
    assert "data.window=[0, 300]" in caplog.text

    caplog.clear()
    own = f"checkpoint={finished.folder.path}"
    with built(own, *small_run, "data.intensity=zscore", script="evaluate") as run:
        pass
    assert run.data.preprocessing == finished.data.preprocessing
    assert "data.intensity=zscore" in caplog.text and "with null" in caplog.text


def test_data_of_another_number_of_channels_are_refused(finished, small_run):
    with pytest.raises(UserError, match=r"data\.in_channels=2: .*best\.ckpt .* of 1 channels"):
        evaluated(f"checkpoint={finished.folder.path}", *small_run, "data.in_channels=2")


def altered(finished, tmp_path, change):
    checkpoint = torch.load(
        finished.folder.path / "checkpoints" / "best.ckpt", weights_only=True, map_location="cpu"
    )
    change(checkpoint)
    path = tmp_path / "altered.ckpt"
    torch.save(checkpoint, path)
    return path


def test_a_foreign_target_is_never_instantiated(finished, small_run, tmp_path):
    def attack(checkpoint):
        checkpoint["mambaseg"]["model"]["_target_"] = "os.system"
        checkpoint["mambaseg"]["model"]["arguments"].update(
            _target_="os.system", widths=[4, 8, 8, 8, 8], in_channels={"_target_": "os.getcwd"}
        )

    path = altered(finished, tmp_path, attack)
    run = evaluated(f"checkpoint={path}", *small_run)
    assert run.config["model"]["_target_"] == "mambaseg.models.UNet"
    assert run.config["model"]["in_channels"] == 1


def test_an_unknown_network_is_refused(finished, small_run, tmp_path):
    def rename(checkpoint):
        checkpoint["mambaseg"]["model"]["name"] = "../../evil"

    path = altered(finished, tmp_path, rename)
    with pytest.raises(UserError, match=r"trained with model=\.\./\.\./evil, but there is no"):
        built(f"checkpoint={path}", *small_run, script="evaluate")


def test_weights_that_do_not_fit_are_refused(finished, small_run, tmp_path):
    def widen(checkpoint):
        checkpoint["mambaseg"]["model"]["arguments"]["widths"] = [8, 8, 8, 8, 8]

    path = altered(finished, tmp_path, widen)
    with (
        pytest.raises(UserError, match="does not fit"),
        built(f"checkpoint={path}", *small_run, script="evaluate"),
    ):
        pass


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_missing_and_damaged_checkpoints_are_named(tmp_path, content):
    path = tmp_path / "x.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.ckpt"):
        read_checkpoint(path)


def test_a_checkpoint_that_holds_code_is_not_loaded(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"state_dict": {}, "evil": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="only plain weights"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_another_projects_checkpoint_points_to_the_way_in(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="load_original_state_dict"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_classes_in_another_order_are_refused_and_the_mapping_that_is_offered_works(
    finished, small_run
):
    words = f"checkpoint={finished.folder.path}", *small_run
    with pytest.raises(UserError, match="exchanged") as error:
        built(*words, "data.class_names=[background,LV,MYO,RV]", script="evaluate")
    run = evaluated(*words, *shlex.split(str(error.value).rpartition(" order: ")[2]))
    before, after = (read_run(one.folder.path).rows for one in (finished, run))

    def voxels(rows, name):
        return [row["reference_voxels"] for row in rows if row["class_name"] == name]

    # what the files call 3 is RV in data of that order
    assert voxels(after, "RV") == voxels(before, "LV") != voxels(before, "RV")
    assert voxels(after, "MYO") == voxels(before, "MYO")


def test_one_name_for_two_classes_is_refused_before_anything_is_read(small_run, tmp_path):
    twice = "data.class_names=[background,RV,MYO,RV]"
    with pytest.raises(Exception, match="more than once"):
        built(*small_run, twice)
    assert not (tmp_path / "outputs").exists()


def test_a_checkpoint_with_one_name_for_two_classes_is_refused(finished, tmp_path):
    def repeat(checkpoint):
        checkpoint["mambaseg"]["classes"] = ["background", "RV", "MYO", "RV"]

    with pytest.raises(UserError, match="more than once"):
        read_checkpoint(altered(finished, tmp_path, repeat))
