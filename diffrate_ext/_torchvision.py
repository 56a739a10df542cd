"""Makes torchvision, which timm needs, importable beside a CPU-only torch.

The torchvision on PyPI is a CUDA build. Beside a CPU-only torch its compiled operators do not load, and its import
stops where it describes them (``torchvision::nms``) to torch. Declaring the two names first lets the import pass;
calling them still fails, and neither timm's models nor its image transforms do.
"""

from __future__ import annotations

import torch

_declared: torch.library.Library | None = None


def make_importable() -> None:
    global _declared
    if torch.version.cuda is not None or torch.version.hip is not None or _declared is not None:
        return
    if hasattr(torch.ops.torchvision, "nms"):  # a torchvision that fits was imported already
        return
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
