"""The page for trying a network out: its numbers, its words, and the page in a browser."""

import base64
import http.client
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from chromium import EXECUTABLE, chromium
from mambaseg.app.ensemble import restore_predictor
from mambaseg.data.formats.images import find_images
from mambaseg.data.phantoms.phantom import write_phantom
from mambaseg.errors import UserError
from mambaseg.inference.demo import page, parts
from mambaseg.inference.demo.study import Volume, heart_indices, phases, segment_file, volumes_of
from mambaseg.inference.found import find_run
from mambaseg.storage.run_folder import RunFolder
from tiny_checkpoints import CLASSES, write_checkpoint

SOURCE = Path(__file__).resolve().parents[2] / "src"
without_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs Gradio: pip install 'mambaseg[demo]'"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "tiny.ckpt")


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return restore_predictor([checkpoint], device="cpu")


def write_nifti(path, shape=(21, 18, 3), zooms=(2.0, 2.5, 8.0)):
    voxels = np.random.default_rng(len(shape)).integers(0, 900, shape).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, np.diag([*zooms, 1.0]))
    image.header.set_xyzt_units("unknown" if zooms == (1.0, 1.0, 1.0) else "mm")
    nibabel.save(image, path)
    return path


def downloads(html):
    """Name -> content of the links that hold a file."""
    links = re.findall(r'download="([^"]+)" href="data:[a-z/]+;base64,([^"]+)"', html)
    return {name: base64.b64decode(content) for name, content in links}


def volume(*counts, shape=(2, 20, 20), spacing=(10.0, 2.0, 2.0)):
    """A volume with so many voxels of the classes 1, 2, ..."""
    labels = np.zeros(shape, np.uint8)
    labels.ravel()[: sum(counts)] = np.repeat(np.arange(1, len(counts) + 1), counts)
    return Volume("", np.zeros(shape), labels, spacing)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan.nii.gz", "cine.nii.gz", "slice.png"])
def test_the_label_map_is_the_file_that_predict_writes(predictor, tmp_path, name):
    path = tmp_path / name
    if name == "slice.png":
        Pillow.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(path)
    else:
        write_nifti(path, (21, 18, 3) if name == "scan.nii.gz" else (21, 18, 3, 2))
    predictor.predict(find_images(str(path), outside=tmp_path / "out"), tmp_path / "out")
    ((given, content),) = downloads(parts.facts(segment_file(predictor, path))).items()
    assert content == (tmp_path / "out" / name).read_bytes()
    assert given == name.replace(".", "_labels.", 1)


def test_the_heart_in_numbers_that_one_can_count():
    # 10 x 2 x 2 mm: 25 voxels are a millilitre
    found = heart_indices(volume(100, 200, 250), volume(50, 210, 100), CLASSES)
    assert {(name, round(value, 9), unit) for name, value, unit in found} == {
        ("LV EDV", 10.0, "ml"), ("LV ESV", 4.0, "ml"), ("LV SV", 6.0, "ml"), ("LV EF", 60.0, "%"),
        ("RV EDV", 4.0, "ml"), ("RV ESV", 2.0, "ml"), ("RV SV", 2.0, "ml"), ("RV EF", 50.0, "%"),
        ("LV mass", 8.4, "g"),
    }  # fmt: skip
    assert heart_indices(volume(0, 0, 0), volume(0, 0, 9), CLASSES)[3] == ("LV EF", None, "%")


def test_without_voxel_size_the_ejection_fraction_alone_is_said():
    ed, es = (volume(0, 0, n, spacing=None) for n in (200, 50))
    assert [index for index in heart_indices(ed, es, CLASSES) if index[1] is not None] == [
        ("LV EF", 75.0, "%")
    ]
    other = volume(0, 0, 9, shape=(1, 20, 20), spacing=None)
    with pytest.raises(UserError, match="differ in shape"):
        heart_indices(ed, other, CLASSES)
    assert "voxel size is unknown" in parts.sizes(ed, CLASSES) and ">200<" in parts.sizes(
        ed, CLASSES
    )
    assert "<td>8.0</td>" in parts.sizes(volume(0, 0, 200), CLASSES)


def test_classes_without_a_ventricle_are_said():
    with pytest.raises(UserError, match=r"\(liver\) have no LV"):
        heart_indices(volume(9), volume(3), ["background", "liver"])


def test_a_cine_s_phases_are_those_of_the_largest_and_the_smallest_ventricle():
    cine = [volume(0, 0, n) for n in (90, 120, 30, 60)]
    assert phases(cine, CLASSES) == (1, 2)
    assert phases(cine[:2], CLASSES) == (0, 1)  # two files are as they are named
    assert phases(cine, ["background", "liver"]) == (0, 3)


def test_two_files_are_two_volumes(predictor, tmp_path):
    ed, es = (segment_file(predictor, write_nifti(tmp_path / f"{n}.nii")) for n in "ab")
    assert [each.caption for each in volumes_of(ed, es)] == ["end-diastole", "end-systole"]
    cine = segment_file(predictor, write_nifti(tmp_path / "c.nii", (21, 18, 3, 2)))
    assert [each.caption for each in volumes_of(cine)] == ["frame 1 of 2", "frame 2 of 2"]
    with pytest.raises(UserError, match="two frames of one cine"):
        volumes_of(cine, es)


# ---- words ---------------------------------------------------------------------------------------


def test_the_page_says_what_it_is(predictor):
    text = parts.head(predictor)
    for words in ("unet", "synthetic phantom, not ACDC", "RV, MYO, LV", "Not a medical device"):
        assert words in text


def test_names_are_text(predictor, tmp_path):
    path = write_nifti(tmp_path / '<img src=x onerror="alert(1)">.nii')
    html = parts.facts(segment_file(predictor, path))
    assert "<img" not in html and "&lt;img src=x onerror=&#34;" in html


def test_what_is_no_image_is_said_without_its_place(predictor, tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "cut.nii").write_bytes(write_nifti(tmp_path / "a.nii").read_bytes()[:700])
    for name, words in (("note.txt", "none of the endings"), ("cut.nii", "header promises")):
        with pytest.raises(UserError, match=words) as error:
            segment_file(predictor, tmp_path / name)
        assert name in str(error.value) and str(tmp_path) not in str(error.value)


def test_the_newest_finished_run_is_taken(tmp_path):
    with pytest.raises(UserError, match="holds no finished run: give run="):
        find_run("newest", tmp_path)
    times = {"b": "2026-01-03", "c": "2026-01-02", "a.previous": "2026-01-05", "d": "2026-01-06"}
    for name, time_ in times.items():
        folder = RunFolder(tmp_path / "hearts" / name)
        folder.start(ended=time_)
        (folder.path / "checkpoints" / "best.ckpt").touch()
        folder.update(status="running" if name == "d" else "done", ended=time_)
    assert find_run("newest", tmp_path).name == "b"


def test_without_the_package_the_message_names_the_extra(predictor, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'mambaseg\[demo\]'"), page.serve(predictor):
        pass


# ---- the page ------------------------------------------------------------------------------------


class Updates:
    """Stands for Gradio where only the values count."""

    def skip(self):
        return "as it was"

    def update(self, **values):
        return values


def test_an_upload_leaves_no_copy_and_an_error_leaves_the_page_as_it_was(predictor, tmp_path):
    folder = tmp_path / "uploads"
    for part in ("one", "two"):
        (folder / part).mkdir(parents=True)
    handlers = page._Handlers(Updates(), predictor, folder)
    bring = handlers.bring("first")
    before = page._Study()
    path = write_nifti(folder / "one" / "a.nii")
    _, study, problem, *shown = bring(str(path), before)
    assert not problem and study.first.name == "a.nii" and not path.parent.exists()
    assert "slice 2 of 3" in handlers.look(study, 1, 2)[1]
    (folder / "two" / "b.nii").write_bytes(b"nothing")
    _, after, problem, *kept = bring(str(folder / "two" / "b.nii"), study)
    assert after is study and "b.nii" in problem and not (folder / "two").exists()
    assert set(kept) == {"as it was"} and len(kept) == len(shown)
    outside = write_nifti(tmp_path / "private.nii")
    assert "must come through the page" in bring(str(outside), study)[2] and outside.exists()


def test_two_patients_have_no_ejection_fraction_and_one_file_is_the_first(predictor, tmp_path):
    handlers = page._Handlers(Updates(), predictor, tmp_path)

    def bring(place, name, study, shape=(21, 18, 3)):
        (tmp_path / name).mkdir()
        path = write_nifti(tmp_path / name / f"{name}.nii", shape)
        return handlers.bring(place)(str(path), study)[1:3]

    study, _ = bring("first", "ed", page._Study())
    study, _ = bring("second", "es", study)
    assert (study.first.name, study.second.name) == ("ed.nii", "es.nii")
    study, problem = bring("first", "other", study)
    assert study.first.name == "other.nii" and study.second is None and not problem
    study, problem = bring("second", "cine", page._Study(), (21, 18, 3, 2))
    assert study.first.name == "cine.nii" and study.second is None and not problem
    assert handlers._shown(study)[5]["visible"]  # frames are chosen


def test_the_same_file_may_be_brought_again_while_it_waits(predictor, tmp_path):
    handlers = page._Handlers(Updates(), predictor, tmp_path)
    uploads, study = tmp_path / "digest", page._Study()
    taken = []
    for _ in page._Study._fields:
        uploads.mkdir(exist_ok=True)  # Gradio's, named by the content
        taken.append(handlers.take(str(write_nifti(uploads / "a.nii"))))
    for place, path in zip(page._Study._fields, taken, strict=True):
        _, study, problem, *_ = handlers.bring(place)(path, study)
        assert not problem and getattr(study, place).name == "a.nii"
    assert not list(tmp_path.rglob("*.nii"))
    outside = write_nifti(tmp_path.parent / "private.nii")
    assert handlers.take(str(outside)) == str(outside) and outside.exists()


def test_a_picture_is_shown_in_its_colours(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "colours.ckpt", channels=3)
    orange = np.full((20, 30, 3), (250, 120, 10), np.uint8)
    orange[:10] = 0
    Pillow.fromarray(orange).save(tmp_path / "a.png")
    predictor = restore_predictor([checkpoint], device="cpu")
    (shown,) = volumes_of(segment_file(predictor, tmp_path / "a.png"))
    html = parts.pictures(shown, 0)
    content = re.search(r"data:image/png;base64,([^\"]+)", html)[1]
    drawn = np.asarray(Pillow.open(io.BytesIO(base64.b64decode(content))))
    assert np.array_equal(drawn, orange) and 'style="--ratio:1.5000"' in html


def test_the_example_is_a_synthetic_heart_that_leaves_nothing(predictor, tmp_path):
    _, study, problem, *shown = page._Handlers(Updates(), predictor, tmp_path).example()
    assert not problem and study.second is None
    assert study.first.name == "synthetic_heart.nii.gz" and len(study.first.labels) > 2
    assert any("synthetic_heart.nii.gz" in str(part) for part in shown)
    assert not list(tmp_path.iterdir())


def test_a_defect_of_ours_is_said_without_a_stack_trace(predictor, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(page, "segment_file", broken)
    (tmp_path / "one").mkdir()
    path = write_nifti(tmp_path / "one" / "a.nii")
    problem = page._Handlers(Updates(), predictor, tmp_path).bring("first")(
        str(path), page._Study()
    )[2]
    assert "cannot be segmented" in problem and "secret" not in problem


@without_gradio
def test_a_page_is_served_under_the_limit_that_the_command_passes(predictor):
    with page.serve(predictor, max_mib=4.0) as address:  # numbers of a command are no whole ones
        assert status_under("localhost", int(address.rstrip("/").rsplit(":", 1)[1])) == 200
    assert "up to 4\nMiB" in parts.part("image_drop", 4.0)


@pytest.fixture
def served(checkpoint, tmp_path):
    """Address of a page in a process of its own, and its folder of temporary files."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, SOURCE / "demo.py", f"run={checkpoint}", "device=cpu", "max_mib=4"],
            stdout=log, stderr=log, cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        end = time.monotonic() + 90
        while not (found := re.search(r"http://\S+", text := (tmp_path / "log").read_text())):
            assert process.poll() is None and time.monotonic() < end, text
            time.sleep(0.1)
        yield found[0], temporary
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
    assert not list(temporary.glob("mambaseg-demo-*")), "something is left"


def status_under(name, port):
    """The status of the page's answer to who calls its machine by that name."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", "/", headers={"Host": f"{name}:{port}"})
        return connection.getresponse().status


def listening_at(port):
    """Local addresses, as the kernel writes them, on which something waits at a port."""
    lines = Path("/proc/net/tcp").read_text().splitlines() + (
        Path("/proc/net/tcp6").read_text().splitlines()
    )
    rows = [line.split() for line in lines]
    return {row[1].split(":")[0] for row in rows if row[1].endswith(f":{port:04X}")
            and row[3] == "0A"}  # fmt: skip


@without_gradio
@pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium")
def test_a_cine_in_the_browser(served, predictor, tmp_path):
    address, temporary = served
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    assert address.startswith("http://127.0.0.1:") and listening_at(port) == {"0100007F"}
    assert [status_under(name, port) for name in ("localhost", "rebound.example")] == [200, 400]
    cine = next(write_phantom(tmp_path / "data", patients=1, seed=0).rglob("*_4d.nii.gz"))
    frames = len(segment_file(predictor, cine).labels)
    with chromium(tmp_path / "profile") as browser:
        browser.size(1280, 900)
        browser.call("Page.navigate", url=address)
        browser.wait_for_text("synthetic phantom, not ACDC")
        browser.click("#example")
        browser.wait_for_text("synthetic_heart.nii.gz")
        browser.upload("#first input[type=file]", cine)
        browser.wait_for_text(cine.name)
        for words in ("LV EF", "LV EDV", "Frames proposed", f"of {frames}", cine.name):
            browser.wait_for_text(words)
        mine = f'a.download[download^="{cine.name.removesuffix(".nii.gz")}"]'
        link = browser.wait_for(f"document.querySelector('{mine}')?.href")
        assert base64.b64decode(link.split(",")[1]) == segment_file(predictor, cine).label_map
        # moved until it moves: the answer to the upload may still set the slider it has drawn
        move = """(s => {
            if (s) { s.value = 3; s.dispatchEvent(new Event('input', {bubbles: true})); }
            return document.querySelector('.pictures img')?.alt.endsWith('slice 3 of %d');
        })(document.querySelector('#slice input[type=range]'))"""
        browser.wait_for(move % segment_file(predictor, cine).labels.shape[1])
        assert not list(temporary.rglob("*.nii*")), "a copy of the upload is left"
        for width, height in ((1280, 900), (1280, 300), (390, 800)):
            browser.size(width, height)
            measure = """(i => i && (r => [r.width / r.height, r.height / innerHeight,
                i.naturalWidth / i.naturalHeight])(i.getBoundingClientRect()))
                (document.querySelector('.pictures img'))"""
            shown, part, stored = browser.evaluate(measure)
            assert shown == pytest.approx(stored, rel=0.02) and part <= 0.71  # square pixels
        browser.size(1280, 900)
        lead = browser.evaluate("getComputedStyle(document.querySelector('.lead')).color")
        assert max(map(int, re.findall(r"\d+", lead)[:3])) < 0x70, "too faint on white"

        with (tmp_path / "large.nii").open("wb") as file:
            file.truncate(5_000_000)
        browser.upload("#first input[type=file]", tmp_path / "large.nii")
        browser.wait_for_text("maximum allowed size of 4")
        (tmp_path / "damaged.nii.gz").write_bytes(cine.read_bytes()[:2000])
        browser.upload("#first input[type=file]", tmp_path / "damaged.nii.gz")
        browser.wait_for_text("damaged.nii.gz: truncated or damaged")
        browser.wait_for("document.querySelector('[role=alert]') !== null")
        assert "Traceback" not in browser.text() and "LV EF" in browser.text()
        browser.size(390, 800)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not browser.problems
    hosts = {url.split("/")[2] for url in browser.requests if url.startswith(("http", "ws"))}
    assert hosts == {f"127.0.0.1:{port}"}
