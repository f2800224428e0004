"""The report as a whole: which files there are, and that their numbers are the runs' own."""

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from statistics import fmean, stdev

import numpy as np
import pytest
from fake_runs import write_run
from scipy import stats

from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.clinical import agreement, clinical_grid, indices
from mambaseg.reporting.collect import collect
from mambaseg.reporting.costs import cost_grid
from mambaseg.reporting.figures import mosaic
from mambaseg.reporting.grid import Grid, signed
from mambaseg.reporting.page import page
from mambaseg.reporting.paired import pairs, verdict
from mambaseg.reporting.plots import (
    HATCHES,
    LINES,
    _again,
    _agreements,
    _colour,
    _histograms,
    _styled,
)
from mambaseg.reporting.reading import read_run
from mambaseg.reporting.report import _FIGURE, section_of, write_report
from mambaseg.reporting.tables import run_grid


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "a<b"  # a name that a page has to escape
    for seed in (1, 2):
        write_run(folder, "unet", seed=seed, patients=range(1, 8), size=16)
    write_run(folder, "mamba_unet", error=0.8, patients=range(1, 8), size=16, misses=[(3, 1)])
    write_run(folder, "swin_unet", policy="legacy", patients=(1, 2), size=16)
    (folder / "crashed").mkdir()
    (folder / "crashed" / "run.json").write_text('{"status": "failed", "error": "boom <x>"}')
    write_report(folder)
    return folder


def rows(experiment, name):
    with (experiment / "report" / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_file_is_written_and_nothing_half(experiment):
    report = experiment / "report"
    names = {path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file()}
    figures = ["dice-histogram", "dice-classes", "curves", "overlay-best", "overlay-median",
               "overlay-worst", "costs", "agreement-ef", "agreement-edv", "agreement-esv",
               "agreement-mass"]  # fmt: skip
    assert names == {
        "index.html", "table.md", "table.tex", "table.csv", "paired.csv", "clinical.csv",
        *(f"figures/{part}-{name}.png" for part in (1, 2) for name in figures),
    } - {"figures/2-costs.png", "figures/2-overlay-median.png"}  # fmt: skip  # of one, of two
    pictures = [path.name for path in (report / "figures").iterdir()]
    assert all(map(_FIGURE.fullmatch, [*pictures, "reliability.png"]))


class Page(HTMLParser):
    """Collects what a browser would fetch, and whether tags close."""

    void = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.ids, self.links, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.fetched += [found[k] for k in ("src", "href", "xlink:href", "srcset") if found.get(k)]
        if tag == "h2" or tag == "h3" or tag == "figure":
            self.ids.append(found.get("id"))
        if tag == "a":
            self.links.append(found["href"])
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.fetched += [value for key, value in attributes if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_fetches_nothing_and_is_well_formed(experiment):
    text = (experiment / "report" / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    outside = [what for what in page.fetched if not what.startswith(("#", "data:image/png;base64"))]
    assert outside == []
    without_pixels = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", text)
    assert "://" not in without_pixels and "@import" not in text and "url(http" not in text
    assert str(experiment.parent) not in text
    inside = {link[1:] for link in page.links}
    assert inside <= set(page.ids), "a link of the navigation leads nowhere"


def test_the_page_says_what_a_reader_must_know(experiment):
    page = Page((experiment / "report" / "index.html").read_text())
    text = " ".join(" ".join(page.text).split())
    for said in (
        "a<b", "boom <x>", "Not all runs are finished", "numbers of different sections are not",
        "mamba_unet found nothing for 2 of 42 structures",
        "Only one seed was trained for mamba_unet", "The worst patient",
        "seed-to-seed variation is unknown", "SGD (momentum=0.9)", "torch 2.13.0",
    ):  # fmt: skip
        assert said in text
    assert "prefers-color-scheme: dark" in (experiment / "report" / "index.html").read_text()


def test_table_csv_holds_the_runs_own_numbers(experiment):
    runs = [read_run(path) for path in sorted(experiment.glob("unet-*"))]
    dice = [run.summary["foreground"]["dice"]["mean"] for run in runs]
    (got,) = [
        row
        for row in rows(experiment, "table.csv")
        if (row["network"], row["class"], row["metric"]) == ("unet", "foreground", "dice")
        and (row["phase"], row["group"], row["average"]) == ("all", "all", "cases")
    ]
    assert float(got["mean"]) == pytest.approx(fmean(dice))
    assert float(got["sd_over_seeds"]) == pytest.approx(stdev(dice))
    (phase,) = [
        row
        for row in rows(experiment, "table.csv")
        if (row["network"], row["class"], row["metric"]) == ("unet", "LV", "hd95_mm")
        and (row["phase"], row["group"], row["average"]) == ("ES", "all", "cases")
    ]
    means = [run.summary["by_phase"]["ES"]["classes"]["LV"]["hd95_mm"]["mean"] for run in runs]
    assert float(phase["mean"]) == pytest.approx(fmean(means))
    text = (experiment / "report" / "table.md").read_text()
    assert f"| unet | 2 | {fmean(dice):.3f} ± {stdev(dice):.3f} |" in text
    tex = (experiment / "report" / "table.tex").read_text()
    assert f"unet & 2 & {fmean(dice):.3f} $\\pm$ {stdev(dice):.3f} &" in tex


def test_paired_csv_is_a_test_over_patients_with_seeds_averaged_first(experiment):
    def per_patient(name):
        runs = [read_run(path) for path in sorted(experiment.glob(f"{name}-*"))]
        return [
            fmean(
                fmean(r["dice"] for r in run.rows if r["patient"] == patient and r["class"])
                for run in runs
            )
            for patient in sorted({r["patient"] for r in runs[0].rows})
        ]

    differences = np.subtract(per_patient("unet"), per_patient("mamba_unet"))
    (got,) = [row for row in rows(experiment, "paired.csv") if row["metric"] == "dice"]
    assert (got["first"], got["second"], got["patients"]) == ("unet", "mamba_unet", "7")
    assert float(got["difference"]) == pytest.approx(differences.mean())
    assert float(got["p"]) == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert float(got["low"]) < differences.mean() < float(got["high"])


def test_holm_counts_all_pairs_of_the_table(tmp_path):
    for name, error in (("unet", 0.1), ("swin_unet", 0.9), ("mamba_unet", 0.6)):
        write_run(tmp_path, name, error=error, patients=range(1, 7), size=16)
    (comparison,), _, _ = collect(tmp_path)
    found = pairs(comparison, comparison.metrics[0])
    smallest = min(found, key=lambda pair: pair.p)
    assert len(found) == 3 and smallest.p_holm == pytest.approx(min(1, 3 * smallest.p))
    # six patients are enough for one pair, not for three
    assert {pair.p_least for pair in found} == {3 / 32}
    assert all("too few patients (6)" in verdict(pair) for pair in found)


def test_clinical_numbers_are_averaged_over_seeds(experiment):
    comparison = next(c for c in collect(experiment)[0] if len(c.entries) == 2)
    biases = []
    for path in sorted(experiment.glob("unet-*")):
        own = [i for i in indices(read_run(path).rows) if i.name == "LV EF"]
        biases.append(agreement([(i.prediction, i.reference) for i in own]).bias)
    grid = clinical_grid(comparison)
    (row,) = [row for row in grid.rows if row[:2] == ["LV EF (%)", "unet"]]
    assert row[3] == f"{signed(fmean(biases), 1)} ± {stdev(biases):.1f}"
    (missed,) = [row for row in grid.rows if row[:2] == ["RV EF (%)", "mamba_unet"]]
    assert missed[2] == "6" and missed[-1] == "1"  # of an empty ventricle there is none


def test_a_seed_without_any_value_is_counted_rather_than_left_out(tmp_path):
    """A network may learn nothing of a class from one seed, and another network from none."""
    nothing = [(patient, 1) for patient in range(1, 7)]
    for seed, misses in ((1, nothing), (2, ())):
        write_run(tmp_path, "unet", seed=seed, patients=range(1, 7), size=16, misses=misses)
        write_run(tmp_path, "mamba_unet", seed=seed, patients=range(1, 7), size=16,
                  misses=[(p, c) for p in range(1, 7) for c in (1, 2, 3)])  # fmt: skip
    (comparison,), _, _ = collect(tmp_path)
    cells = {tuple(row[:2]): row[2:] for row in clinical_grid(comparison).rows}
    half, none = cells["RV EF (%)", "unet"], cells["RV EF (%)", "mamba_unet"]
    assert half[0] == "6" and half[1].endswith("(1 of 2 seeds)") and half[-1] == "6"
    assert none[:3] == ["0", "– (0 of 2 seeds)", "–"] and none[-1] == "12"
    dice, distance = section_of(comparison).grids[1:3]
    assert len(dice.rows) == 1 and not distance.rows
    assert any("unet − mamba_unet" in note for note in distance.notes)
    assert _styled(lambda: _agreements(comparison.entries, "EF")) is not None
    markdown = distance.markdown()
    assert "|" not in markdown and "unet − mamba_unet" in markdown
    assert "<table" not in page("name", [], [distance], [], []).partition('id="runs"')[0]


def test_a_figure_of_an_index_shows_the_numbers_of_its_table(experiment):
    """Means over seeds: one correlation of all seeds' points together is another number."""
    comparison = next(c for c in collect(experiment)[0] if len(c.entries) == 2)
    table = [row for row in clinical_grid(comparison).rows if row[0].endswith(" EF (%)")]
    figure = _styled(lambda: _agreements(comparison.entries, "EF"))
    titles = [axis.get_title(loc="left") for axis in figure.axes]  # LV, RV of each network
    shown = [titles[k : k + 2] for k in range(0, len(titles), 2)]
    expected = [
        [f"{row[0]}, r = {row[6].split(' ')[0]}", f"bias {row[3].split(' ')[0]}"]
        for network in ("unet", "mamba_unet")
        for row in table
        if row[1] == network
    ]
    assert shown == expected
    names = list(dict.fromkeys(row[0].split(" ")[1] for row in clinical_grid(comparison).rows))
    assert names == ["EF", "EDV", "ESV", "SV", "mass"]  # the figures come in this order


def test_a_figure_of_an_index_shows_long_names_whole(experiment):
    comparison = next(c for c in collect(experiment)[0] if len(c.entries) == 2)
    entries = [
        replace(entry, label=f"{entry.label} · steps=13640 val_every=682 model.embed_dim=24")
        for entry in comparison.entries
    ]
    figure = _styled(lambda: _agreements(entries, "EF"))
    _styled(figure.draw_without_rendering)
    boxes = [axis.yaxis.label.get_window_extent() for axis in figure.axes[:: len(figure.axes) // 2]]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert boxes[0].y0 > boxes[1].y1  # one above the other


def test_published_numbers_stand_beside_acdc_only(tmp_path):
    def quoted(title, split="ssl4mis"):
        folder = tmp_path / title / split
        about = {"name": split, "hash": "b", "note": ""}
        write_run(folder, patients=(1,), size=16, title=title, split=about)
        grids = section_of(collect(folder)[0][0]).grids
        return ["Mamba-UNet (quoted)" in [row[0] for row in grid.rows] for grid in grids]

    assert sum(quoted("ACDC")) == 1
    assert not any(quoted("ACDC", "random-seed0"))  # other test patients than the paper's
    assert not any(quoted("synthetic phantom, not ACDC"))


def test_a_page_to_publish_has_no_image_of_a_patient(tmp_path, no_figures):
    write_run(tmp_path, patients=(1, 2), size=16)
    page = write_report(tmp_path)
    assert "data:image/png;base64" in page.read_text()
    assert list(page.parent.glob("figures/*overlay*"))
    old = page.parent / "figures" / "9-curves.png"  # of a comparison that is no more
    own = old.with_name("my-curves.png")  # that somebody put there
    for path in (old, own):
        path.write_bytes(b"")
    text = write_report(tmp_path, images=False).read_text()
    assert not old.exists() and own.exists()
    assert "data:image/png;base64" not in text and "pictures of patients are left out" in text
    assert not list(page.parent.glob("figures/*overlay*")), "the earlier report's are still there"


def test_costs_may_be_absent(tmp_path):
    write_run(tmp_path, patients=(1,), size=16)
    write_run(tmp_path, "swin_unet", patients=(1,), size=16, record={"cost": None})
    grid = cost_grid(collect(tmp_path)[0][0])
    assert grid.rows[0][1:9] == [
        "1,000,004", "2.00", "0.50", "4.50", "1 × 32 × 32", "–", "0.50", "1024",
    ]  # fmt: skip
    assert grid.rows[1][2:9] == ["–"] * 7


def test_runs_without_curves_overlays_or_spacing_get_a_report_all_the_same(tmp_path):
    path = write_run(tmp_path, patients=(1, 2), size=16, spacing=None)
    (path / "overlays.npz").unlink()
    (path / "metrics.csv").unlink()
    text = write_report(tmp_path).read_text()
    figures = {picture.stem for picture in (tmp_path / "report" / "figures").iterdir()}
    assert figures == {"dice-histogram", "dice-classes", "agreement-ef"}
    assert "LV EF (%)" in text and "LV EDV (ml)" not in text
    assert not (tmp_path / "report" / "paired.csv").exists()


class VolumeError(Metric):
    """A metric that the package does not have."""

    def __init__(self):
        super().__init__("volume_error", "volume error", unit="", higher_is_better=False,
                         decimals=1, empty="measured")  # fmt: skip

    def measure(self, prediction, reference, spacing):
        return 100 * abs(int(prediction.sum()) - int(reference.sum())) / int(reference.sum())


def test_a_metric_from_outside_is_in_every_table_without_being_imported(tmp_path, no_figures):
    for name, error in (("unet", 0.2), ("mamba_unet", 0.9)):
        path = write_run(tmp_path, name, error=error, patients=range(1, 8), size=16,
                         more=[VolumeError()])  # fmt: skip
    report = write_report(tmp_path).parent
    run = read_run(path)
    table = run_grid(run.summary, "a run", run.config["data"]["class_names"])
    mean = run.summary["foreground"]["volume_error"]["mean"]
    assert table.rows[-2][table.header.index("volume error")] == f"{mean:.1f}"
    text = (report / "table.md").read_text()
    headers = [line for line in text.splitlines() if line.startswith("| network |")]
    assert sum("volume error" in header for header in headers) == 4  # all, classes, phases, groups
    assert "Paired comparison of volume error" in text
    (got,) = [
        row
        for row in rows(tmp_path, "table.csv")
        if row["network"] == "mamba_unet"
        and (row["metric"], row["class"]) == ("volume_error", "foreground")
        and (row["phase"], row["group"], row["average"]) == ("all", "all", "cases")
    ]
    assert float(got["mean"]) == pytest.approx(mean)
    (pair,) = [row for row in rows(tmp_path, "paired.csv") if row["metric"] == "volume_error"]
    assert float(pair["difference"]) < 0 and int(pair["wins"]) > int(pair["losses"])


def test_latex_and_markdown_escape_what_they_must():
    grid = Grid("a_b", ["x|y", "50 %"], [["p & q", "±"]], ["#1."])
    assert "| x/y | 50 % |" in grid.markdown()
    assert r"p \& q & $\pm$ \\" in grid.latex() and r"50 \%" in grid.latex()
    assert r"\caption{a\_b. \#1.}" in grid.latex()


def test_the_histogram_of_a_perfect_network_shows_its_cases(tmp_path):
    write_run(tmp_path, patients=(1, 2), size=16, error=0)
    (axis,) = _styled(lambda: _histograms(collect(tmp_path)[0][0].entries)).axes
    widths = [bar.get_width() for bar in axis.patches if bar.get_height()]
    assert sum(bar.get_height() for bar in axis.patches) == 4 and min(widths) > 0.001


def test_small_numbers_keep_no_sign():
    assert [signed(x, 2) for x in (-0.001, 0.0, 0.014, -1.5)] == ["0.00", "0.00", "+0.01", "−1.50"]


def test_a_mosaic_centres_cells_and_leaves_gaps_dark():
    low, high = np.zeros((2, 2, 3)), np.zeros((4, 2, 3))
    canvas, cell = mosaic([[low, None], [high, low]])
    assert canvas.shape == (12, 8, 3) and cell == (6, 4)
    assert (canvas[:6, :4] == 0).sum() == 12
    dark = canvas[0, 0, 0]
    assert 0 < dark < 0.2 and (canvas[:6, 4:] == dark).all()


def test_more_networks_than_colours_are_told_apart():
    assert len({(_colour(i), _again(i, LINES)) for i in range(35)}) == 35
    assert len({(_colour(i), _again(i, HATCHES)) for i in range(35)}) == 35


@pytest.mark.parametrize(("rows", "tall"), [(30, False), (31, True)])
def test_a_long_table_scrolls_on_its_own(rows, tall):
    grid = Grid("pairs", ["pair"], [["a − b"]] * rows)
    assert ('class="scroll tall"' in page("name", [], [grid], [], [])) == tall
