"""One defect of the environment that the examples may meet: PyPI's torchvision beside a CPU build of torch."""

from __future__ import annotations

import importlib
import sys

import torch

_keep_alive: list[torch.library.Library] = []  # a Library takes its operators away again when it dies


def mend_torchvision() -> None:
    """Let transformers and Lightning, which import torchvision where it is installed, get past it. Call it before you import them.

    PyPI's build is for CUDA and fails at import beside a CPU build of torch ("operator torchvision::nms does not exist"), unless the two
    operators it looks up there are declared. Nothing here calls them. Does nothing where torchvision is missing or works.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep_alive.append(library)
        importlib.import_module("torchvision")
