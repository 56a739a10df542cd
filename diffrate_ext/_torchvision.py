"""Makes torchvision, which timm needs, importable beside a CPU-only torch.

The torchvision on PyPI is a CUDA build. Beside a CPU-only torch its compiled operators do not load, and its import
stops where it describes them (``torchvision::nms``) to torch. Declaring the two names first lets the import pass;
calling them still fails, and neither timm's models nor its image transforms do.
"""

from __future__ import annotations

import torch

_declared: torch.library.Library | None = None


def make_importable() -> None:
    """Declare torchvision's operators if, and only if, its import fails for want of them.

    A torchvision that fits defines them itself: declared twice, they would end the process.
    """
    global _declared
    if torch.version.cuda is not None or torch.version.hip is not None or _declared is not None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            return  # another fault, which whoever imports it is told
    except Exception:
        return  # not installed, or another fault
    else:
        return
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
