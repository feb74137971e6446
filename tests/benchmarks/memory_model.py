"""Peak memory of a training step without a GPU: the graph that a GPU gets, compiled by Inductor for the CPU, a 16th as wide.

    python tests/benchmarks/memory_model.py --batch 4 --candidates bf16 delayed hybrid-saved --top 12

Two Llama blocks of width 256, 128 tokens per sequence: rows, widths and weights keep the ratios of width 4096 and 2048 tokens, so the
ratio of two peaks does too, but for statistics per row (1% of an activation here). Counted is what a GPU's allocator would see: every
buffer that Inductor's code makes and every result of an operator, from its making until its last reference dies; what a reference makes
inside is not counted, as kernels do not make it (but for what `act_linear` needs of h and u where it keeps them in FP8). Not counted
either: cuBLAS's workspaces, the allocator's rounding.

--top N prints the N largest tensors that live at the peak, and which line of the generated code made them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from candidates import CHANGES
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformer_blocks import Blocks, Size, make, tokens

import fp8fx
from fp8fx import inner as inner_module
from fp8fx.ops import act_linear, inductor
from fp8fx.passes.contract import Context

SIZE = Size(width=256, heads=8, kv_heads=2, hidden=896, layers=2, length=128)
ACT_LINEAR = torch.ops.fp8fx.act_linear.default
GUARDS: Any = torch._C._dynamo.guards


@dataclass
class Live:
    """Tensors that are alive, by storage, and what was alive at the highest point."""

    found: dict[int, tuple[StorageWeakRef, int, str]] = field(default_factory=dict)
    peak: int = 0
    at_peak: list[tuple[int, str]] = field(default_factory=list)

    def add(self, x: Tensor, label: str) -> None:
        storage = x.untyped_storage()
        reference = StorageWeakRef(storage)
        self.found = {key: value for key, value in self.found.items() if not value[0].expired()}
        if reference.cdata in self.found or not storage.nbytes():
            return
        self.found[reference.cdata] = (reference, storage.nbytes(), f"{label}  {str(x.dtype).removeprefix('torch.')}{list(x.shape)}")
        self.look()

    def look(self, inside: int = 0) -> None:
        """Is this the highest point so far? inside: bytes that an operator held for itself."""
        total = inside + sum(size for _, size, _ in self.found.values())
        if total > self.peak:
            here = [(size, name) for _, size, name in self.found.values()]
            self.peak, self.at_peak = total, sorted([*here, *([(inside, "inside of an operator")] if inside else [])], reverse=True)


class _Watch(TorchDispatchMode):
    """Adds every result of an operator. Those called inside of another are not seen: of what a kernel needs besides its results, only
    the high-precision h and u of `act_linear` are large."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo leaves alone what runs under a mode of a user's."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor):
                self.live.add(x, str(func))
        if func is ACT_LINEAR and result[4].dtype == torch.uint8:
            self.live.look(result[4].numel() + result[5].numel())  # as fp8fx/ops/cuda_act_linear.py: half of h and u, or a in place of h
        return result


@contextlib.contextmanager
def _buffers(live: list[Live]) -> Iterator[None]:
    """The buffers of the code that Inductor generates inside go to live[0], if there is one."""
    made = GUARDS._empty_strided_cpu

    def empty(*args: Any) -> Tensor:
        x: Tensor = made(*args)
        if live:
            frame = sys._getframe(1)
            live[0].add(x, linecache.getline(frame.f_code.co_filename, frame.f_lineno).split("=")[0].strip())
        return x

    with mock.patch.object(GUARDS, "_empty_strided_cpu", empty):
        yield


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Graphs are lowered for kernels, and products become aten's, though every tensor is on the CPU."""

    def on_gpu(context: Context, device: torch.device, trains: bool) -> Context:
        return dataclasses.replace(context, device="cuda", weights_inside=True)

    by_inductor = inner_module._by_inductor
    with (
        mock.patch.object(Context, "on", on_gpu),
        mock.patch.object(act_linear, "APART", act_linear.APART * (SIZE.width * SIZE.length) // (4096 * 2048)),
        mock.patch.object(inductor, "on_gpu", return_value=True),
        mock.patch.object(inner_module, "_by_inductor", lambda module, inputs, mode, cuda: by_inductor(module, inputs, mode, True)),
    ):
        yield


def peak(name: str, batch: int, size: Size = SIZE, inner: str = "inductor") -> Live:
    """What lives at the highest point of a forward and backward of candidate `name`: bf16, RECIPE or RECIPE-CHANGE (candidates.py)."""
    torch._dynamo.reset()
    model = make(Blocks, size, "cpu")
    x, dy = tokens(size, batch, "cpu")
    live: list[Live] = []
    with _buffers(live), _as_on_a_gpu(), torch._inductor.config.patch(fx_graph_cache=False):
        run = _compiled(name, model, inner)
        for measured in (False, False, True):
            for tensor in (x, *model.parameters()):
                tensor.grad = None
            if measured:
                live.append(Live())
                for t in (x, dy, *model.parameters(), *model.buffers()):
                    live[0].add(t, "given")
            with _Watch(live[0]) if measured else contextlib.nullcontext():
                y = run(x)
                y.backward(dy)
            del y
    return live[0]


def _compiled(name: str, model: nn.Module, inner: str) -> Any:
    if name == "bf16":
        return torch.compile(model, backend=inner, fullgraph=True, dynamic=False)
    base, _, change = name.partition("-")
    recipe = {"extends": base, "defaults": {**CHANGES.get(change, {}), "when_not_faster": "emulate"}}
    return fp8fx.compile(model, recipe, fullgraph=True, inner=inner, dynamic=False)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--candidates", nargs="+", default=["bf16", "delayed", "hybrid", "hybrid-saved"])
    parser.add_argument("--top", type=int, default=0, help="print the largest tensors at the peak")
    options = parser.parse_args()
    unit = SIZE.width * SIZE.length * 2  # bytes of one activation of one sequence
    for batch in options.batch:
        base = None
        for name in options.candidates:
            found = peak(name, batch)
            base = found.peak if base is None else base
            gib = found.peak * (4096 / SIZE.width) * (2048 / SIZE.length) / 2**30
            size = f"{found.peak / 2**20:8.2f} MiB, {gib:.2f} GiB at full size"
            print(f"{batch}x2048/{name:<16} {size}, x{found.peak / base:.3f}", flush=True)
            for bytes_, label in found.at_peak[: options.top]:
                print(f"    {bytes_ / unit / batch:7.3f}  {label}")


if __name__ == "__main__":
    main()
