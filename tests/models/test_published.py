"""Published weights: from a folder, or fetched; a server on the loopback address stands in."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from omegaconf import OmegaConf

from mambaseg.app import networks
from mambaseg.app.check import import_target
from mambaseg.errors import UserError
from mambaseg.models.published import LIST, fetched, published_weights
from runs import UNET, small_overrides, trained
from small_networks import small_network

CONTENT = bytes(range(256)) * 5000


class Handler(BaseHTTPRequestHandler):
    breaks_off = 0  # bytes after which the next answer breaks off
    asked = ()  # ranges
    states_length = True
    content = CONTENT

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        type(self).asked += (start,)
        if self.path != "/weights.pth":
            self.send_error(404)
            return
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if self.states_length:
            self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = self.breaks_off or len(self.content)
        type(self).breaks_off = 0
        self.wfile.write(self.content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    handler = type("Own", (Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/weights.pth", handler
        running.shutdown()
        thread.join()


def entry(url, **known):
    return {"file": "weights.pth", "what": "some weights", "license": "MIT", "url": url,
            "bytes": None, "sha256": None, **known}  # fmt: skip


def test_a_file_is_fetched_once_with_its_size_and_hash(server, tmp_path):
    url, handler = server
    known = {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    said = []
    for _ in range(2):
        path = fetched(entry(url, **known), tmp_path / "new", lambda *sizes: said.append(sizes))
        assert path == tmp_path / "new" / "weights.pth" and path.read_bytes() == CONTENT
    assert handler.asked == (0,) and said[-1] == (len(CONTENT), len(CONTENT))
    assert not list(path.parent.glob(".part*"))


def test_a_download_that_broke_off_resumes(server, tmp_path):
    url, handler = server
    handler.breaks_off = 1000
    with pytest.raises(UserError, match="cannot be fetched"):
        fetched(entry(url), tmp_path)
    assert not (tmp_path / "weights.pth").exists()
    assert fetched(entry(url), tmp_path).read_bytes() == CONTENT
    assert handler.asked[1] > 0


def test_a_whole_part_needs_no_more_bytes(server, tmp_path):
    url, _ = server
    (tmp_path / ".part-weights.pth").write_bytes(CONTENT)
    assert fetched(entry(url), tmp_path).read_bytes() == CONTENT


def test_a_part_of_something_else_is_fetched_anew(server, tmp_path):
    url, _ = server
    (tmp_path / ".part-weights.pth").write_bytes(CONTENT + b"and more")
    assert fetched(entry(url), tmp_path).read_bytes() == CONTENT


def test_where_nobody_states_a_size_only_what_opens_as_weights_is_kept(server, tmp_path):
    url, handler = server
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pth")
    handler.content = (tmp_path / "whole.pth").read_bytes()
    handler.states_length, handler.breaks_off = False, 1000
    with pytest.raises(UserError, match="does not open as weights; it may have broken off"):
        fetched(entry(url), tmp_path / "new")
    assert not list((tmp_path / "new").glob("*weights.pth"))
    assert fetched(entry(url), tmp_path / "new").read_bytes() == handler.content


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"bytes": 7}])
def test_another_file_than_the_known_one_is_refused(server, tmp_path, wrong):
    url, _ = server
    with pytest.raises(UserError, match="not the file that is known"):
        fetched(entry(url, **wrong), tmp_path)
    assert not list(tmp_path.glob("*weights.pth")) and not list(tmp_path.glob(".part*"))


def test_a_page_in_place_of_the_weights_is_not_kept(server, tmp_path):
    url, handler = server
    handler.content = b"<!doctype html><title>Log in</title>"
    with pytest.raises(UserError, match="a web page came in place of the file"):
        fetched(entry(url), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/weights.pth", None])
def test_without_it_one_message_says_which_file_belongs_where(server, tmp_path, place):
    place = place or server[0].replace("weights", "others")
    with pytest.raises(UserError) as refused:
        fetched(entry(place), tmp_path)
    for part in (str(tmp_path / "weights.pth"), place, "MIT", "put it there"):
        assert part in str(refused.value)


def test_the_list_knows_the_file_of_every_network_that_takes_a_published_backbone():
    files = {one["file"] for one in json.loads(LIST.read_text())}
    known = set()
    for path in sorted(networks.CONF.glob("model/*.yaml")):
        model = OmegaConf.load(path)
        if "pretrained" in model and path.stem not in ("smp", "timm_u"):
            target = import_target("model", model._target_)
            known.add(published_weights(target.backbone)["file"])
    assert known == files
    with pytest.raises(UserError, match="no file is known"):
        published_weights("weights of my own")


def test_auto_trains_with_the_file_of_the_folder(phantom_root, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBASEG_WEIGHTS", str(tmp_path))
    encoder = small_network("mamba_unet").network
    names = {ours: theirs for theirs, ours in encoder.backbone_names().items()}
    parts = {v: k for k, v in type(encoder).original_parts.items()}
    weights = {}
    for key, value in encoder.state_dict().items():
        start = next((ours for ours in names if key.startswith(ours)), None)
        if start:
            theirs = names[start] + key.removeprefix(start)
            for ours, original in parts.items():
                theirs = theirs.replace(ours, original)
            weights[theirs] = value
    torch.save({"model": weights}, tmp_path / "vssmtiny_dp01_ckpt_epoch_292.pth")
    words = [*small_overrides(phantom_root, tmp_path), "data.steps=1", "data.val_every=1",
             "model=mamba_unet", "model.embed_dim=24", "model.depths=[1,1,1,1]", "model.d_state=4",
             "model.pretrained=auto", "trainer=cpu", "test=false"]  # fmt: skip
    run = trained(*words)
    assert run.config["model"]["pretrained"].endswith("vssmtiny_dp01_ckpt_epoch_292.pth")
    loaded = set(run.folder.record["pretrained"]["loaded"])
    assert run.folder.record["pretrained"]["ignored"] == [] and len(loaded) == len(weights)


def test_auto_is_refused_for_a_network_without_an_encoder_to_load():
    with pytest.raises(UserError, match="no pretrained encoder"):
        trained(*UNET, "data=phantom", "+model.pretrained=auto")
