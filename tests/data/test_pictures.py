"""TIFF as it is stored, byte by byte, against what is read: right, or refused with the remedy."""

import struct

import numpy as np
import pytest
from PIL import Image

from mambaseg.data.formats.pictures import read_mask, read_pixels
from mambaseg.errors import UserError
from tiny_pictures import png_of_16_bits

UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def write_tiff(path, pixels, *, white_is_0=False, big=False, kind=UNSIGNED, planar=1):
    """An uncompressed TIFF of (H, W) or (H, W, 3) with the given tags."""
    order, (height, width) = "<>"[big], pixels.shape[:2]
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    planes = np.moveaxis(pixels, -1, 0) if planar == 2 else pixels
    data = planes.astype(pixels.dtype.newbyteorder(order)).tobytes()
    strips = samples if planar == 2 else 1
    data += b"\0" * (len(data) % 2)

    def values(code, *numbers):  # of a tag, behind the pixels where they are longer than 4 bytes
        nonlocal data
        packed = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(packed) <= 4:
            return packed.ljust(4, b"\0")
        data += packed
        return struct.pack(f"{order}I", 8 + len(data) - len(packed))

    size = pixels.nbytes // strips
    colour = 2 if samples == 3 else 0 if white_is_0 else 1
    tags = [
        (256, 4, 1, values("I", width)), (257, 4, 1, values("I", height)),
        (258, 3, samples, values("H", *[pixels.itemsize * 8] * samples)),
        (259, 3, 1, values("H", 1)), (262, 3, 1, values("H", colour)),
        (273, 4, strips, values("I", *[8 + size * strip for strip in range(strips)])),
        (277, 3, 1, values("H", samples)), (278, 4, 1, values("I", height)),
        (279, 4, strips, values("I", *[size] * strips)), (284, 3, 1, values("H", planar)),
        (339, 3, samples, values("H", *[kind] * samples)),
    ]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags)
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4)
    return path


def numbers(dtype, shape=(5, 6)):
    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return random.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    return random.integers(info.min, info.max, shape, endpoint=True, dtype=dtype)


KINDS = {"u1": UNSIGNED, "u2": UNSIGNED, "u4": UNSIGNED, "i2": SIGNED, "i4": SIGNED, "f4": FLOAT,
         "i1": SIGNED, "f8": FLOAT}  # fmt: skip


@pytest.mark.parametrize("white_is_0", [False, True])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
def test_grey_is_read_as_it_is_shown_or_refused(tmp_path, dtype, big, white_is_0):
    stored = numbers(dtype)
    path = write_tiff(tmp_path / "a.tif", stored, big=big, kind=KINDS[dtype], white_is_0=white_is_0)
    may_be_refused = white_is_0 or dtype in ("i1", "f8") or (dtype == "u4" and big)
    try:
        read = read_pixels(path)[0]
    except UserError as error:
        assert may_be_refused and "a.tif" in str(error) and "ave it" in str(error)
    else:
        shown = 255 - stored if white_is_0 else stored
        assert (dtype == "u1" or not white_is_0) and dtype != "i1"
        if dtype == "u2":
            read = read * 257
        np.testing.assert_allclose(read, shown.astype(np.float64), rtol=1e-6)
    try:
        mask, _ = read_mask(path)
    except UserError as error:
        assert may_be_refused and "a.tif" in str(error)
    else:
        np.testing.assert_allclose(mask, stored.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_colours_are_read_as_they_are_shown_or_refused(tmp_path, dtype, big, planar):
    stored = numbers(dtype, (5, 6, 3))
    path = write_tiff(tmp_path / "a.tif", stored, big=big, planar=planar)
    if (dtype, planar) == ("u2", 2):
        with pytest.raises(UserError, match=r"a\.tif: the picture has colours of 16 bits in"):
            read_pixels(path, 3)
        return
    shown = stored if dtype == "u1" else stored // 256
    assert np.array_equal(read_pixels(path, 3), shown.transpose(2, 0, 1))


@pytest.mark.parametrize("ending", ["tif", "png"])
def test_numbers_of_classes_in_colours_of_sixteen_bits_are_refused(tmp_path, ending):
    """Pillow keeps the upper byte: 1, 2 and 3 would all be background."""
    classes = np.repeat(np.arange(12, dtype="u2").reshape(3, 4, 1), 3, axis=2)
    path = tmp_path / f"a.{ending}"
    if ending == "tif":
        write_tiff(path, classes)
    else:
        path.write_bytes(png_of_16_bits(classes))
    with pytest.raises(UserError, match="colours of 16 bits"):
        read_mask(path)


def test_grey_with_a_transparent_value_is_refused(tmp_path):
    Image.fromarray(np.arange(12, dtype="u1").reshape(3, 4)).save(
        tmp_path / "a.png", transparency=3
    )
    with pytest.raises(UserError, match="transparent"):
        read_pixels(tmp_path / "a.png")


def test_a_palette_is_shown_as_a_picture_and_counted_as_a_mask(tmp_path):
    indices = np.arange(12, dtype="u1").reshape(3, 4)
    picture = Image.fromarray(indices).convert("P")
    picture.putdata(indices.ravel().tolist())
    colours = np.random.default_rng(0).integers(0, 256, (12, 3))
    picture.putpalette(colours.ravel().tolist())
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_pixels(tmp_path / "a.png", 3), colours.T.reshape(3, 3, 4))
    assert np.array_equal(read_mask(tmp_path / "a.png")[0], indices)


def test_a_picture_claims_no_millimetres(tmp_path):
    from mambaseg.data.formats.pictures import read_picture

    Image.fromarray(numbers("u1")).save(tmp_path / "a.png")
    image = read_picture(tmp_path / "a.png")
    assert image.spacing is None and image.header["xyzt_units"] == 0
