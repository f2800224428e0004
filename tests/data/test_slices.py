import logging
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
from fake_cases import find_fakes, find_unreadable, write_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from mambaseg.data import cache as cache_module
from mambaseg.data.augmentation import Augmentation
from mambaseg.data.batches import Draw, StepSampler
from mambaseg.data.cache import open_cache
from mambaseg.data.fingerprint import fingerprint, source_digests
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.slices import Collate, SliceDataset
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError

PAPER = Preprocessing("paper", 32)


@pytest.fixture
def root(tmp_path):
    write_cases(tmp_path / "data", patients=3)
    return tmp_path / "data"


def opened(cases, tmp_path, preprocessing=PAPER, num_classes=4):
    return open_cache(cases, preprocessing, cache_dir=tmp_path / "cache", num_classes=num_classes)


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


# ---- the decoded cache


def test_the_cache_holds_every_case_intensity_scaled_and_read_only(root, tmp_path):
    cases = find_fakes(root)
    cache = opened(cases, tmp_path)
    assert len(cache) == len(cases) == 6
    for case in cases:
        number, volume = cache.position(case.id), case.read()
        assert np.array_equal(cache.image(number), PAPER.scale_intensity(volume.image))
        assert np.array_equal(cache.label(number), volume.label)
        assert cache.entries[number].spacing == (10.0, 1.5, 1.5)
        with pytest.raises(ValueError, match="read-only"):
            cache.image(number)[0] = 0


def test_a_second_opening_reads_no_source_and_one_folder_is_left(root, tmp_path):
    first = opened(find_fakes(root), tmp_path)
    again = opened(find_unreadable(root), tmp_path)
    assert again.folder == first.folder
    assert folders(tmp_path) == [first.folder.name]


def test_other_content_scaling_or_classes_is_another_cache(root, tmp_path):
    opened(find_fakes(root), tmp_path)
    opened(find_fakes(root), tmp_path, preprocessing=Preprocessing("zscore", 32))
    opened(find_fakes(root), tmp_path, num_classes=5)
    assert len(folders(tmp_path)) == 3
    for window in ([0, 100], [0, 255]):
        opened(find_fakes(root), tmp_path, preprocessing=Preprocessing("paper", 32, window=window))
    assert len(folders(tmp_path)) == 5
    # Preprocessings that differ in geometry only share the decoded volumes.
    opened(find_unreadable(root), tmp_path, preprocessing=Preprocessing("paper", 64))
    opened(find_unreadable(root), tmp_path, preprocessing=Preprocessing("modern", 64, "minmax"))
    assert len(folders(tmp_path)) == 5


def test_a_changed_source_is_never_served_from_the_stale_cache(root, tmp_path):
    cases = find_fakes(root)
    opened(cases, tmp_path)
    stat = cases[0].image_path.stat()
    label = np.zeros((3, 20, 20), np.uint8)
    np.savez(cases[0].image_path, image=label.astype(np.float32), label=label)
    os.utime(cases[0].image_path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cache = opened(find_fakes(root), tmp_path)
    assert cache.label(cache.position(cases[0].id)).shape == (3, 20, 20)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


def make_a_pickle(path):
    np.save(path, np.array([print, {}], dtype=object), allow_pickle=True)


def make_an_older_pickle(path):
    path.write_bytes(pickle.dumps(print))


DAMAGE = [
    *[(name, truncate) for name in ("images.npy", "labels.npy", "index.json")],
    *[(name, flip_a_bit) for name in ("images.npy", "labels.npy", "index.json")],
    *[(name, lambda path: path.unlink()) for name in ("images.npy", "labels.npy", "index.json")],
    *[(name, lambda path: path.write_bytes(b"")) for name in ("images.npy", "index.json")],
    ("images.npy", make_a_pickle),
    ("labels.npy", make_an_older_pickle),
    ("index.json", lambda path: path.write_text("[]")),
    ("index.json", lambda path: path.write_text('{"digest": "", "cases": []}')),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_damaged_cache_is_rebuilt_with_one_line_in_the_log(name, damage, root, tmp_path, caplog):
    cases = find_fakes(root)
    sound = opened(cases, tmp_path)
    images = [sound.image(number).copy() for number in range(len(sound))]
    damage(sound.folder / name)
    with caplog.at_level(logging.WARNING):
        rebuilt = opened(cases, tmp_path)
    assert [record.message for record in caplog.records if "is damaged" in record.message]
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert all(np.array_equal(image, rebuilt.image(n)) for n, image in enumerate(images))
    assert folders(tmp_path) == [sound.folder.name]
    opened(find_unreadable(root), tmp_path)


def test_an_edited_index_is_noticed(root, tmp_path, caplog):
    cache = opened(find_fakes(root), tmp_path)
    index = cache.folder / "index.json"
    index.write_text(index.read_text().replace("10.0", "11.0", 1))
    rebuilt = opened(find_fakes(root), tmp_path)
    assert "is damaged" in caplog.text
    assert {entry.spacing for entry in rebuilt.entries} == {(10.0, 1.5, 1.5)}


def test_builders_at_the_same_time_agree_and_leave_one_folder(root, tmp_path, monkeypatch):
    all_decoded = threading.Barrier(3)
    rename = cache_module.Path.rename

    def rename_together(self, target):
        if self.name.startswith(".building-"):
            all_decoded.wait(timeout=20)
        return rename(self, target)

    monkeypatch.setattr(cache_module.Path, "rename", rename_together)
    cases = find_fakes(root)
    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(lambda _: opened(cases, tmp_path), range(3)))
    assert len({cache.folder for cache in caches}) == 1
    assert folders(tmp_path) == [caches[0].folder.name]
    for cache in caches:
        cache.verify()


def test_a_build_that_fails_leaves_nothing_behind(root, tmp_path):
    def spoilt(case):
        volume = np.full((2, 1, 20, 20), np.nan, np.float32)
        return Volume(volume, np.zeros((2, 20, 20), np.uint8))

    cases = [*find_fakes(root)[:-1], find_fakes(root, reader=spoilt)[-1]]
    with pytest.raises(UserError, match="NaN"):
        opened(cases, tmp_path)
    assert folders(tmp_path) == []


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(root, tmp_path, monkeypatch):
    def no_space(files, lengths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_write_headers", no_space)
    with pytest.raises(UserError, match=r"No space left.*cache_dir"):
        opened(find_fakes(root), tmp_path)
    assert folders(tmp_path) == []


def test_what_killed_builders_left_is_swept_away_after_a_day(root, tmp_path):
    for name, age in ((".building-old", 2 * 86400), (".building-new", 60)):
        left = tmp_path / "cache" / name
        left.mkdir(parents=True)
        then = left.stat().st_mtime - age
        os.utime(left, (then, then))
    cache = opened(find_fakes(root), tmp_path)
    assert folders(tmp_path) == [".building-new", cache.folder.name]


def test_a_label_beyond_the_classes_is_a_clear_error(root, tmp_path):
    with pytest.raises(UserError, match=r"allowed are 0\.\.0"):
        opened(find_fakes(root), tmp_path, num_classes=1)


def test_only_the_path_of_a_cache_is_pickled(root, tmp_path):
    cache = opened(find_fakes(root), tmp_path)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).image(1), cache.image(1))


# ---- the fingerprint


def test_the_fingerprint_ignores_folder_time_and_order(root, tmp_path):
    shutil.copytree(root, tmp_path / "elsewhere with spaces")
    moved = find_fakes(tmp_path / "elsewhere with spaces")
    for case in moved:
        os.utime(case.image_path, (1, 1))
    assert fingerprint(source_digests(find_fakes(root))) == fingerprint(source_digests(moved[::-1]))


def test_the_fingerprint_sees_every_byte_and_every_case(root):
    cases = find_fakes(root)
    before = fingerprint(source_digests(cases))
    assert fingerprint(source_digests(cases[1:])) != before
    flip_a_bit(cases[2].image_path)
    assert fingerprint(source_digests(cases)) != before


def test_a_vanished_source_is_a_clear_error(root):
    cases = find_fakes(root)
    cases[1].image_path.unlink()
    with pytest.raises(UserError, match=r"patient001_ES\.npz: the file is missing"):
        fingerprint(source_digests(cases))


# ---- slices


def test_every_slice_of_every_case_is_there_once(root, tmp_path):
    cases = find_fakes(root)
    cache = opened(cases, tmp_path)
    dataset = SliceDataset(cache, [case.id for case in cases[1:4]], preprocessing=PAPER)
    items = [dataset[Draw(i, 0, 0)] for i in range(len(dataset))]
    expected = [(case.id, z) for case in cases[1:4] for z in range(case.read().image.shape[0])]
    assert [(item["case"], item["slice"]) for item in items] == expected
    for item in items:
        volume = cache.label(cache.position(item["case"]))
        assert np.array_equal(item["label"], volume[item["slice"]])
        assert item["image"].shape == (1, *item["label"].shape)


def test_a_collated_batch_pads_at_the_bottom_and_right_and_keeps_track(root, tmp_path):
    cases = find_fakes(root)
    cache = opened(cases, tmp_path)
    dataset = SliceDataset(cache, [case.id for case in cases], preprocessing=PAPER)
    draws = [Draw(item, 17, position) for position, item in enumerate((9, 0, 14, 5), start=8)]
    batch = Collate(Augmentation("paper", PAPER, 3))([dataset[draw] for draw in draws])
    assert batch["step"] == 17
    assert batch["position"].tolist() == [8, 9, 10, 11]
    for i, draw in enumerate(draws):
        item = dataset[draw]
        h, w = batch["shape"][i].tolist()
        assert item["image"].shape == (1, h, w)
        assert np.array_equal(batch["image"][i, :, :h, :w], item["image"])
        assert np.array_equal(batch["label"][i, :h, :w], item["label"])
        assert batch["image"][i].sum() == pytest.approx(item["image"].sum(), rel=1e-5)
        assert (batch["case"][i], batch["slice"][i]) == (item["case"], item["slice"])
    largest = batch["shape"].amax(0).tolist()
    assert list(batch["image"].shape[1:]) == [1, *largest]


# ---- which slices make up which step


def sampler(length=53, batch_size=24, steps=12, seed=1, **options):
    return StepSampler(length, batch_size=batch_size, steps=steps, seed=seed, **options)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 200),
    world_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    size=st.integers(1, 4),
    steps=st.integers(1, 8),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_ranks_micro_batches_and_restarts_see_together_what_one_run_sees(
    length, world_size, accumulate, size, steps, seed, data
):
    options = {"batch_size": world_size * accumulate * size, "steps": steps, "seed": seed}
    alone = list(StepSampler(length, **options))
    assert [len(batch) for batch in alone] == [options["batch_size"]] * steps
    assert [[draw.position for draw in batch] for batch in alone] == [
        list(range(options["batch_size"]))
    ] * steps

    start = data.draw(st.integers(0, steps))
    ranks = [
        list(
            StepSampler(
                length,
                rank=rank,
                world_size=world_size,
                accumulate=accumulate,
                start_step=start,
                **options,
            )
        )
        for rank in range(world_size)
    ]
    for step in range(start, steps):
        first = (step - start) * accumulate
        micro_batches = [batch for rank in ranks for batch in rank[first : first + accumulate]]
        assert [len(batch) for batch in micro_batches] == [size] * (world_size * accumulate)
        assert list(chain(*micro_batches)) == alone[step]


def test_every_epoch_shows_each_slice_once_in_another_order():
    draws = [draw for batch in sampler(length=53, steps=20) for draw in batch]
    epochs = [[draw.item for draw in draws[i * 53 : (i + 1) * 53]] for i in range(9)]
    assert all(sorted(epoch) == list(range(53)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 9


@pytest.mark.parametrize("other", [2, 1 + 2**32, 2**63, 2**64 - 1])
def test_every_bit_of_the_seed_counts(other):
    assert sampler(seed=other).batch(0) != sampler(seed=1).batch(0)
    assert sampler(seed=other).batch(0) != sampler(seed=other + 1).batch(0)


def test_a_step_can_be_asked_for_without_those_before_it():
    assert sampler().batch(7) == list(sampler())[7]
    assert sampler(seed=2).batch(7) != sampler().batch(7)


def test_the_length_is_that_of_the_whole_training_also_after_a_resume():
    assert len(sampler(accumulate=2, start_step=5)) == 24
    assert len(list(sampler(accumulate=2, start_step=5))) == 14


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate"), [(24, 5, 1), (24, 1, 7), (24, 4, 4), (0, 1, 1)]
)
def test_a_batch_that_cannot_be_shared_out_is_a_clear_error(batch_size, world_size, accumulate):
    with pytest.raises(UserError, match="multiple of devices"):
        sampler(batch_size=batch_size, world_size=world_size, accumulate=accumulate)
