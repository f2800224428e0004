"""Networks of segmentation_models_pytorch and timm, and what happens without these libraries."""

import json
import sys
import types

import pytest
import torch

import mambaseg.models
from mambaseg.app.check import check_targets
from mambaseg.errors import NotInstalledError, UserError
from runs import QUIET, built, composed, entered, small_overrides
from small_networks import ZOO, full_network

needs_zoo = pytest.mark.skipif(bool(ZOO), reason="needs the extra zoo, and a torchvision for torch")


def forget():
    """Lets the module be imported again."""
    sys.modules.pop("mambaseg.models.zoo", None)
    vars(mambaseg.models).pop("zoo", None)


@pytest.fixture
def anew():
    forget()
    yield
    forget()


@pytest.fixture
def without_zoo(anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)


@pytest.fixture
def stand_in(anew, monkeypatch):
    """A library that makes one kind of network, and keeps what it was asked for."""

    class Made(torch.nn.Module):
        def __init__(self, arch, *, encoder_name, encoder_weights, in_channels, classes, **more):
            super().__init__()
            self.asked = (arch, encoder_name, encoder_weights, more)
            self.encoder = torch.nn.Sequential(torch.nn.Conv2d(in_channels, 4, 3, padding=1))
            self.encoder.output_stride = 16
            self.segmentation_head = torch.nn.Conv2d(4, classes, 1)

        def forward(self, image):
            assert image.shape[-1] % 32 == 0
            return self.segmentation_head(self.encoder(image))

    def create_model(arch, **how):
        if "bogus" in how:
            raise TypeError("no argument bogus")
        return Made(arch, **how)

    smp = types.ModuleType("segmentation_models_pytorch")
    smp.create_model = create_model
    smp.MODEL_ARCHITECTURES_MAPPING = {"unet": Made, "fpn": Made}
    smp.encoders = types.SimpleNamespace(get_encoder_names=lambda: ["resnet18", "resnet34"])
    timm = types.ModuleType("timm")
    timm.list_models = lambda: ["convnext_tiny"]
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", smp)
    monkeypatch.setitem(sys.modules, "timm", timm)


@needs_zoo
@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("smp", {}, 24_430_532),
        ("smp", {"arch": "DeepLabV3Plus", "encoder": "resnet18"}, 12_323_796),
        ("smp", {"arch": "Segformer", "encoder": "mit_b0"}, None),
        ("timm_u", {}, 31_926_116),
    ],
)
def test_the_libraries_networks_take_images_of_any_size(name, changes, parameters):
    network = full_network(name, **changes).eval()
    assert parameters in (None, sum(p.numel() for p in network.parameters()))
    with torch.no_grad():
        assert network(torch.rand(1, 1, 50, 70)).shape == (1, 4, 50, 70)


@needs_zoo
def test_weights_of_an_encoder_are_loaded_from_its_file(tmp_path):
    source = full_network("smp", encoder="resnet18").network.network.encoder
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    network = full_network("smp", encoder="resnet18", pretrained=str(tmp_path / "resnet18.pth"))
    for key, value in source.state_dict().items():
        assert torch.equal(network.network.network.encoder.state_dict()[key], value)


@needs_zoo
@pytest.mark.parametrize("encoder", ["convnext_atto", "resnet18", "efficientnet_b0"])
def test_weights_of_timm_fill_its_encoder(encoder, tmp_path):
    import timm

    source = timm.create_model(encoder).state_dict()
    torch.save(source, tmp_path / "weights.pth")
    network = full_network("timm_u", encoder=encoder, in_channels=3)
    report = network.network.load_pretrained_encoder(tmp_path / "weights.pth")
    assert not [key for key in report.missing if ".encoder." in key]
    assert all(
        key.startswith(("head", "fc", "classifier", "conv_head", "bn2")) for key in report.ignored
    )


def test_a_config_chooses_decoder_and_encoder_without_a_download(stand_in):
    network = full_network("smp", arch="FPN", encoder="tu-convnext_tiny", dropout=0.5)
    assert network.network.network.asked == ("FPN", "tu-convnext_tiny", None, {"dropout": 0.5})
    assert network(torch.rand(1, 1, 33, 40)).shape == (1, 4, 33, 40)
    asked = full_network("timm_u").network.network.asked
    assert asked == ("Unet", "tu-convnext_tiny", None, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet43"}, r"model\.encoder=resnet43.*resnet34"),
        ({"encoder": "tu-convnext_tny"}, r"model\.encoder=convnext_tny.*convnext_tiny"),
        ({"arch": "Unett"}, r"model\.arch=Unett.*unet"),
        ({"bogus": 1}, "no argument bogus"),
    ],
)
def test_unknown_names_are_refused_with_those_nearby(stand_in, changes, message):
    with pytest.raises(Exception, match=message) as caught:
        full_network("smp", **changes)
    assert isinstance(caught.value.__cause__, UserError)


def test_an_argument_that_no_checkpoint_could_give_back_is_refused(stand_in, small_run):
    with pytest.raises(UserError, match=r"model\.dropout: .* a config of your own"):
        built(*small_run, "model=smp", "+model.dropout=0.5")


def test_without_the_library_one_message_names_the_extra(without_zoo):
    with pytest.raises(NotInstalledError, match=r"pip install 'mambaseg\[zoo\]'"):
        check_targets(composed("model=smp"))


def test_a_sweep_skips_what_is_not_installed_and_says_why(
    without_zoo, phantom_root, tmp_path, capsys
):
    words = [*small_overrides(phantom_root, tmp_path), *QUIET, "trainer=cpu", "data.steps=1",
             "data.val_every=1", "test=false", "name=doors",
             "model=monai_basic_unet,smp"]  # fmt: skip
    assert entered("train.py", "-m", *words) == 0
    jobs = [json.loads(p.read_text()) for p in (tmp_path / "doors" / ".jobs").glob("*.json")]
    (skipped,) = [job for job in jobs if job.get("skipped")]
    assert "model=smp" in skipped["overrides"] and "mambaseg[zoo]" in skipped["error"]
    said = capsys.readouterr().out
    assert "skipped" in said and "mambaseg[zoo]" in said


def test_a_sweep_of_nothing_that_is_installed_is_refused(
    without_zoo, phantom_root, tmp_path, capsys
):
    words = [*small_overrides(phantom_root, tmp_path), *QUIET, "name=none", "model=smp", "seed=1,2"]
    assert entered("train.py", "-m", *words) == 1
    assert "mambaseg[zoo]" in capsys.readouterr().err and not (tmp_path / "none").exists()
