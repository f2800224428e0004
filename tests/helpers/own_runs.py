"""Small trainings with a folder of configs beside ours."""

from hydra import compose, initialize_config_dir

from mambaseg.app.build import build
from mambaseg.app.entry import CONF

SMALL = ["model=unet", "model.widths=[4,8]", "model.dropout=[0,0]", "logger=csv", "data.size=32",
         "data.batch_size=4", "data.steps=2", "data.val_every=1", "trainer=cpu"]  # fmt: skip


def composed(name, folder, *overrides):
    """With a folder of own leaves beside those of the project."""
    words = [f"hydra.searchpath=[file://{folder}]", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=words)


def trained(folder, tmp_path, *overrides):
    places = [f"outputs={tmp_path / 'outputs'}", f"data.cache_dir={tmp_path / 'cache'}"]
    with build(composed("config", folder, *SMALL, *places, *overrides)) as run:
        run.fit()
        run.evaluate()
        run.report()
    return run
