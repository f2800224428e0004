"""Numbers of a method that cannot be end in a message that names the key and its limits."""

import math

import pytest
import torch
from torch import nn

from mambaseg.errors import UserError
from mambaseg.models import UNet
from mambaseg.training.methods.deep_adversarial import DeepAdversarial
from mambaseg.training.methods.deep_co_training import DeepCoTraining
from mambaseg.training.methods.dmpls import DMPLS
from mambaseg.training.methods.entropy import Entropy
from mambaseg.training.methods.fixmatch import FixMatch
from mambaseg.training.methods.gated_crf import GatedCRF
from mambaseg.training.methods.ict import ICT
from mambaseg.training.methods.mean_teacher import MeanTeacher
from mambaseg.training.methods.mumford_shah import MumfordShah
from mambaseg.training.methods.peers import Peers
from mambaseg.training.methods.scribble2label import Scribble2Label
from mambaseg.training.methods.semi_mamba_unet import SemiMambaUNet
from mambaseg.training.methods.uamt import UAMT
from mambaseg.training.methods.urpc import URPC
from mambaseg.training.methods.ustm import USTM
from mambaseg.training.methods.weak_mamba_unet import WeakMambaUNet

REFUSED = [
    *((kind, "weight", (-1, math.nan, math.inf)) for kind in (
        MeanTeacher, UAMT, ICT, USTM, Entropy, DeepCoTraining, FixMatch, GatedCRF, MumfordShah,
        Scribble2Label, DeepAdversarial, URPC, DMPLS, Peers, SemiMambaUNet, WeakMambaUNet)),
    (MeanTeacher, "decay", (-2, 1.5, "much")),
    (MeanTeacher, "start", (-0.1, 5)),
    (MeanTeacher, "noise", (-1,)),
    (MeanTeacher, "clip", (-1,)),
    (UAMT, "passes", (0,)),
    (USTM, "decay", (1.5,)),
    (ICT, "alpha", (0, -1)),
    (FixMatch, "threshold", (-0.1, 1, 80)),
    (FixMatch, "jitter", (-3, 1.5)),
    (GatedCRF, "position", (0, -1)),
    (GatedCRF, "intensity", (0,)),
    (GatedCRF, "radius", (0, -1)),
    (Scribble2Label, "start", (5,)),
    (Scribble2Label, "every", (0,)),
    (Scribble2Label, "momentum", (0, 2)),
    (Scribble2Label, "threshold", (1,)),
    (DeepAdversarial, "lr", (-1, 0)),
    (DeepAdversarial, "width", (0,)),
    (DMPLS, "dropout", (1, -0.5)),
    (SemiMambaUNet, "contrast", (-1,)),
]  # fmt: skip


def made(kind, **options):
    unet = kind in (URPC, DMPLS)
    network = UNet(widths=(2, 2, 2), dropout=(0, 0, 0)) if unet else nn.Conv2d(1, 2, 1)
    count = 2 if kind.count is None else kind.count
    images = {"in_channels": 1, "num_classes": 2} if kind is DeepAdversarial else {}
    return kind([network] * count, **images, **options)


@pytest.mark.parametrize(("kind", "key", "values"), REFUSED)
def test_a_number_that_cannot_be_is_refused_by_its_key(kind, key, values):
    for value in values:
        with pytest.raises(
            UserError, match=rf"method\.{key}={value}: it must be a (whole )?number"
        ):
            made(kind, **{key: value})


def test_the_limits_are_named():
    for kind, key, value, limits in (
        (MeanTeacher, "decay", 1.5, "a number, 0 to 1"),
        (FixMatch, "threshold", 2, "a number, 0 or more and below 1"),
        (Scribble2Label, "momentum", 2, "a number above 0, 1 at most"),
        (UAMT, "passes", 0, "a whole number, 1 or more"),
    ):
        with pytest.raises(UserError) as caught:
            made(kind, **{key: value})
        assert str(caught.value) == f"method.{key}={value}: it must be {limits}"


def test_the_ends_that_mean_something_are_allowed():
    made(MeanTeacher, decay=0, start=1, noise=0, weight=0)
    made(MeanTeacher, decay=1, start=0)
    made(FixMatch, threshold=0, jitter=0), made(FixMatch, jitter=1)
    made(DMPLS, dropout=0), made(Scribble2Label, momentum=1)


def test_a_neighbourhood_ends_within_the_image():
    method, image = made(GatedCRF, radius=7), torch.rand(1, 1, 9, 8)
    assert method.pairwise(image, image) > 0
    with pytest.raises(UserError, match=r"method\.radius=8: .*9 × 8 pixels allow 7 at most"):
        made(GatedCRF, radius=8).pairwise(image, image)
