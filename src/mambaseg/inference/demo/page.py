"""The page itself, with Gradio: on this machine only, and without a word to any other."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mambaseg.data.phantoms.phantom import write_phantom
from mambaseg.errors import UserError
from mambaseg.inference.demo import parts
from mambaseg.inference.demo.study import (
    ENDINGS,
    Segmented,
    heart_indices,
    phases,
    segment_file,
    volumes_of,
)
from mambaseg.inference.predictor import Predictor
from mambaseg.storage.untrusted import printable

HOST = "127.0.0.1"
_READERS = 4  # browsers whose images are kept in memory at a time
_IDLE = 3600  # s, after which those of a closed page are forgotten
_CSS = Path(__file__).with_name("page.css")
_HEAD = '<meta name="robots" content="noindex"><meta name="referrer" content="no-referrer">'
# of the reader's own machine
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
log = logging.getLogger(__name__)


class _Study(NamedTuple):
    """What one browser has brought."""

    first: Segmented | None = None
    second: Segmented | None = None


def _gradio() -> Any:
    # both are read while Gradio is imported and when a page is made
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_OFFLINE"] = "1"
    # Gradio asks its own server whether it runs
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page is made with Gradio: pip install 'mambaseg[demo]'") from error
    return gradio


@contextmanager
def serve(predictor: Predictor, *, port: int | None = None, max_mib: float = 512) -> Iterator[str]:
    """Serves the page while the block runs.

    It yields the page's address. Without a `port` it is the first free one from 7860. Files
    larger than `max_mib` are refused.

    Raises:
        UserError: Gradio is not installed, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="mambaseg-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        gradio = _gradio()
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        # a stranger's page that gives this machine a name of its own gets no answer under it
        own_names = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        page = _page(gradio, predictor, Path(folder), max_mib)
        try:
            _, address, _ = page.launch(
                server_name=HOST, server_port=port, share=False, prevent_thread_lock=True,
                quiet=True, inbrowser=False, max_file_size=int(max_mib * 2**20), ssr_mode=False,
                pwa=False, mcp_server=False, enable_monitoring=False, run_history=False,
                footer_links=[], state_session_capacity=_READERS, css_paths=[_CSS], head=_HEAD,
                app_kwargs={"middleware": [own_names]},
                theme=gradio.themes.Default(
                    primary_hue="blue", neutral_hue="slate", font=_FONTS,
                    font_mono=("ui-monospace", "monospace"),
                    # its own is too faint on white
                ).set(body_text_color_subdued="*neutral_600"),
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"port={port}: {HOST} cannot be served there ({error})") from error
        try:
            yield address
        finally:
            # pages that are open never hang up: they are cut off, which is no error
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            page.server.force_exit = True
            page.close(verbose=False)


def _page(gradio: Any, predictor: Predictor, folder: Path, max_mib: float) -> Any:
    handlers = _Handlers(gradio, predictor, folder)
    private = {"api_visibility": "private"}
    with gradio.Blocks(
        title=f"{predictor.title} · mambaseg",
        analytics_enabled=False,
        delete_cache=(600, _IDLE),
        fill_width=True,
    ) as page:
        study = gradio.State(_Study(), time_to_live=_IDLE)
        gradio.HTML(parts.head(predictor))
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                drops = []
                labels = parts.part("image_drop", max_mib), parts.part("systole_drop")
                for name, label in zip(_Study._fields, labels, strict=True):
                    gradio.HTML(label)
                    drops.append(
                        gradio.File(label=name, show_label=False, type="filepath", height=120,
                                    elem_id=name, file_types=list(ENDINGS))
                    )  # fmt: skip
                example = gradio.Button(
                    "Try it with a synthetic heart", size="sm", elem_id="example",
                    visible=predictor.channels == 1,
                )  # fmt: skip
                problem = gradio.HTML(elem_id="problem")
                facts = gradio.HTML(elem_id="facts")
                again = gradio.Button("Start again", visible=False, size="sm")
            with gradio.Column(scale=2, min_width=300):
                pictures = gradio.HTML(parts.part("empty"), elem_id="pictures")
                frame = gradio.Slider(1, 2, step=1, visible=False, label="Frame", elem_id="frame")
                z = gradio.Slider(1, 2, step=1, visible=False, label="Slice", elem_id="slice")
                with gradio.Row():
                    with gradio.Column(min_width=240):
                        sizes = gradio.HTML(elem_id="sizes")
                    with gradio.Column(min_width=240):
                        heart = gradio.HTML(elem_id="heart")
                        with gradio.Row(visible=False) as choice:
                            ed, es = (
                                gradio.Slider(1, 2, step=1, label=label, min_width=120)
                                for label in ("ED frame", "ES frame")
                            )
        parts_shown = [frame, z, pictures, sizes, heart, choice, ed, es, facts, again]
        working = {"concurrency_limit": 1, "concurrency_id": "networks",
                   "show_progress_on": pictures, **private}  # fmt: skip
        for drop, place in zip(drops, _Study._fields, strict=True):
            shown = [drop, study, problem, *parts_shown]
            taken = gradio.State(time_to_live=_IDLE)
            moved = drop.upload(
                handlers.take, drop, taken, queue=False, show_progress="hidden", **private
            )
            moved.success(handlers.bring(place), [taken, study], shown, **working)
        example.click(handlers.example, None, [drops[0], study, problem, *parts_shown], **working)
        again.click(handlers.again, None, [study, problem, *parts_shown], **private)
        quick = {"show_progress": "hidden", "trigger_mode": "always_last", **private}
        for slider in (frame, z):
            slider.input(handlers.look, [study, frame, z], [z, pictures, sizes], **quick)
        for slider in (ed, es):
            slider.input(handlers.indices, [study, ed, es], heart, **quick)
    return page


class _Handlers:
    """What the page does when something is brought or moved."""

    def __init__(self, gradio: Any, predictor: Predictor, folder: Path) -> None:
        self.gradio, self.predictor, self.folder = gradio, predictor, folder.resolve()
        self.names = predictor.class_names

    def take(self, path: str | None) -> str | None:
        """Moves an upload to a folder of its own.

        Gradio names uploads by their content, so the same file brought again, here or in another
        window, would be removed together with the one that is segmented first.
        """
        if path is None or self.folder not in Path(path).resolve().parents:
            return path
        return str(shutil.move(path, tempfile.mkdtemp(dir=self.folder)))

    def bring(self, place: str) -> Any:
        """The handler of a new file, for a field of `_Study`.

        A new first file is of another patient: the second one goes. A second file alone is the
        first.
        """

        def handle(path: str | None, study: _Study) -> list[Any]:
            problem = ""
            try:
                if path is not None:
                    found = self._segment(Path(path))
                    second = place == "second" and study.first is not None
                    changed = study._replace(second=found) if second else _Study(found)
                    volumes_of(*changed)
                    return [None, changed, "", *self._shown(changed)]
            except UserError as error:
                problem = printable(str(error))
            except Exception:  # a page shows no stack trace; the terminal does
                log.exception("an image could not be segmented")
                problem = "this image cannot be segmented; the terminal says more"
            message = parts.part("message", problem) if problem else ""
            return [None, study, message, *[self.gradio.skip()] * 10]

        return handle

    def example(self) -> list[Any]:
        """The cine of a synthetic heart, as if it had been brought to an empty page."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            written = write_phantom(Path(place) / "phantom", patients=1)
            cine = next(written.glob("*/*_4d.nii.gz"))
            cine = cine.rename(cine.with_name("synthetic_heart.nii.gz"))
            return list(self.bring("first")(str(cine), _Study()))

    def _segment(self, path: Path) -> Segmented:
        """Segments an upload and removes the copy that Gradio made of it."""
        if self.folder not in path.resolve().parents:
            raise UserError("a file must come through the page")
        try:
            return segment_file(self.predictor, path)
        finally:
            shutil.rmtree(path.resolve().parent, ignore_errors=True)

    def again(self) -> list[Any]:
        """Forgets everything."""
        return [_Study(), "", *self._shown(_Study())]

    def look(self, study: _Study, frame: float, z: float) -> list[Any]:
        """Another slice or frame."""
        volumes = volumes_of(*study)
        if not volumes:
            return [self.gradio.skip()] * 3
        volume = volumes[_index(frame, len(volumes))]
        depth = len(volume.labels)
        z = _index(z, depth)
        slider = self.gradio.update(maximum=max(depth, 2), value=z + 1, visible=depth > 1)
        return [slider, parts.pictures(volume, z), parts.sizes(volume, self.names)]

    def indices(self, study: _Study, ed: float, es: float, *, proposed: bool = False) -> str:
        """The heart's indices of two frames or files."""
        volumes = volumes_of(*study)
        if len(volumes) < 2:
            return ""
        large, small = (volumes[_index(number, len(volumes))] for number in (ed, es))
        try:
            found = heart_indices(large, small, self.names)
        except UserError as error:
            text = str(error)
            return parts.part("remark", text[:1].upper() + text[1:])
        return parts.heart(found, (large.caption, small.caption), proposed=proposed)

    def _shown(self, study: _Study) -> list[Any]:
        """All that is shown of a study, at its largest labelled slice."""
        volumes, update = volumes_of(*study), self.gradio.update
        if not volumes:
            hidden, nothing = update(visible=False), parts.part("empty")
            return [hidden, hidden, nothing, "", "", hidden, update(), update(), "", hidden]
        ed, es = phases(volumes, self.names)
        cine = study.second is None and len(volumes) > 1
        large = volumes[ed].labels
        z = int((large > 0).sum(axis=(1, 2)).argmax())
        count, captions = len(volumes), [volume.caption for volume in volumes]
        label = "Frame" if study.second is None else f"Phase: {' (1), '.join(captions)} (2)"
        return [
            update(maximum=max(count, 2), value=ed + 1, visible=count > 1, label=label),
            *self.look(study, ed + 1, z + 1),
            self.indices(study, ed + 1, es + 1, proposed=cine and count > 2),
            update(visible=cine and "LV" in self.names),
            update(maximum=max(count, 2), value=ed + 1),
            update(maximum=max(count, 2), value=es + 1),
            parts.facts(*study),
            update(visible=True),
        ]


def _index(number: float, count: int) -> int:
    """A slider's number as an index that exists."""
    return min(max(round(number), 1), count) - 1
