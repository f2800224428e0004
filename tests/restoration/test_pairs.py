"""Pairs of images, their split, and crops that are a function of (seed, step, position)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mambaseg.data.batches import Draw
from mambaseg.data.fingerprint import fingerprint, source_digests
from mambaseg.data.formats.files import content_digest
from mambaseg.errors import UserError
from mambaseg.restoration.data import CropDataset, RestorationDataModule
from mambaseg.restoration.pairs import find_pairs
from tiny_pictures import png_of_16_bits


def save(path, height=20, width=24, mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def reside(tmp_path):
    """Four scenes in RESIDE's naming, two hazy images each, PNG and JPEG."""
    for scene in range(1, 5):
        save(tmp_path / "data" / "clear" / f"{scene}.png", seed=scene)
        save(tmp_path / "data" / "hazy" / f"{scene}_1_0.9.png", seed=10 + scene)
        save(tmp_path / "data" / "hazy" / f"{scene}_2_1.25.jpg", seed=20 + scene)
    return tmp_path / "data"


def module_on(root, **options):
    defaults = {
        "name": "haze", "root": root, "class_names": ["red", "green", "blue"], "in_channels": 3,
        "size": 12, "batch_size": 4, "steps": 5, "val_every": 5, "num_workers": 0,
        "accumulate": 1, "seed": 1,
    }  # fmt: skip
    return RestorationDataModule(**{**defaults, **options})


def test_reside_names_belong_to_their_scene(reside):
    pairs = find_pairs(reside)
    assert [pair.id for pair in pairs][:3] == ["1_1_0.9", "1_2_1.25", "2_1_0.9"]
    assert all(pair.clear_path == reside / "clear" / f"{pair.scene}.png" for pair in pairs)


def test_the_folder_may_begin_with_the_home_folder(reside, monkeypatch):
    monkeypatch.setenv("HOME", str(reside.parent))
    module = module_on("~/data")
    module.load()
    assert module.root == reside


def test_lol_names_are_equal_and_folders_may_name_the_parts(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for number in range(count):
            for kind in ("low", "high"):
                save(tmp_path / part / kind / f"{number}_a.png", seed=number)
    module = module_on(tmp_path)
    module.load()
    assert module.split.name == "folders" and "1 of 4 training scenes" in module.split.note
    assert {part: count["scenes"] for part, count in module.counts.items()} == {
        "train": 3, "val": 1, "test": 2,
    }  # fmt: skip
    assert [pair.id for pair in module.pairs["test"]] == ["test-0_a", "test-1_a"]


def test_a_scene_is_in_one_part_with_all_its_images(reside):
    module = module_on(reside)
    module.load()
    scenes = [{pair.scene for pair in module.pairs[part]} for part in ("train", "val", "test")]
    assert sum(map(len, scenes)) == 4 == len(set.union(*scenes)) and all(scenes)
    assert sum(count["pairs"] for count in module.counts.values()) == 8
    assert "scene" in module.split.note


def test_each_file_is_read_once_and_named_as_ever(reside, monkeypatch):
    read, whole = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    module = module_on(reside)
    module.load()
    found = find_pairs(reside)
    files = {path for pair in found for path in pair.sources()}
    known = {one.id: one.prints for part in module.pairs for one in module.known(part)}
    assert sorted(read) == sorted(files) and len(files) < 2 * len(found)
    digests = {path: content_digest([path], "") for path in files}
    assert module.fingerprint == fingerprint(source_digests(found))
    assert known == {pair.id: tuple(digests[path] for path in pair.sources()) for pair in found}


def test_a_crop_is_the_same_place_of_both_images_and_depends_on_seed_step_and_position(tmp_path):
    save(tmp_path / "low" / "1.png", 40, 50, seed=3)
    save(tmp_path / "high" / "1.png", 40, 50, seed=3)  # equal, so that crops must be equal
    crops = CropDataset(find_pairs(tmp_path), size=16, seed=5)
    whole = np.asarray(Image.open(tmp_path / "low" / "1.png")).astype(np.float32) / 255
    tops, flips = set(), set()
    for step in range(12):
        item = crops[Draw(0, step, 2)]
        assert item["image"].shape == (3, 16, 16) and torch.equal(item["image"], item["clear"])
        assert torch.equal(item["image"], crops[Draw(0, step, 2)]["image"])
        assert not torch.equal(item["image"], crops[Draw(0, step, 3)]["image"])
        places = [
            (top, left, flip)
            for top in range(25) for left in range(35) for flip in (1, -1)
            if np.array_equal(item["image"].permute(1, 2, 0).numpy()[:, ::flip],
                              whole[top : top + 16, left : left + 16])
        ]  # fmt: skip
        assert len(places) == 1
        tops.add(places[0][0])
        flips.add(places[0][2])
    assert len(tops) > 5 and flips == {1, -1}


def test_batches_do_not_depend_on_workers_or_on_where_the_loader_starts(reside):
    alone = list(module_on(reside).train_dataloader())
    workers = list(module_on(reside, num_workers=1).train_dataloader())
    assert len(alone) == len(workers) == 5
    for one, other in zip(alone, workers, strict=True):
        assert torch.equal(one["image"], other["image"]) and one["case"] == other["case"]
        assert one["image"].shape == (4, 3, 12, 12) and one["image"].dtype == torch.float32
    pair = next(iter(module_on(reside).test_dataloader()))
    assert pair["image"].shape == (1, 3, 20, 24) and pair["image"].min() >= 0


def damaged(kind, root):
    hazy, clear = root / "hazy" / "2_1_0.9.png", root / "clear" / "2.png"
    if kind == "partner":
        clear.unlink()
    elif kind == "size":
        save(clear, 20, 25)
    elif kind == "grey":
        save(hazy, mode="L")
    elif kind == "alpha":
        save(hazy, mode="RGBA")
    elif kind == "16 bits":
        hazy.write_bytes(png_of_16_bits(np.full((20, 24, 3), 1000, np.uint16)))
    elif kind == "a transparent colour":
        with Image.open(hazy) as image:
            image.save(hazy, transparency=(1, 2, 3))
    elif kind == "text":
        hazy.write_text("no image")
    elif kind == "empty file":
        hazy.write_bytes(b"")
    elif kind == "small":
        for path in (hazy, root / "hazy" / "2_2_1.25.jpg", clear):
            save(path, 8, 24)
    elif kind == "twice":
        save(root / "clear" / "2.jpg")
    elif kind == "empty folder":
        for path in (root / "hazy").iterdir():
            path.unlink()
    elif kind == "layout":
        (root / "hazy").rename(root / "foggy")
    elif kind == "test missing":
        root.rename(root.with_name("x"))
        root.mkdir()
        root.with_name("x").rename(root / "train")
    elif kind == "absent":
        root.rename(root.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("partner", "2_1_0.9.png: its clear image clear/2 is missing. Put it there"),
        ("size", r"2_1_0.9.png: 20 × 24 pixels, but .*2.png has 20 × 25. Crop or resize"),
        ("grey", r"2_1_0.9.png: is no RGB image \(mode L\).*Convert it"),
        ("alpha", r"2_1_0.9.png: is no RGB image \(mode RGBA\)"),
        ("16 bits", "2_1_0.9.png: has 16 bits per colour.* Save it as"),
        ("a transparent colour", "2_1_0.9.png: is transparent"),
        ("text", "2_1_0.9.png: not a readable PNG or JPEG file .*get the file again"),
        ("empty file", "2_1_0.9.png: the file is empty"),
        ("small", r"2.*: 8 × 24 pixels; at least 1[12] × 1[12] are needed"),
        ("twice", "2.png: there is 2.jpg too. Move one"),
        ("empty folder", "hazy: holds no PNG or JPEG image"),
        ("layout", "holds no pairs of images. Expected is low/ and high/"),
        ("test missing", "there is train/ but no test/"),
        ("absent", "no such folder. Expected"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_remedy(kind, said, reside):
    damaged(kind, reside)
    with pytest.raises(UserError, match=said):
        module_on(reside).load()


def test_a_file_cut_off_after_its_head_is_named_when_it_is_read(reside):
    module = module_on(reside, steps=8)
    module.load()
    path = module.pairs["train"][0].image_path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{path.name}: not a readable PNG or JPEG file"):
        list(module.train_dataloader())


def test_too_few_scenes_and_other_than_three_channels_are_refused(tmp_path):
    for kind in ("low", "high"):
        save(tmp_path / kind / "1.png")
    with pytest.raises(UserError, match="3 or more scenes"):
        module_on(tmp_path).load()
    with pytest.raises(UserError, match=r"data\.in_channels=1"):
        module_on(tmp_path, in_channels=1)
