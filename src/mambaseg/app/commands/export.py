"""Writes a trained network as ONNX or as a torch.export program, and compares; or as a bundle.

mambaseg export run=outputs/default/<run folder>
mambaseg export run=outputs/default/<run folder> format=bundle output=my_network
mambaseg export run=best.ckpt format=torch size=256 output=network.pt2
"""

import logging
from pathlib import Path

from omegaconf import DictConfig

from mambaseg.app.entry import entry

log = logging.getLogger(__name__)


@entry("export")
def main(cfg: DictConfig) -> None:
    """Writes the file and, beside it, what a program that uses it has to know."""
    import torch

    from mambaseg.app.calibrate import stored_calibration
    from mambaseg.app.networks import plain, restore_network
    from mambaseg.data.sizes import sides_of
    from mambaseg.errors import UserError
    from mambaseg.inference.bundle import TOLD, write_bundle
    from mambaseg.inference.export import SUFFIX, export_network
    from mambaseg.inference.found import find_run
    from mambaseg.storage.run_folder import file_name

    run = find_run(cfg.run, cfg.outputs)
    network, checkpoint = restore_network(run, scan_backend="torch")
    about, name = checkpoint.about, file_name(checkpoint.about["model"]["name"])
    if cfg.format == "bundle":
        folder = Path(cfg.output or f"{name}_bundle").expanduser()
        write_bundle(network, checkpoint, folder, calibration=stored_calibration(checkpoint))
        log.info("written: %s; run=%s takes it like a run folder", folder, folder)
        return
    sides = sides_of(plain(cfg)["size"] or about["preprocessing"]["size"])
    output = Path(cfg.output or f"{name}{SUFFIX.get(cfg.format, '')}")
    for path in (output.expanduser(), output.with_name(f"{output.name}.json").expanduser()):
        if path.exists():
            raise UserError(f"output={path} is there already: name a new file")
    torch.manual_seed(cfg.seed)
    image = torch.rand(cfg.batch_size, checkpoint.inputs, *sides)
    parity = export_network(
        network,
        image,
        output.expanduser(),
        format=cfg.format,
        tolerance=cfg.tolerance,
        about={key: about[key] for key in TOLD if key in about},
    )
    log.info("written: %s, image %s; %s", output, "×".join(map(str, image.shape)), parity)
