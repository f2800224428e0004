"""Commands of the pages are ones that the program takes; README's first screen keeps its size."""

import re
import shlex
from pathlib import Path

import pytest

from mambaseg.app.check import checked
from mambaseg.app.overrides import arranged, jobs_of
from runs import composed

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
OWN_DATA = (ROOT / "docs" / "own-data.md").read_text("utf-8")


# configs of the reader's own, launchers and searches
ELSEWHERE = r"data=(heart|brats|kvasir)|my_module|train \.\.\.|glob|--config-dir|hydra/|hparams"


# commands that compose a configuration -> its file in conf/
SCRIPTS = {"train": "config"} | {name: name for name in ("evaluate", "predict", "export", "demo")}


def shell(text):
    """The commands of all blocks, without their comments."""
    lines = "".join(re.findall(r"```(?:sh|bash|text)\n(.*?)```", text, re.DOTALL))
    lines = lines.replace("\\\n", " ").replace("<run folder>", "<run>")
    return [re.sub(r"\s+#.*", "", line.removeprefix("$ ")) for line in lines.splitlines()]


def test_the_way_from_images_to_label_maps_is_the_one_that_is_executed():
    """tests/app/test_documented_ways.py executes the first block of docs/own-data.md."""
    (block,) = re.findall(r"\n## From a folder .*?```sh\n(.*?)```", README, re.DOTALL)
    assert block == re.search(r"```sh\n(.*?)```", OWN_DATA, re.DOTALL)[1]
    assert len(block.splitlines()) == 5


@pytest.mark.parametrize(
    "line",
    [
        line
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for line in shell(page.read_text("utf-8"))
        if line.startswith(tuple(f"mambaseg {name} " for name in SCRIPTS))
        and not re.search(ELSEWHERE, line)
    ],
)
def test_a_command_is_composed_as_it_is_written(line):
    script = SCRIPTS[line.split()[1]]
    _, words = arranged(shlex.split(line)[2:])
    for job in jobs_of([word for word in words if word != "-m"]):
        checked(composed(*job, hydra=True, script=script), script, job)


def test_the_first_screen_is_short_and_its_pictures_are_small():
    assert len(README.splitlines()) <= 150
    pictures = re.findall(r"!\[[^]]+\]\((docs/\S+\.png)\)", README)
    assert len(pictures) == 2
    assert all((ROOT / picture).stat().st_size <= 150_000 for picture in pictures)


def test_it_counts_the_networks_that_need_no_extra():
    configs = [path.read_text("utf-8") for path in (ROOT / "conf" / "model").glob("*.yaml")]
    (counted,) = re.findall(r"compares (\d+) networks", README)
    assert int(counted) == sum("mambaseg.models.zoo" not in config for config in configs)
