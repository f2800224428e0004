"""Networks of a library: any decoder of segmentation_models_pytorch on any of its encoders.

Its encoders are its own and those of timm (Iakubovskii 2019, github.com/qubvel-org/
segmentation_models.pytorch; Wightman 2019, github.com/huggingface/pytorch-image-models). Both come
with the extra `zoo`.
"""

import difflib
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor, nn

from mambaseg.errors import NotInstalledError, UserError
from mambaseg.models.pretrained import Pretrained

try:
    import segmentation_models_pytorch as smp
    from timm import list_models as timm_models
except ImportError as error:
    raise NotInstalledError(
        f"model=smp and model=timm_u need segmentation_models_pytorch and timm ({error}): "
        "pip install 'mambaseg[zoo]'"
    ) from error


class SMP(Pretrained):
    """A network of segmentation_models_pytorch, image (B, C, H, W) -> logits (B, K, H, W).

    Height and width must be multiples of `size_multiple`.

    Args:
        in_channels: C.
        num_classes: K.
        arch: the decoder as the library names it: `Unet`, `UnetPlusPlus`, `FPN`, `Segformer`, ...
        encoder: a name of the library's encoders, `tu-` in front of one of timm's.
        timm: take `encoder` as a name of timm without the `tu-`.
        more: other arguments of the decoder and encoder, such as `decoder_attention_type="scse"`;
            list them in a config of your own.

    Raises:
        UserError: the library has no such decoder or encoder, or they do not fit together.
    """

    backbone: ClassVar[str] = "the weights of its encoder, with the keys of the library's encoder"
    size_multiple = 32  # of an encoder of five stages; fewer need less
    encoder_parts: ClassVar[tuple[str, ...]] = ("network.encoder.",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        arch: str = "Unet",
        encoder: str = "resnet34",
        *,
        timm: bool = False,
        **more: Any,
    ) -> None:
        super().__init__()
        if arch.lower() not in smp.MODEL_ARCHITECTURES_MAPPING:
            raise _unknown("model.arch", arch, smp.MODEL_ARCHITECTURES_MAPPING)
        name = f"tu-{encoder}" if timm else encoder
        of_timm = name.startswith("tu-")
        encoders = timm_models() if of_timm else smp.encoders.get_encoder_names()
        if (known := name.removeprefix("tu-").partition(".")[0]) not in encoders:
            raise _unknown("model.encoder", known, encoders)
        try:
            self.network = smp.create_model(
                arch,
                encoder_name=name,
                encoder_weights=None,
                in_channels=in_channels,
                classes=num_classes,
                **more,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"model.arch={arch} model.encoder={encoder} cannot be made: {error}"
            ) from error

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to logits `(B, K, H, W)`."""
        try:
            logits: Tensor = self.network(image)
        except AssertionError as error:  # timm's, of an encoder for images of one size
            raise UserError(
                f"model.encoder: this encoder does not take images of {tuple(image.shape[-2:])} "
                f"pixels ({error}). Set data.size to its own; or, in a config of your own, "
                "strict_img_size: false (timm's Swin) or dynamic_img_size: true (its ViT), see "
                "docs/own-project.md."
            ) from error
        return logits

    def backbone_names(self) -> dict[str, str]:
        """All keys are the encoder's; timm's own names, too, which it flattens for features."""
        names = {}
        model = getattr(self.network.encoder, "model", nn.Module())
        for part, _ in model.named_children():  # `stages_0` is `stages.0` in a file of timm
            for theirs in (part, part.replace("_", ".", 1)):
                names[f"{theirs}."] = f"network.encoder.model.{part}."
        return names | {"": "network.encoder."}


def _unknown(key: str, name: str, known: Collection[str]) -> UserError:
    near = ", ".join(difflib.get_close_matches(name.lower(), known, 5, 0.5))
    remedy = f"did you mean one of {near}?" if near else f"it has {', '.join(sorted(known))}"
    return UserError(f"{key}={name}: the library has no such name; {remedy}")
