"""What the page says and does: few patients, its files, names of plots, sorting."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_runs import write_run

from mambaseg.reporting import page as pages
from mambaseg.reporting.cards import Picture
from mambaseg.reporting.report import write_report

SCRIPT = Path(pages.__file__).with_name("templates") / "page.js"
NODE = shutil.which("node")


@pytest.mark.parametrize("networks", [("unet", "mamba_unet"), ("unet",)])
def test_a_report_on_one_patient_is_written_and_names_its_files(tmp_path, no_figures, networks):
    for name in networks:
        write_run(tmp_path, name, patients=(1,), size=16)
    path = write_report(tmp_path, images=False)
    text = " ".join(path.read_text().split())
    assert ("In words" in text) == (len(networks) > 1)
    assert "Dice): too few patients (1)" in text or len(networks) == 1  # and no interval
    footer = text.partition("<footer>")[2].partition("</footer>")[0]
    for name in ("table.md", "table.tex", "table.csv", "paired.csv", "clinical.csv"):
        assert (name in footer) == (path.parent / name).exists()
    assert "paired.csv" in footer or len(networks) == 1


def test_a_plot_has_a_name_for_those_who_do_not_see_it():
    svg = pages._drawn(Picture('Dice "<&', "", Path("a.png"), '<svg viewBox="0 0 50 20"></svg>'))
    assert 'role="img" aria-label="Dice &#34;&lt;&amp;"' in svg


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_cells_without_a_number_come_last_in_both_directions():
    cells = ["–", "0.5 ± 0.1", "−2", "1 h 2 min", "0.9", "–"]
    order = """
        const row = (text) => ({cells: [{textContent: text}]});
        const sorted = (sign) => CELLS.map(row).sort((a, b) => compare(a, b, 0, sign));
        const texts = (sign) => sorted(sign).map((row) => row.cells[0].textContent);
        console.log(JSON.stringify([1, -1].map(texts)));
    """.replace("CELLS", json.dumps(cells))
    script = f"const document = {{querySelectorAll: () => []}};{SCRIPT.read_text()}{order}"
    done = subprocess.run([NODE, "-e", script], capture_output=True, text=True, check=True)
    rising = ["−2", "0.5 ± 0.1", "0.9", "1 h 2 min"]
    assert json.loads(done.stdout) == [[*rising, "–", "–"], [*rising[::-1], "–", "–"]]
