"""A page on this machine for trying a trained network out: bring an image, see its labels.

mambaseg demo
mambaseg demo run=outputs/default/<run folder>
mambaseg demo run=best.ckpt tta=true port=8000
mambaseg demo run=unet_best_model.pth model=unet
"""

import logging
import signal
import threading

from omegaconf import DictConfig

from mambaseg.app.entry import entry

_HOW = ("device", "precision", "scan_backend", "tta", "keep_largest", "batch_size")
log = logging.getLogger(__name__)


@entry("demo")
def main(cfg: DictConfig) -> None:
    """Serves the page until it is interrupted."""
    from mambaseg.app.ensemble import chosen_runs, restore_predictor
    from mambaseg.inference.demo.page import serve
    from mambaseg.inference.found import NEWEST

    if cfg.run is None and not cfg.ensemble:
        cfg.run = NEWEST
    predictor = restore_predictor(
        chosen_runs(cfg), original=cfg, **{name: cfg[name] for name in _HOW}
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with serve(predictor, port=cfg.port, max_mib=cfg.max_mib) as address:
        log.info("%s: %s (Ctrl+C ends it)", predictor.title, address)
        while not ended.wait(1):  # Windows lets nothing interrupt a wait without an end
            pass
