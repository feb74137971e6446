"""What capture lacks: the layers that TorchDynamo leaves out of its graphs because of backward hooks, for the plan to say so."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fp8fx.clone import base_class

QUANTIZABLE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding,
    nn.MultiheadAttention,
)  # fmt: skip
HOOKED = "TorchDynamo captures no layer of torch.nn that has a backward hook, or that an nn.Sequential calls beside one"


class Hooks:
    """Layers of one model that its graphs lack because of a backward hook."""

    def __init__(self, capture: str) -> None:
        self._follows = capture == "dynamo"  # symbolic tracing leaves hooks out, not layers
        self._left: set[str] = set()
        self._then: set[str] = set()  # what hooks kept out when the last graph was captured

    def captured(self, root: nn.Module, rows: Iterable[str]) -> None:
        """A graph with the layers `rows` was captured."""
        self._then = backward_hooked(root)
        self._left = (self._left | self._then) - set(rows)

    def now(self, root: nn.Module) -> set[str]:
        """Those left out: also by a hook that came since, after which no graph may have been captured."""
        return self._left | (backward_hooked(root) - self._then) if self._follows else set()


def backward_hooked(root: nn.Module) -> set[str]:
    """Layers inside `root` that Dynamo leaves out for backward hooks: their own, or one anywhere inside an nn.Sequential that calls them.

    In the middle of a Sequential's loop Dynamo cannot go on, and gives it up; a user's own module is captured for itself everywhere.
    """
    modules = dict(root.named_modules())
    hooked = [name for name, module in modules.items() if name and (module._backward_hooks or module._backward_pre_hooks)]
    found = {name for name in hooked if isinstance(modules[name], QUANTIZABLE)}
    for name, module in modules.items():
        if _loops(module) and any(not name or hook == name or hook.startswith(f"{name}.") for hook in hooked):
            found |= _called_by(module, name)
    return found


def _loops(module: nn.Module) -> bool:
    """An nn.Sequential, with the forward of one."""
    return isinstance(module, nn.Sequential) and base_class(module).forward is nn.Sequential.forward


def _called_by(sequential: nn.Module, name: str) -> set[str]:
    """The layers that it calls, and those that Sequentials inside of it do."""
    found: set[str] = set()
    for part, child in sequential.named_children():
        inside = f"{name}.{part}" if name else part
        if _loops(child):
            found |= _called_by(child, inside)
        elif isinstance(child, QUANTIZABLE):
            found.add(inside)
    return found
