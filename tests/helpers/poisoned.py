"""As src/train.py, but the last image of step 3 holds a NaN; of two processes the second has it."""

import numpy as np

from mambaseg.app.commands.train import main
from mambaseg.data.slices import SliceDataset

whole = SliceDataset.__getitem__


def item(self, key):
    item = whole(self, key)
    if (item.get("step"), item.get("position")) == (3, 3):
        item["image"] = np.full_like(item["image"], np.nan)
    return item


SliceDataset.__getitem__ = item
main()
