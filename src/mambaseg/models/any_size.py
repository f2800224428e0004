"""Any image size for any network: pad at the bottom and right, run, crop back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.errors import UserError


def require_multiple(image: Tensor, multiple: int | Sequence[int], network: str) -> None:
    """Raise `UserError` unless height and width of `(B, C, H, W)` are multiples of `multiple`.

    It is one number, or one of each.
    """
    height, width = image.shape[-2:]
    rows, columns = (multiple, multiple) if isinstance(multiple, int) else multiple
    multiple = rows if rows == columns else [rows, columns]
    if height % rows or width % columns:
        raise UserError(
            f"{network} takes images whose height and width are multiples of {multiple}, "
            f"got {height} × {width}. Choose another size (data.size), or in Python wrap it in "
            f"AnySize(network, multiple={multiple}), which pads and crops."
        )


@contextmanager
def wide_enough(network: str, image: Tensor) -> Iterator[None]:
    """Says what to do where a network's norm has a single pixel of an image left; `UserError`."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 "):  # of instance or batch norm
            raise
        height, width = image.shape[-2:]
        more = ", data.batch_size above 1" if "per channel" in str(error) else ""
        raise UserError(
            f"{network} reduces an image of {height} × {width} pixels to a single one, which "
            f"cannot be normalised: use larger images (data.size){more}, or a network with fewer "
            "stages."
        ) from error


class AnySize(nn.Module):
    """Give a network that needs multiples of some size any input size.

    The image is padded with zeros at the bottom and right up to the next multiple; logits are
    cropped to the image again.

    Args:
        network: maps `(B, C, H, W)` to `(B, K, H, W)`; kept as `.network`. If it has an integer
            attribute `patch_size`, smaller images are refused rather than padded into existence.
        multiple: what height and width must be a multiple of: one number, or one of each.
        residual: add the image to the output: the network predicts a change of it; K must be C.
        encoder_parts: where the names of the encoder's parameters begin; None: as the network says.
    """

    def __init__(
        self,
        network: nn.Module,
        multiple: int | Sequence[int],
        *,
        residual: bool = False,
        encoder_parts: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.multiples = (multiple, multiple) if isinstance(multiple, int) else tuple(multiple)
        if len(self.multiples) != 2 or min(self.multiples) < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}")
        self.network, self.residual = network, residual
        self.encoder_parts = encoder_parts

    def padded(self, image: Tensor) -> Tensor:
        """The image (B, C, H, W) with zeros below and on the right, as the network sees it."""
        bottom, right = (-image.shape[axis] % self.multiples[axis] for axis in (-2, -1))
        return F.pad(image, (0, right, 0, bottom)) if bottom or right else image

    def supervise_deeply(self) -> None:
        """Let the network train heads at several scales, where it has them."""
        getattr(self.network, "supervise_deeply", lambda: None)()

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Map `(B, C, H, W)` to logits `(B, K, H, W)`; in training to a list, if there are several.

        Raises:
            UserError: the image is smaller than the network's patch or too small for its norms, or
                the output is not one tensor of the input's height and width, or several heads see a
                padded image or are to be added to it.
        """
        height, width = image.shape[-2:]
        smallest = getattr(self.network, "patch_size", 1)
        if isinstance(smallest, int) and min(height, width) < smallest:
            raise UserError(
                f"an image of {height} × {width} pixels is smaller than one patch "
                f"({smallest} × {smallest}) of {type(self.network).__name__}: use larger images "
                f"(data.size) or a network without patches (model=unet)."
            )
        name = type(self.network).__name__
        with wide_enough(name, image):  # its message gives the size before padding
            image = self.padded(image)
            logits: Tensor = self.network(image)
        if isinstance(logits, list) and self.training:
            if self.residual:
                raise UserError(
                    f"model.residual: {name} gives {len(logits)} outputs while it trains, and one "
                    "is to be added to the image"
                )
            if image.shape[-2:] != (height, width):
                raise UserError(
                    f"{name} has heads at several scales, for which training images of {height} × "
                    f"{width} cannot be padded: choose data.size as a multiple of "
                    f"{' × '.join(map(str, dict.fromkeys(self.multiples)))}"
                )
            return logits
        if not isinstance(logits, Tensor) or logits.shape[-2:] != image.shape[-2:]:
            shape = f"tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else None
            raise UserError(
                f"{name} gives a {shape or type(logits).__name__} for an image of "
                f"{tuple(image.shape)}; expected is one tensor of logits (B, K, H, W) with the "
                "image's height and width. In its config switch off what adds outputs (deep "
                "supervision) or changes their size."
            )
        if self.residual and logits.shape != image.shape:
            raise UserError(
                f"model.residual: the output of {name} has {logits.shape[1]} channels and is to be "
                f"added to an image of {image.shape[1]}. Leave it out for networks that label."
            )
        return (logits + image if self.residual else logits)[..., :height, :width]
