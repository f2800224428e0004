"""Bad input ends in exit code 1 and one message with the file and the remedy; no stack trace."""

import gzip
import re
import shutil
import sys

import nibabel
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from mambaseg.app.entry import entry
from mambaseg.data.phantoms.phantom import MANIFEST
from mambaseg.data.phantoms.synthetic import NOTE
from runs import entered


@pytest.fixture
def damaged(phantom_root, tmp_path):
    """A copy of the phantom that a test may damage, and the first image of it."""
    root = tmp_path / "patients"  # a name that no message uses
    shutil.copytree(phantom_root, root)
    for name in (NOTE, MANIFEST):
        (root / name).unlink()  # or the phantom's own check would speak first
    return root


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs train.py in this process with the given words; returns what it said before exit 1."""

    def run(*arguments):
        assert entered("train.py", "model=unet", "logger=csv", *arguments) == 1
        lines = capsys.readouterr().err.splitlines()
        # neither Hydra's echo of the words typed nor this test's own name may satisfy a test
        said = "\n".join(line for line in lines if not line.startswith("Error executing job"))
        said = said.replace(str(tmp_path), "<here>")
        assert "Traceback" not in said and 'File "' not in said
        assert "HYDRA_FULL_ERROR" not in said  # it would say nothing more
        return said

    return run


def frame(root, ending=""):
    return sorted(root.glob(f"patient003/patient003_frame??{ending}.nii.gz"))[0]


def rewrite(path, change):
    image = nibabel.load(path)
    data = change(np.asarray(image.dataobj))
    nibabel.save(nibabel.Nifti1Image(data, image.affine), path)


def official(small_run, root):
    return [*small_run, "data.prepare=null", f"data.root={root}", f"data.cache_dir={root}-cache"]


def test_truncated_gzip(fails, small_run, damaged):
    path = frame(damaged)
    path.write_bytes(path.read_bytes()[:-2000])
    said = fails(*official(small_run, damaged))
    assert path.name in said and "truncated" in said


def test_label_value_7(fails, small_run, damaged):
    path = frame(damaged, "_gt")
    rewrite(path, lambda data: np.where(data == 3, 7, data).astype(np.uint8))
    said = fails(*official(small_run, damaged))
    assert path.name in said and re.search(r"\b7\b", said)


def test_image_and_label_of_different_shape(fails, small_run, damaged):
    path = frame(damaged, "_gt")
    rewrite(path, lambda data: data[:-1])
    said = fails(*official(small_run, damaged))
    assert path.name in said and "shape" in said


def test_missing_frame(fails, small_run, damaged):
    path = frame(damaged)
    path.unlink()
    said = fails(*official(small_run, damaged))
    assert path.name.split(".")[0] in said


def test_nan_in_an_image(fails, small_run, damaged):
    path = frame(damaged)

    def poison(data):
        data = data.astype(np.float32)
        data[0, 0, 0] = np.nan
        return data

    rewrite(path, poison)
    said = fails(*official(small_run, damaged))
    assert path.name in said
    assert re.search(r"\bnan\b|finite", said.lower())


def test_wrong_pretrained_file(fails, small_run, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(gzip.compress(b"not weights"))
    said = fails(*small_run, "model=mamba_unet", f"model.pretrained={path}")
    assert path.name in said
    torch.save({"model": {"some.other.weight": torch.zeros(3)}}, path)
    said = fails(*small_run, "model=mamba_unet", f"model.pretrained={path}")
    assert path.name in said and "encoder" in said


def test_pretrained_file_for_a_network_without_an_encoder_to_fill(fails, small_run, tmp_path):
    said = fails(*small_run, f"+model.pretrained={tmp_path / 'x.pth'}")
    assert "unet" in said and "pretrained" in said


def test_unknown_model_name(fails, small_run):
    said = fails(*small_run, "model=vgg")
    assert "vgg" in said and "mamba_unet" in said


def test_root_without_patients(fails, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    said = fails("data=acdc", f"data.root={empty}", f"outputs={tmp_path / 'outputs'}")
    assert "<here>/empty" in said and "patient" in said and "data=phantom" in said
    assert not (tmp_path / "outputs").exists()


def test_image_smaller_than_the_patch(fails, small_run):
    said = fails(*small_run, "model=mamba_unet", "data.size=3")
    assert "data.size" in said


def test_out_of_memory_names_it_and_the_remedy(capsys, monkeypatch):
    @entry("config")
    def main(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "out of memory" in said and "data.batch_size" in said and "Traceback" not in said
    assert "evaluation.batch_size" in said


def test_the_stack_trace_is_there_when_asked(small_run, tmp_path, monkeypatch):
    from mambaseg.app.commands import train

    GlobalHydra.instance().clear()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", *official(small_run, empty)])
    with pytest.raises(Exception, match="patient") as raised:
        train.main()
    assert raised.value.__cause__ is not None
