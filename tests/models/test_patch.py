import torch

from mambaseg.models import PatchEmbed, PatchExpand, PatchMerging


def test_a_token_sees_its_own_patch_only():
    embed = PatchEmbed(in_channels=1, dim=8, patch_size=4)
    image = torch.rand(1, 1, 8, 12)
    changed = image.clone()
    changed[:, :, 4:8, 0:4] += 1  # patch (1, 0)
    differs = (embed(image) != embed(changed)).any(-1)[0]
    assert differs.tolist() == [[False, False, False], [True, False, False]]


def test_merging_concatenates_neighbours_column_by_column():
    merging = PatchMerging(dim=1)
    merging.norm = torch.nn.Identity()
    merging.reduction = torch.nn.Identity()
    pixels = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[None, :, :, None]
    assert merging(pixels).flatten().tolist() == [0.0, 2.0, 1.0, 3.0]  # as Swin's four slices


def test_expanding_unfolds_channels_row_by_row():
    expand = PatchExpand(dim=4, out_dim=1, factor=2)
    expand.norm = torch.nn.Identity()
    expand.expand = torch.nn.Identity()
    channels = torch.arange(4.0).view(1, 1, 1, 4)
    assert expand(channels)[0, :, :, 0].tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_resolution_and_channels_change_as_said():
    x = torch.rand(2, 4, 6, 8)
    assert PatchMerging(8)(x).shape == (2, 2, 3, 16)
    assert PatchExpand(8, 4, factor=2)(x).shape == (2, 8, 12, 4)
    assert PatchExpand(8, 8, factor=4)(x).shape == (2, 16, 24, 8)
