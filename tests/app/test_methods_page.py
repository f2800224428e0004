"""docs/methods.md says what the configs and the classes of the methods say."""

import pytest

from mambaseg.app.entry import CONF
from tables import methods_table, write_methods

PAGE = CONF.parent / "docs" / "methods.md"


def test_the_table_is_that_of_the_configs(tmp_path):
    table = methods_table()
    assert f"\n{table}\n" in PAGE.read_text("utf-8"), "run `make methods`"
    rows = {row.split("`")[1]: row.split(" | ") for row in table.splitlines()[2:]}
    assert sorted(rows) == sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    assert rows["mean_teacher"][-2:] == ["unlabelled images", "1 + 0.5 |"]
    assert rows["weak_mamba_unet"][-2:] == ["2 networks or more", "3 |"]
    assert "the decoder of a UNet" in rows["dmpls"][-2]


def test_only_the_table_of_a_page_is_written(tmp_path):
    page = tmp_path / "page.md"
    results = "# Mine\n\n| method | Dice |\n|---|---|\n| a | 0.5 |\n\n"  # another table
    page.write_text(f"{results}| method | what |\n|---|---|\n| a | b |\n\nMore.\n")
    write_methods(page)
    assert page.read_text() == f"{results}{methods_table()}\nMore.\n"
    page.write_text("# Mine\n")
    with pytest.raises(SystemExit, match="no table of methods"):
        write_methods(page)
