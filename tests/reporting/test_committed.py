"""The pages of docs/results, which `mambaseg report --no-images` makes, by the present code."""

import shutil
from pathlib import Path

import pytest

from mambaseg.reporting import report

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGES = sorted(path.parent.parent for path in RESULTS.glob("*/report/table.md"))


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_a_committed_page_is_that_of_the_present_code(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: [])  # seconds, and no part of the tables
    copy = shutil.copytree(folder, tmp_path / folder.name, ignore=lambda *_: ["report"])
    report.write_report(copy, images=False)
    made, kept = (place / "report" / "table.md" for place in (copy, folder))
    assert made.read_text("utf-8") == kept.read_text("utf-8"), (
        f"make it again: mambaseg report --no-images docs/results/{folder.name}"
    )
