"""2-D pictures (PNG, TIFF) as grey images, and label maps as PNG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mambaseg.data.case import DataError
from mambaseg.data.files import AGAIN, check_array, check_file
from mambaseg.data.images import Image
from mambaseg.data.nifti import geometry_of

_GREY = {"1": np.uint8, "L": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I": np.int32,
         "F": np.float32}  # fmt: skip
_COLOUR = ("P", "LA", "RGB", "RGBA")


def read_picture(path: Path) -> Image:
    """Read a PNG or TIFF file of one grey picture; three equal colour channels are grey.

    The spacing is unknown. As NIfTI (for probabilities) its pixels have 1 mm, by convention.

    Raises:
        UserError: missing, damaged, too large, of several pages, or coloured.
    """
    check_file(path)
    import nibabel
    from PIL import Image as Pillow

    try:
        picture = Pillow.open(path, formats=("PNG", "TIFF"))
    except Exception as error:  # foreign bytes make Pillow raise nearly anything
        raise _unreadable(path, error) from error
    with picture:
        width, height = picture.size
        if picture.mode not in (*_GREY, *_COLOUR):
            raise DataError(f"the picture has the mode {picture.mode}", path, "Save it as grey.")
        dtype = np.dtype(_GREY.get(picture.mode, np.uint8))
        check_array(path, (1, height, width), dtype, "picture")
        pages = getattr(picture, "n_frames", 1)
        if pages > 1:
            problem = f"the file holds {pages} pages"
            raise DataError(problem, path, "Save one picture per file, or the stack as NIfTI.")
        try:
            coloured = picture.mode in _COLOUR
            pixels = np.asarray(picture.convert("RGBA") if coloured else picture)
        except Exception as error:  # as above
            raise _unreadable(path, error) from error
    if coloured:
        pixels = _grey(path, pixels)
    header = nibabel.Nifti1Header()
    header.set_data_shape((width, height, 1))
    header.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]), code=1)  # rows go down, columns right
    header.set_xyzt_units("mm")
    return Image(pixels.astype(dtype)[None, None, None], None, geometry_of(header), flat=True)


def _grey(path: Path, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The one channel of a picture (H, W, 4) that only looks coloured."""
    red = pixels[..., 0]
    if (pixels[..., 1:3] != red[..., None]).any() or (pixels[..., 3] != 255).any():
        raise DataError(
            "the picture has colours or is transparent, the networks take one grey channel",
            path,
            "Convert it the way the training images were converted.",
        )
    return red


def label_picture(labels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG whose grey values are the labels (H, W)."""
    from PIL import Image as Pillow

    stream = io.BytesIO()
    Pillow.fromarray(labels).save(stream, format="PNG")
    return stream.getvalue()


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"not a readable PNG or TIFF picture ({type(error).__name__})", path, AGAIN)
