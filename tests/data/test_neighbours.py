"""2.5-D: neighbouring slices as channels."""

import nibabel
import numpy as np
import pytest
import torch
from fake_cases import find_fakes, write_cases

from mambaseg.data.augmentation import Augmentation
from mambaseg.data.batches import Draw
from mambaseg.data.cache import open_cache
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.readers.unlabelled import find_unlabelled
from mambaseg.data.slices import Collate, DeviceSlices, SliceDataset
from mambaseg.errors import UserError
from runs import UNET, built, entered, own_overrides, small_overrides, trained
from tiny_nnunet import arrays, write_nnunet, write_volume


def test_a_slice_has_its_neighbours_the_lowest_first_and_edges_repeat():
    volume = torch.arange(5.0)[:, None, None, None].expand(5, 2, 3, 3)
    stacked = Preprocessing("paper", 8, neighbours=2).stacked(volume, 1, 5)
    assert stacked.shape == (4, 10, 3, 3)
    assert stacked[:, ::2, 0, 0].tolist() == [
        [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 4], [2, 3, 4, 4, 4],
    ]  # fmt: skip
    assert torch.equal(stacked[:, ::2], stacked[:, 1::2])
    with pytest.raises(UserError, match=r"data\.neighbours=-1"):
        Preprocessing("paper", 8, neighbours=-1)


def test_the_frames_of_a_cine_are_volumes_of_their_own(tmp_path):
    """Each has its range of grey values, and no neighbours in the next one."""
    cine = np.random.default_rng(0).random((5, 6, 3, 2), np.float32)  # (x, y, z, t)
    cine[..., 1] *= 9
    nibabel.save(nibabel.Nifti1Image(cine, np.eye(4)), tmp_path / "a.nii")
    (case,) = find_unlabelled(tmp_path, channels=1, longest_side=None)
    near = Preprocessing("modern", 16, intensity="minmax", neighbours=1)
    cache = open_cache([case], near, cache_dir=tmp_path / "cache", num_classes=4)
    slices = SliceDataset(cache, [case.id], preprocessing=near)
    kept = DeviceSlices(slices, torch.device("cpu"))
    shapes = torch.tensor([(6, 5)] * 6)
    gathered, _ = kept.gather(torch.arange(6), shapes, (6, 5))
    for place, image in enumerate(gathered.numpy()):
        frame = cine[..., place // 3].transpose(2, 1, 0)[:, None]
        z = place % 3
        assert np.array_equal(image, near.stacked(near.scale_intensity(frame), z, z + 1)[0])
        assert np.array_equal(image, slices[Draw(place, 0, 0)]["image"])


def test_the_loader_and_the_devices_memory_give_the_same_batch(tmp_path):
    write_cases(tmp_path / "data", patients=3)
    cases, near = find_fakes(tmp_path / "data"), Preprocessing("modern", 16, neighbours=1)
    cache = open_cache(cases, near, cache_dir=tmp_path / "cache", num_classes=4)
    slices = SliceDataset(cache, [case.id for case in cases[1:]], preprocessing=near)
    collate = Collate(Augmentation("none", near, 0))
    places = [0, 2, 3, len(slices) - 1]
    batch = collate([slices[Draw(i, 0, i)] for i in places])
    assert batch["image"].shape[1] == 3
    for row, place in enumerate(places):
        number, z = int(slices.case_numbers[place]), int(slices.slice_numbers[place])
        whole = cache.image(number)
        for channel, other in enumerate((z - 1, z, z + 1)):
            expected = whole[min(max(other, 0), len(whole) - 1), 0]
            found = batch["image"][row, channel, : expected.shape[0], : expected.shape[1]]
            assert np.array_equal(found, expected)
    device = DeviceSlices(slices, torch.device("cpu"))
    size = tuple(batch["image"].shape[-2:])
    image, label = device.gather(torch.tensor(places), batch["shape"], size)
    assert torch.equal(image, batch["image"]) and torch.equal(label, batch["label"])


@pytest.fixture(scope="module")
def run(phantom_root, tmp_path_factory):
    words = small_overrides(phantom_root, tmp_path_factory.mktemp("outputs"))
    return trained(*words, *UNET, "data.neighbours=1", "trainer=cpu", "augmentation=modern")


def test_a_training_sees_three_slices_and_its_checkpoint_says_so(run, phantom_root, tmp_path):
    from mambaseg.app.networks import restore_network

    network, checkpoint = restore_network(run.folder.path)
    assert network.network.encoder[0][0].in_channels == 3
    assert (checkpoint.channels, checkpoint.inputs) == (1, 3)
    assert checkpoint.preprocessing.neighbours == 1
    assert run.config["data"]["in_channels"] == 1
    again = trained(f"run={run.folder.path}", "data=phantom", f"data.root={phantom_root}",
                    "data.prepare.patients=8", f"outputs={tmp_path}", "trainer=cpu",
                    f"data.cache_dir={phantom_root.parent / 'cache'}",
                    script="evaluate")  # fmt: skip
    assert again.task.results["summary"] == run.task.results["summary"]


def test_it_predicts_and_exports(run, phantom_root, tmp_path):
    image = next(phantom_root.glob("patient001/*_frame??.nii.gz"))
    words = f"run={run.folder.path}", f"input={image}", f"output={tmp_path / 'labels'}"
    assert entered("predict.py", *words, "device=cpu") == 0
    assert list((tmp_path / "labels").glob("*.nii.gz"))
    exported = tmp_path / "net.pt2"
    assert entered("export.py", words[0], "format=torch", f"output={exported}") == 0
    program = torch.export.load(exported).module()
    assert program(torch.rand(1, 3, 32, 32)).shape == (1, 4, 32, 32)


def test_pictures_are_refused(phantom_root, tmp_path):
    with pytest.raises(UserError, match="pictures have no neighbouring slices"):
        built("data=folder", f"data.root={phantom_root}", *UNET, "data.neighbours=1",
              f"outputs={tmp_path}", "trainer=cpu")  # fmt: skip


def flat_and_deep(root, deep):
    """Five cases in nnU-Net's layout, of one slice each; the first `deep` are volumes."""
    write_nnunet(root)
    for number in range(deep, 5):
        image, label = arrays(number)
        for folder, array in (
            ("imagesTr/case_{:03d}_0000", image[0]),
            ("labelsTr/case_{:03d}", label),
        ):
            write_volume(root / f"{folder.format(number)}.nii.gz", array[:, :, 1:2], (1.5, 1.25, 8))
    return root


@pytest.mark.parametrize("kind", ["pictures", "volumes of one slice"])
def test_cases_without_neighbouring_slices_are_refused(kind, tmp_path):
    root = tmp_path / "data"
    if kind == "pictures":
        write_nnunet(root, ending=".png")
    else:
        flat_and_deep(root, 0)
    words = [*own_overrides(tmp_path), "data=nnunet", f"data.root={root}"]
    with pytest.raises(UserError, match=r"neighbours=1: 3 of 3 training cases have one slice.* 0"):
        built(*words, "data.neighbours=1")
    assert not (tmp_path / "outputs").exists()
    with built(*words):
        pass


def test_some_cases_of_one_slice_are_told(tmp_path, caplog):
    root = flat_and_deep(tmp_path / "data", 3)
    words = [*own_overrides(tmp_path), "data=nnunet", f"data.root={root}", "data.split=random"]
    with built(*words, "data.neighbours=1") as run:
        flat = [one.id for one in run.data.cases["train"] if one.id > "case_002"]
    assert f"{len(flat)} of 3 training cases have one slice" in caplog.text and flat
