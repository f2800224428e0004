"""What is installed: compromised releases are excluded, and the lock holds the tested versions."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CUDA_BUILD = re.compile(r"nvidia-.+|cuda-(bindings|pathfinder|toolkit)")
ENTRY = re.compile(r"([A-Za-z0-9._-]+)(\[[^]]+\])?==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def known():
    lines = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def locked():
    """Name -> version; every line that is no comment must be a version with hashes."""
    text = (ROOT / "constraints" / "lock.txt").read_text().replace(" \\\n    ", " ")
    found = {}
    for line in filter(None, text.splitlines()):
        if not line.startswith("#"):
            entry = ENTRY.fullmatch(line)
            assert entry, line[:100]
            assert canonical(entry[1]) not in found
            found[canonical(entry[1])] = entry[3]
    return found


@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_compromised_releases_cannot_be_installed(package):
    wanted = {Requirement(one).name: Requirement(one).specifier
              for one in project()["dependencies"]}[package]  # fmt: skip
    assert not wanted.contains("2.6.2") and not wanted.contains("2.6.3")
    assert wanted.contains("2.6.1") and wanted.contains(known()[package])
    assert known()[package] == locked()[package]


def test_the_lock_holds_the_tested_versions():
    versions, hashed = known(), locked()
    assert {name: hashed[name] for name in versions.keys() & hashed.keys()} == {
        name: version for name, version in versions.items() if name in hashed
    }
    more = {name for name in hashed.keys() - versions.keys() if not CUDA_BUILD.fullmatch(name)}
    assert more == {"setuptools"}  # builds this package
    assert versions.keys() - hashed.keys() == {"tzdata"}  # of Windows


def test_the_lock_is_complete_for_what_it_says_it_covers():
    about, hashed = project(), locked()
    extras = about["optional-dependencies"]
    wanted = [*about["dependencies"]]
    for extra in ("dev", "demo", "docs", "export", "images", "launchers", "ray", "search"):
        wanted += extras[extra]
    for requirement in map(Requirement, wanted):
        if requirement.name != about["name"]:
            assert requirement.specifier.contains(hashed[canonical(requirement.name)])


def test_the_lock_names_no_host():
    text = (ROOT / "constraints" / "lock.txt").read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
