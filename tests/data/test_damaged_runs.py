"""A few damages from the table through train.py and evaluate.py, as a user meets them."""

import math
import re
from pathlib import Path

import pytest
from damages import DAMAGES
from harms import WRITERS, write_official

from mambaseg.storage.run_folder import RunFolder
from runs import entered

pytestmark = pytest.mark.timeout(120)

BY_NAME = {damage.name: damage for damage in DAMAGES}
REFUSED = (
    "a gzip bomb behind a sound header",
    "a pipe named like a label",
    "a voxel size of zero",
    "a link into another HDF5 file",
)
HANDLED = ("an image of zeros", "a voxel size of no heart scan")


def words(root, outputs):
    return [
        *("data=acdc", f"data.root={root}", f"data.cache_dir={outputs}-cache", "data.split=random"),
        *(f"outputs={outputs}", "model=unet", "model.widths=[4,8,8,8,8]", "logger=csv"),
        *("data.size=32", "data.batch_size=2", "data.steps=2", "data.val_every=2"),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on sound data."""
    place = tmp_path_factory.mktemp("trained")
    write_official(place / "sound")
    assert entered("train.py", *words(place / "sound", place / "outputs")) == 0
    (checkpoint,) = place.glob("outputs/default/*/checkpoints/best.ckpt")
    return checkpoint.parents[1]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_data_set_ends_the_script_with_file_and_remedy(
    name, script, trained, tmp_path, capsys
):
    damage = BY_NAME[name]
    root, outputs = tmp_path / "data", tmp_path / "outputs"
    WRITERS[damage.layout](root)
    damage.harm(root)
    arguments = words(root, outputs)
    if script == "evaluate.py":
        arguments.append(f"checkpoint={trained}")
    assert entered(script, *arguments) == 1
    said = capsys.readouterr().err
    assert damage.expected.file in said and "Traceback" not in said
    assert re.search(damage.expected.says, said) and re.search(damage.expected.remedy, said)
    left = [path for place in (outputs, Path(f"{outputs}-cache")) for path in place.rglob("*")]
    assert not [path for path in left if path.is_file() and path.name != "train.log"], left


def test_suspicious_cases_are_trained_on_and_scored(trained, tmp_path):
    root, outputs = tmp_path / "data", tmp_path / "outputs"
    write_official(root)
    for name in HANDLED:
        BY_NAME[name].harm(root)
    for script, more in (("train.py", []), ("evaluate.py", [f"checkpoint={trained}"])):
        assert entered(script, *words(root, outputs), *more) == 0
    summaries = list(outputs.glob("*/*/metrics.json"))
    assert len(summaries) == 2
    for path in summaries:
        dice = RunFolder(path.parent).summary["all"]["dice"]
        assert math.isfinite(dice["mean"]) and dice["count"] > 0
