"""A trained network as a folder to give away: weights, what they need, and a model card.

    model.safetensors   the weights, without any code
    config.json         what a checkpoint says of itself: network, preprocessing, classes, data
    README.md           the model card
    model.calibration.json   where the network was calibrated: its temperature

`read_checkpoint` takes the folder like a run folder. The layout is that of the Hugging Face Hub.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseg.errors import UserError
from mambaseg.evaluation.calibration import calibration_file
from mambaseg.inference.trained import Checkpoint, read_checkpoint
from mambaseg.models import AnySize
from mambaseg.reporting.grid import markdown_text
from mambaseg.reporting.reading import read_run
from mambaseg.reporting.tables import headline, run_grid
from mambaseg.storage.files import temporary_name, writing
from mambaseg.storage.run_folder import RunFolder, file_digest

TOLD = ("model", "averaged", "task", "preprocessing", "slicing", "views", "classes", "regions",
        "keep_largest", "data", "split", "supervision", "seen")  # fmt: skip
_CARD = """---
library_name: mambaseg
pipeline_tag: image-segmentation
tags: [medical-imaging, segmentation, pytorch]
---

# {name}, trained on {title}

Research software: not a medical device, and not for decisions about patients. Whoever publishes
this folder states here the licence of the weights, which the data may restrict, and whom to cite.

| | |
|---|---|
{facts}

{scores}
## Use

```sh
mambaseg predict run=<this folder> input=images output=labels
mambaseg evaluate run=<this folder> data=<a config of conf/data> data.root=<folder>
mambaseg train init_from=<this folder> model={model} data=<a config of conf/data> data.root=<folder>
```

If the network has other arguments than its config, a training takes them too, such as
`model.widths=[16,32]`; `config.json` lists them. The weights are in `model.safetensors`. Reading
both files executes nothing.{own}
"""


def write_bundle(
    network: AnySize,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    calibration: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the folder of a checkpoint and its network, whole or not at all.

    `calibration` is what is stored beside the checkpoint.

    Raises:
        UserError: the folder holds something, what was written is not what was read, or it is no
            network that segments.
    """
    if checkpoint.task != "segmentation":
        raise UserError(
            f"format=bundle: {checkpoint.path} was trained for {checkpoint.task}, and a bundle is "
            "for networks that segment. Choose format=onnx or format=torch."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output={folder} is there already: name a new folder")
    from safetensors.torch import save_file

    about = {key: checkpoint.about[key] for key in TOLD if key in checkpoint.about}
    weights = {name: tensor.contiguous().clone() for name, tensor in checkpoint.weights.items()}
    part = temporary_name(folder)
    try:
        with writing(folder, otherwise="choose another folder with output=..."):
            part.mkdir(parents=True)
            save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
            text = json.dumps({"mambaseg": about}, indent=2, ensure_ascii=False)
            (part / "config.json").write_text(text + "\n", encoding="utf-8")
            (part / "README.md").write_text(_card(network, checkpoint), encoding="utf-8")
            shutil.copymode(part / "README.md", part / "model.safetensors")  # it was for us alone
            _require_same(written := read_checkpoint(part), weights)
            if calibration:
                own = {**calibration, "checkpoint": file_digest(written.path)}
                text = json.dumps(own, indent=2) + "\n"
                calibration_file(written.path).write_text(text, encoding="utf-8")
            if folder.is_dir():
                folder.rmdir()
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _require_same(written: Checkpoint, weights: Mapping[str, Tensor]) -> None:
    back = written.weights
    if back.keys() != weights.keys() or not all(torch.equal(back[k], weights[k]) for k in back):
        raise UserError(f"{written.path}: the weights that were written read back as others")


def _card(network: AnySize, checkpoint: Checkpoint) -> str:
    """The model card; with scores where they are those of the checkpoint in its run's folder."""
    about, path = checkpoint.about, checkpoint.path.resolve()
    run = RunFolder(path.parent.parent)
    name, title = about["model"]["name"], about["data"]["title"]
    used = checkpoint.preprocessing.describe()
    count = sum(parameter.numel() for parameter in network.parameters())
    kind = type(network.network)
    target = f"{kind.__module__}.{kind.__qualname__}"
    split = about.get("split") or {}
    facts = {
        "network": f"{name} ({target}), {count:,} parameters",
        "labels": ", ".join(f"{label} {one}" for label, one in enumerate(about["classes"])),
        "channels": checkpoint.channels,
        "preprocessing": ", ".join(f"{key} {value}" for key, value in used.items()),
        "data": title,
        "split": f"{split.get('name')} ({split.get('hash')})" if split else "unknown",
    }
    if labels := checkpoint.supervision:
        facts["learnt from"] = (
            f"{labels['labels']} labels of {labels['labelled']} of {labels['patients']} patients"
        )
    if "averaged" in about:
        facts["weights"] = f"averaged over the steps of the training, decay {about['averaged']}"
    scores = ""
    summary = read_run(run.path).summary if run.finished else {}
    # of a training's states one was tested
    if path == run.path / "checkpoints" / f"{summary.get('checkpoint')}.ckpt":
        scores = f"## Scores\n\n{headline(summary)[0]}\n"
        if "foreground" in summary:
            grid = run_grid(summary, "Scores on the test set", list(summary["classes"]))
            scores = grid.markdown(2)
    if run.finished:
        versions = run.record.get("versions") or {}
        facts["made with"] = ", ".join(f"{key} {versions[key]}" for key in ("mambaseg", "torch")
                                       if versions.get(key))  # fmt: skip
    own = "" if target.startswith(("mambaseg.", "monai.")) else (
        f" The network is not part of mambaseg:\nthe class `{target}` has to be there, and its "
        "config with `--config-dir=<folder>`."
    )  # fmt: skip
    return _CARD.format(
        name=markdown_text(name),
        model=shlex.quote(str(about["model"].get("config") or name)),
        title=markdown_text(title),
        facts="\n".join(f"| {key} | {markdown_text(str(text))} |" for key, text in facts.items()),
        scores=scores,
        own=own,
    )
