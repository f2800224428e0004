"""Import it first: PyPI's torchvision beside a CPU build of torch, for `make zoo` and `models`.

There the compiled operators of torchvision do not load. Its Python code wants two of them declared;
the networks call none.
"""

import torch

if torch.version.cuda is None:
    DECLARED = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
