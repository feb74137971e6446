"""torch.nn's attention modules have a fused forward of their own for eval without gradients, which hides their layers.

It is off at every call of a compiled model that is known to have such modules, so that what Dynamo saw of the switch at capture holds at
later calls. One that is added later, or hidden from `model.modules()`, is known once a call has captured it: that call runs it fused.
"""

from __future__ import annotations

import threading

import torch
from torch import nn

_HIDING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def hides_layers(model: nn.Module) -> bool:
    return any(isinstance(module, _HIDING) for module in model.modules())


class _Fastpath:
    """Switches torch's fused attention off while any such model runs, in whichever thread: the switch is the process's."""

    def __init__(self) -> None:
        self._lock, self._inside, self._was = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._inside += 1

    def __exit__(self, *problem: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.mha.set_fastpath_enabled(self._was)


WITHOUT_FASTPATH = _Fastpath()
