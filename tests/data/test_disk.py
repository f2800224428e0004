"""A full disk ends in one message with folder and remedy, and leaves nothing half."""

import pytest
from fake_cases import find_fakes, write_cases

from mambaseg.data.cache import open_cache
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.phantoms.phantom import write_phantom
from small_disk import content, fill, no_space, small_disk


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", kibibytes=3072) as folder:
        yield folder


def test_the_phantom(disk):
    write_phantom(disk / "small", patients=1)
    before = content(disk)
    fill(disk, leave=64 * 1024)
    with no_space(disk / "large", "data.root="):
        write_phantom(disk / "large", patients=2)
    assert content(disk) == before
    write_phantom(disk / "small", patients=1)


def test_the_decoded_cache(disk, tmp_path):
    write_cases(tmp_path / "fakes", patients=2)
    write_cases(tmp_path / "more", patients=6)

    def opened(root):
        return open_cache(
            find_fakes(root), Preprocessing("paper", 32), cache_dir=disk, num_classes=4
        )

    first = opened(tmp_path / "fakes")
    before = content(disk)
    ballast = fill(disk, leave=32 * 1024)
    with no_space(disk, "data.cache_dir="):
        opened(tmp_path / "more")
    assert content(disk) == before
    opened(tmp_path / "fakes").verify()
    ballast.unlink()
    assert len(opened(tmp_path / "more")) == 12 and first.folder.exists()
