"""Readers take work in proportion to the number of files, and files of any name."""

import json
import os
import sys
from pathlib import Path

import pytest

from forked_commands import typed_all
from mambaseg.data.formats.images import find_images, group_channels
from mambaseg.data.patients import find_alike
from mambaseg.data.readers import acdc, folder, mnms, nifti_pairs, nnunet, synapse
from mambaseg.data.splits import make_split
from mambaseg.inference.folder_scores import find_pairs as find_label_maps
from mambaseg.inference.folder_scores import score_folders
from mambaseg.restoration.pairs import find_pairs
from runs import QUIET, UNET
from tiny_nnunet import arrays, write_volume
from tiny_pictures import blob, mask, save
from typed import ROOT, typed


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_mnms(root, count):
    rows = ["External code,ED,ES"]
    for number in range(count):
        name = f"S{number:05d}"
        rows.append(f"{name},0,1")
        touch(root, *(f"Training/Labeled/{name}/{name}_sa{end}.nii.gz" for end in ("", "_gt")))
    (root / "list.csv").write_text("\n".join(rows))


def write_acdc(root, count):
    for number in range(1, count + 1):
        place = f"patient{number:03d}"
        touch(root, *(f"{place}/{place}_frame0{frame}{end}.nii.gz"
                      for frame in (1, 2) for end in ("", "_gt")))  # fmt: skip
        (root / place / "Info.cfg").write_text("ED: 1\nES: 2\n")


def write_nnunet_names(root, count):
    touch(root, *(f"imagesTr/c{n}_{c:04d}.nii.gz" for n in range(count) for c in (0, 1)),
          *(f"labelsTr/c{n}.nii.gz" for n in range(count)))  # fmt: skip
    content = {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "x": 1},
               "file_ending": ".nii.gz"}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    cases = [f"c{n}" for n in range(count)]
    splits = [{"train": cases[count // 5 :], "val": cases[: count // 5]}]
    (root / "splits_final.json").write_text(json.dumps(splits))


def names(*forms):
    return lambda root, count: touch(root, *(f.format(n) for n in range(count) for f in forms))


READERS = {
    "pictures, suffix": (names("a{}.png", "a{}_mask.png"), folder.find_cases),
    "pictures, joined masks": (
        names("a{}.png", "a{}_mask.png", "a{}_mask_1.png"), folder.find_cases,
    ),
    "pictures, two folders": (names("images/a{}.png", "masks/a{}.png"), folder.find_cases),
    "pictures, folder per image": (
        names("a{0}/images/a{0}.png", "a{0}/masks/x.png"), folder.find_cases,
    ),
    "pictures, folders": (names("b/a{}.png", "b/a{}_mask.png"), folder.find_cases),
    "recognised": (names("a{}.png", "a{}_mask.png"), folder.find_cases.recognises),
    "volumes, suffix": (names("a{}.nii.gz", "a{}_seg.nii.gz"), nifti_pairs.find_cases),
    "volumes, channels": (
        names("images/a{}_0000.nii", "images/a{}_0001.nii", "labels/a{}.nii"),
        nifti_pairs.find_cases,
    ),
    "volumes, folder per case": (
        names("a{}/image.nii.gz", "a{}/label.nii.gz"), nifti_pairs.find_cases,
    ),
    "nnU-Net": (write_nnunet_names, nnunet.find_cases),
    "M&Ms": (write_mnms, mnms.find_cases),
    "ACDC": (write_acdc, acdc.find_cases),
    "Synapse": (
        names("train_npz/case{:04d}_slice000.npz", "train_npz/case{:04d}_slice001.npz"),
        synapse.find_cases,
    ),
    "BTCV": (names("img/img{:04d}.nii.gz", "label/label{:04d}.nii.gz"), synapse.find_btcv),
    "restoration": (names("low/a{}.png", "high/a{}.png"), find_pairs),
    "to predict": (
        names("a{}_0000.nii.gz", "a{}_0001.nii.gz"),
        lambda root: group_channels(find_images(str(root), outside=root / "out"), 2),
    ),
    "label maps": (
        names("p/a{}.nii.gz", "r/a{}.nii.gz"), lambda root: find_label_maps(root / "p", root / "r"),
    ),
}  # fmt: skip


def operations(function, *arguments):
    """Calls of Python and C functions, and folders listed: the same on every machine."""
    count = {"call": 0, "c_call": 0, "listed": 0}

    def note(frame, event, argument):
        if event in count:
            count[event] += 1
        if event == "c_call" and argument in (os.scandir, os.listdir):
            count["listed"] += 1

    function(*arguments)  # what is imported or cached on first use
    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count["call"] + count["c_call"], count["listed"]


@pytest.mark.parametrize("name", READERS)
def test_a_reader_does_work_in_proportion_to_the_files(name, tmp_path):
    write, read = READERS[name]
    done = []
    for count in (40, 320):
        write(tmp_path / str(count), count)
        done.append(operations(read, tmp_path / str(count)))
    (few, _), (many, listed) = done
    assert many < 1.25 * 8 * few + 2000
    folders = sum(path.is_dir() for path in (tmp_path / "320").rglob("*")) + 1
    assert listed <= 4 * folders + 10


def test_patients_and_splits_of_many_cases_are_found_in_proportion(tmp_path):
    from test_patients import cases_named

    done = []
    for count in (100, 800):
        ids = [f"p{number:04d}_s{slice_}" for number in range(count) for slice_ in (1, 2)]
        done.append(operations(find_alike, cases_named(ids))[0])
        done.append(operations(make_split, "random", ids)[0])
    assert done[2] < 10 * done[0] and done[3] < 10 * done[1]


# ---- names that are not UTF-8 -------------------------------------------------------------------


@pytest.fixture
def latin(tmp_path):
    """A folder with a name in Latin-1, as it comes out of old archives."""
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/Gef\xe4\xdfe"))
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    return place


def named(number):
    return os.fsdecode(b"H\xe4matom_%d" % number)


def test_files_whose_names_are_not_utf8_are_checked_trained_on_and_reported(latin, tmp_path):
    sound, damaged, outputs = tmp_path / "sound", tmp_path / "damaged", tmp_path / "outputs"
    for place in (sound, damaged):
        for number in range(5):
            pixels, disc = blob(number)
            save(place / "images" / f"{named(number)}.png", pixels)
            save(place / "masks" / f"{named(number)}.png", mask(disc))
    (damaged / "masks" / f"{named(4)}.png").write_bytes(b"")
    assert [case.id for case in folder.find_cases(sound)][:1] == [r"H\xe4matom_0"]
    config = tmp_path / "conf" / "data" / "own.yaml"
    train = [
        "train", "data=own", f"hydra.searchpath=[file://{config.parents[1]}]", *UNET, *QUIET,
        "data.size=32", "data.batch_size=2", "data.steps=1", "data.val_every=1", "trainer=cpu",
        f"outputs={outputs}", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    commands = {
        "refused": ["train", "data=folder", f'data.root="{latin}"', f"outputs={tmp_path / 'no'}"],
        "checked": ["check", sound, "--write", config],
        "found": ["check", damaged],
        "stopped": [*train, f"data.root={damaged}"],
        "trained": train,
        "reported": ["report", outputs / "default"],
    }
    for name in commands:
        (tmp_path / name).mkdir()
    done = typed_all(commands, tmp_path)
    assert {name: one["code"] for name, one in done.items()} == {
        "refused": 1, "checked": 0, "found": 1, "stopped": 1, "trained": 0, "reported": 0,
    }, done  # fmt: skip
    assert r"Gef\xe4\xdfe: the name is not UTF-8" in done["refused"]["error"]
    assert not (tmp_path / "no").exists()
    assert r"H\xe4matom_4" in done["found"]["out"] and not done["found"]["error"]
    assert r"H\xe4matom_4" in done["stopped"]["error"]
    for one in done.values():
        assert "Traceback" not in one["error"] and "Logging error" not in one["error"]
    (run,) = (outputs / "default").glob("*-seed*/cases.csv")
    assert r"H\xe4matom_" in run.read_text(encoding="utf-8")


def test_volumes_whose_names_are_not_utf8_are_predicted_and_scored(latin, tmp_path):
    from tiny_checkpoints import write_checkpoint

    for number in range(2):
        image, label = arrays(number)
        (latin / "truth").mkdir(exist_ok=True)
        write_volume(latin / f"{named(number)}.nii.gz", image[0], (1.5, 1.25, 8.0))
        write_volume(latin / "truth" / f"{named(number)}.nii.gz", label, (1.5, 1.25, 8.0))
    network = write_checkpoint(tmp_path / "a.ckpt", classes=("background", "cavity", "wall"))
    where = f"{latin}/H*.nii.gz"
    done = typed(f"run={network}", f'input="{where}"', f"output={tmp_path / 'labels'}",
                 script=ROOT / "src" / "predict.py")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = sorted(path.name for path in (tmp_path / "labels").glob("*.nii.gz"))
    assert found == [rf"H\xe4matom_{number}.nii.gz" for number in range(2)]
    folder_, _ = score_folders(
        tmp_path / "labels", latin / "truth", class_names=None, outputs=tmp_path / "scored",
        evaluation={"empty": "strict", "tolerance_mm": 2.0, "keep_largest": False},
    )  # fmt: skip
    assert folder_.summary["cases"] == 2
