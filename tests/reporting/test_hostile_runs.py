"""Run folders of others: what they say is text, and one that lies does not end the report."""

import csv
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from fake_runs import write_run

from mambaseg.errors import UserError
from mambaseg.reporting.collect import collect
from mambaseg.reporting.curves import read_curves
from mambaseg.reporting.grid import Grid, cell_text, markdown_text
from mambaseg.reporting.overlays import _load, overlay_pictures
from mambaseg.reporting.reading import read_run
from mambaseg.reporting.report import write_report
from mambaseg.reporting.status import states, status_table
from mambaseg.reporting.wandb_report import describe, find_runs
from mambaseg.storage.run_folder import RunFolder
from payload import armed, claiming_npy, npz, object_npy

SCRIPT = "<script>document.title='ran'</script>"
NASTY = [
    SCRIPT, "\"onmouseover=\"document.title='ran'", "</script></style>",
    "<img src=x onerror=alert(1)>", "&lt;b&gt;", "a|b", "$\\foo{x}$ 50 % #1 ~^_&",
    "[x](javascript:alert(1))", "=cmd|' /C calc'!A0",
    "\x1b]0;title\x07", "\u202egnp.exe", "'", "`", "[red]x[/]", "\\<b>",
]  # fmt: skip


DICE = {"name": "dice", "title": "Dice", "unit": "", "higher_is_better": True, "decimals": 3}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One finished run, to be copied and spoiled."""
    return write_run(tmp_path_factory.mktemp("outputs") / "good", patients=(1, 2), size=16)


@pytest.fixture
def spoiled(small, tmp_path):
    """(file, content) -> an experiment with a good run and one with another file."""

    def spoil(name, content):
        for run in ("bad", "good"):
            shutil.copytree(small, tmp_path / "exp" / run)
        record = RunFolder(tmp_path / "exp" / "good").record  # of two equal ones, the later counts
        RunFolder(tmp_path / "exp" / "good").update(ended="2999" + record["ended"][4:])
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "exp" / "bad" / name).write_bytes(data)
        return tmp_path / "exp"

    return spoil


# ---- files that would run something, or never end ------------------------------------------------

MERGES = "\n".join(
    ["l0: &l0 {k: v}", *(f"l{i}: &l{i} {{<<: [*l{i - 1}, *l{i - 1}]}}" for i in range(1, 40))]
)


@pytest.mark.parametrize(
    "config",
    ["!!python/object/apply:os.system ['touch {}']",
     "model: !!python/object/new:os.system ['touch {}']", MERGES, "[" * 10_000, "model: [", "42"],
)  # fmt: skip
def test_a_config_that_asks_for_objects_is_left_out_and_runs_nothing(spoiled, tmp_path, config):
    marker = armed(tmp_path / "ran").marker
    folder = spoiled("config.yaml", config.replace("{}", str(marker)))
    comparisons, _, problems = collect(folder)
    assert [run.path.name for run in comparisons[0].entries[0].runs] == ["good"]
    (problem,) = problems
    assert "bad/config.yaml cannot be read" in problem and "leave it out" in problem
    assert not marker.exists()


def test_targets_and_interpolations_of_a_config_are_text(
    spoiled, small, tmp_path, monkeypatch, no_figures
):
    monkeypatch.setenv("SOME_SECRET", "hush-4711")
    marker = armed(tmp_path / "ran").marker
    config = yaml.safe_load((small / "config.yaml").read_text())
    config["model"]["_target_"] = "os.system"
    config["model"]["_args_"] = [f"touch {marker}"]
    config["optim"]["optimizer"]["lr"] = "${oc.env:SOME_SECRET}"
    config["logger"] = {"wandb": {"project": "${oc.env:SOME_SECRET}", "group": "../x"}}
    folder = spoiled("config.yaml", yaml.safe_dump(config))
    write_report(folder)
    (folder / "bad" / "wandb").mkdir()
    description = describe(folder, find_runs(folder))
    assert description["project"] == "mambaseg" and description["group"] == "exp"
    assert not marker.exists()
    for file in (folder / "report").rglob("*"):
        assert not file.is_file() or b"hush-4711" not in file.read_bytes(), file
    assert "${oc.env:SOME_SECRET}" in (folder / "report" / "table.md").read_text()


def overlays(payload):
    yield npz({"patient001_ED/image": object_npy(payload)})
    yield __import__("pickle").dumps(payload)
    yield npz({"patient001_ED/image": claiming_npy((3, 1 << 20, 1 << 20))})
    yield npz({"patient001_ED/image": claiming_npy((1 << 28,), bytes(1 << 28))})
    yield npz({"patient001_ED/image": claiming_npy((2, 2, 4))})
    yield npz({"patient001_ED/image": claiming_npy((2, 2, 5000), bytes(20_000))})
    yield b"PK"


def test_hostile_overlays_are_left_out_and_run_nothing(spoiled, tmp_path, caplog):
    payload = armed(tmp_path / "ran")
    folder = spoiled("overlays.npz", "")
    run = read_run(folder / "bad")
    for content in overlays(payload):
        (run.path / "overlays.npz").write_bytes(content)
        caplog.clear()
        assert _load(run, ["patient001_ED", "patient002_ED"]) == {}
        assert "overlays.npz" in caplog.text and not payload.marker.exists()


def test_what_is_no_curve_has_no_points(spoiled):
    folder = spoiled("metrics.csv", "step,train/loss\n1,x\nnan,2\n3,inf\n4,0.5\n5,")
    assert read_curves(read_run(folder / "bad"))["train/loss"] == [(5.0, 0.5)]
    for content in (b"\xff\xff", b"step,a\n1\n"):
        (folder / "bad" / "metrics.csv").write_bytes(content)
        assert not any(read_curves(read_run(folder / "bad")).values())


def test_a_report_is_written_without_pictures_and_curves_that_lie(spoiled, tmp_path):
    payload = armed(tmp_path / "ran")
    folder = spoiled("overlays.npz", object_npy(payload))
    shutil.rmtree(folder / "good")
    (folder / "bad" / "metrics.csv").write_bytes(b"\xff")
    page = write_report(folder).read_text()
    assert "The worst patient" not in page and "Dice per class" in page
    assert not payload.marker.exists()


def test_overlays_of_another_size_are_left_out(tmp_path, caplog):
    for optim in ("sgd", "adamw"):
        write_run(tmp_path / "exp", optim=optim, patients=(1,), size=16)
    path = next((tmp_path / "exp").glob("unet-sgd*")) / "overlays.npz"
    with np.load(path) as file:
        arrays = {key: file[key] for key in file}
    wide = {k: a if a.ndim == 1 else np.pad(a, ((0, 0), (9, 0), (9, 0))) for k, a in arrays.items()}
    np.savez_compressed(path, **wide)
    pictures = overlay_pictures(collect(tmp_path / "exp")[0][0], tmp_path / "figures", "")
    assert pictures and "another size" in caplog.text


def record_of(**fields):
    return json.dumps({"status": "done", **fields})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", record_of(cost={"macs": "x"})), ("run.json", record_of(cost=[1])),
        ("run.json", record_of(hardware={"gpus": "x" * 100})), ("run.json", record_of(code="x")),
        ("run.json", record_of(fit_seconds=1e300)), ("run.json", record_of(parameters=1.5)),
        ("run.json", record_of(data={"fingerprint": ["x"]})),
        ("run.json", record_of(resumed="x")),
        ("run.json", record_of(resumed=[{"hardware": "x"}])),
        ("metrics.json", "{}"), ("metrics.json", "[" * 10_000), ("metrics.json", '"x"'),
        ("metrics.json", json.dumps({"data": ["x"]})),
        ("cases.csv", ""), ("cases.csv", "case\nx\n"), ("cases.csv", b"\0\0\n"),
        ("config.yaml", "model: {name: x}\nseed: 1\ndata: {class_names: [a, a]}"),
        ("config.yaml", "model: {name: [x]}\nseed: 1\ndata: {class_names: [a, b]}"),
        ("config.yaml", "model: x\nseed: 1\ndata: {class_names: [a, b]}"),
    ],
)  # fmt: skip
def test_a_folder_that_lies_is_left_out_and_named(spoiled, name, content):
    folder = spoiled(name, content)
    comparisons, _, problems = collect(folder)
    assert [run.path.name for run in comparisons[0].entries[0].runs] == ["good"]
    assert len(problems) == 1 and f"bad/{name}" in problems[0]


@pytest.mark.parametrize(
    ("column", "cell"),
    [("dice", "nan"), ("dice", "2"), ("dice", "-1"), ("dice", "x"), ("class", "99"),
     ("class", "-1"), ("class", ""), ("class_name", "<b>"), ("voxels", "1e3"), ("voxels", "9" * 40),
     ("reference_voxels", ""), ("hd95_mm", "inf"), ("case", ""), ("patient", "")],
)  # fmt: skip
def test_cells_that_lie_are_named(spoiled, small, column, cell):
    with (small / "cases.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    rows[3][column] = cell
    column = column.removeprefix("reference_")  # they are compared with each other
    folder = spoiled("cases.csv", "")
    RunFolder(folder / "bad").write_rows("cases.csv", rows)
    with pytest.raises(UserError, match=rf"cases\.csv .*{column.removesuffix('_name')}"):
        read_run(folder / "bad")


@pytest.mark.parametrize(
    "metrics",
    [[], [{"name": "x"}], [DICE | {"decimals": 1 << 30}], [DICE | {"decimals": "2"}],
     [DICE | {"unit": 5}], [DICE | {"title": ["Dice"]}], [DICE | {"name": "other"}], "dice"],
)  # fmt: skip
def test_metrics_that_lie_are_named(spoiled, small, metrics):
    summary = {**RunFolder(small).summary, "metrics": metrics}
    folder = spoiled("metrics.json", json.dumps(summary))
    with pytest.raises(UserError, match=r"metrics\.json .*metrics"):
        read_run(folder / "bad")


def test_a_summary_of_other_scores_is_named(spoiled, small):
    """A table of scores that lost a patient, as a copy that was cut short may."""
    rows = (small / "cases.csv").read_text().splitlines(keepends=True)
    folder = spoiled("cases.csv", "".join(row for row in rows if not row.startswith("patient002")))
    with pytest.raises(UserError, match=r"cases\.csv has a mean Dice of .*, metrics\.json "):
        read_run(folder / "bad")
    comparisons, _, _ = collect(folder)
    assert [run.path.name for run in comparisons[0].entries[0].runs] == ["good"]


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.json", "cases.csv"])
@pytest.mark.timeout(30)
def test_pipes_and_links_to_secrets_show_nothing(spoiled, tmp_path, name):
    folder = spoiled("train.log", "")
    secret = tmp_path / "netrc"
    secret.write_text("machine api.example\n  login user\n  password: hush-4711, [\n")
    (folder / "bad" / name).unlink()
    (folder / "bad" / name).symlink_to(secret)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / name)
    problems = collect(folder)[2]
    assert all("hush-4711" not in said and "example" not in said for said in problems)
    assert all("hush-4711" not in str(run) for run in states(folder))


@pytest.mark.parametrize(
    "content",
    ["[]", '{"overrides": 1, "run": null, "error": null}', "[" * 10_000,
     '{"overrides": [["x"]], "run": ["x"], "error": {"a": 1}}', '{"run": "x"}'],
)  # fmt: skip
def test_a_sweeps_list_that_lies_hides_no_run(spoiled, content):
    folder = spoiled("train.log", "")
    (folder / ".jobs").mkdir()
    (folder / ".jobs" / "a.json").write_text(content)
    assert {"bad", "good"} <= {run.name for run in states(folder)}


@pytest.mark.parametrize("pid", [-1, 0, 1 << 40, "1", [1], None])
def test_no_process_is_asked_about_a_foreign_number(spoiled, pid, monkeypatch):
    """os.kill takes -1 for all processes, 0 for the own group; signal 0 harms none of them."""
    folder = spoiled("train.log", "")
    RunFolder(folder / "bad").update(status="running", pid=pid, code="x", steps=["x"])
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("asked"))
    assert {run.name for run in states(folder)} == {"bad", "good"}


# ---- text of a folder in the page, the tables, the terminal --------------------------------------


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A report of folders whose every text is markup of some kind, and its classes' names."""
    folder = tmp_path_factory.mktemp("outputs") / "exp <script>x"
    path = write_run(folder, "unet", patients=range(1, 4), size=16)
    rename(path, folder / "a<script>", NASTY[:4])
    path = write_run(folder, "unet", optim="adamw", patients=range(1, 4), size=16)
    rename(path, folder / "b", NASTY[:4], model=NASTY[6] + NASTY[8] + NASTY[7])
    for number, text in enumerate(NASTY):
        (folder / f"failed{number}").mkdir()
        record = {"status": "failed", "error": text, "code": {"commit": text}}
        (folder / f"failed{number}" / "run.json").write_text(json.dumps(record))
    write_report(folder)
    return folder


def rename(path, to, classes, model=SCRIPT):
    """Gives a run folder other names of network, classes, patients, groups, hardware, split."""
    path.rename(to)
    run = RunFolder(to)
    names = dict(zip(("background", "RV", "MYO", "LV"), classes, strict=True))
    config = yaml.safe_load((to / "config.yaml").read_text())
    config["data"]["class_names"] = classes
    config["model"]["name"] = model
    run.write_text("config.yaml", yaml.safe_dump(config))
    with (to / "cases.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["class_name"] = names[row["class_name"]]
        row["group"] = NASTY[8]
    run.write_rows("cases.csv", rows)
    summary = run.summary
    summary["data"], summary["split"]["note"] = SCRIPT, NASTY[7] + SCRIPT
    run.write_json("metrics.json", summary)
    run.update(hardware={"cpu": SCRIPT, "gpus": []})


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.events, self.policy = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.events += [name for name, _ in attributes if name.startswith("on")]
        found = dict(attributes)
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]


def test_the_page_takes_text_as_text(nasty):
    text = (nasty / "report" / "index.html").read_text()
    page = Elements(text)
    assert page.found.count("script") == 1 and not page.events
    assert "iframe" not in page.found and all("png" in i for i in re.findall("<img[^>]*>", text))
    assert "\x1b" not in text and "\u202e" not in text
    assert "&lt;script&gt;document.title=" in text


def test_the_policy_of_the_page_allows_its_own_script_alone(nasty):
    import base64
    import hashlib

    text = (nasty / "report" / "index.html").read_text()
    policy = Elements(text).policy
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    assert text.index("Content-Security-Policy") < text.index("<title>")


def test_tables_take_text_as_text(nasty):
    markdown = (nasty / "report" / "table.md").read_text()
    assert not re.search(r"(?<!\\)<[a-zA-Z/!]", markdown) and "](java" not in markdown
    widths = [len(line.split(" | ")) for line in markdown.splitlines() if line.startswith("| ")]
    assert min(widths) > 1
    latex = (nasty / "report" / "table.tex").read_text()
    rows = latex.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert rows and all(row.endswith("\\\\") for row in rows)
    assert r"\$\textbackslash{}foo\{x\}\$ 50 \% \#1" in latex
    with (nasty / "report" / "table.csv").open(newline="") as stream:
        cells = [cell for row in csv.DictReader(stream) for cell in row.values()]
    assert not any(cell.startswith(("=", "@", "+")) for cell in cells)
    assert "'" + NASTY[8] in cells


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<b>", r"\<b>"), (r"\<b>", r"\\\<b>"), ("<0.001", "<0.001"), ("a|b", "a/b"), ("a\nb", "a b"),
     ("[x](y)", r"[x]\(y)"), ("![x](y)", r"![x]\(y)"), ("[x]: y", r"[x]\: y"), ("`", r"\`"),
     ("depths=[2,2]", "depths=[2,2]")],
)  # fmt: skip
def test_markdown_text(text, expected):
    assert markdown_text(text) == expected


def test_a_row_of_latex_does_not_begin_with_an_argument():
    latex = Grid("x", ["a", "b"], [["[2em]", "\x1b\n-"], ["[x]", "y"]]).latex()
    assert r"{[}x{]} & y \\" in latex and "\x1b" not in latex


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_spreadsheets_run_no_formula(text):
    assert cell_text(text) == "'" + text
    assert cell_text(-1.5) == -1.5 and cell_text(None) is None and cell_text("a=1") == "a=1"


def test_the_terminal_gets_no_command(nasty):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(status_table(states(nasty), title=f"{nasty} [/]"))
    text = console.export_text()
    assert "\x1b]" not in text and "\u202e" not in text and "[red]x[/]" in text
