"""What a linear layer costs in bf16 and in FP8, and which layers of a graph to run in FP8.

A layer alone takes as long as the slower of its GPU work and of the host that launches it. In a graph the host runs ahead, so that only
the sums matter:    time = max(sum of GPU times, fixed + sum of host times)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8fx.costs.own import own_is_faster
from fp8fx.costs.table import Table, load
from fp8fx.spec import SCALINGS, SIDES

FAST_FORWARD = ("fast", "precise", "precise")  # of output, grad_input, grad_weight: the recipes' default
# (scaling, granularity) -> casts of X, of W in forward, of W once more in backward, of dY; in inference W is kept in FP8.
_TRAINING = {
    "known": ("both", "rows", "transposed", "both"),
    "current": ("current_both", "current", "transposed", "current_both"),
    "row": ("row_both", "row", "row", "row_both"),
    "block": ("block_both", "block", "transposed", "block_both"),
}
_INFERENCE = {"known": "rows", "current": "current", "row": "row", "block": "block"}


@dataclass(frozen=True)
class Layer:
    """One linear layer: X [m, k] by W [n, k].

    scaling, granularity: of its input, in the recipe's words (a block as (rows, columns)). accumulate: of the three GEMMs.
    shared: how many layers read the same quantized X, which is then cast once for all of them. dtype: of the product; x_dtype, w_dtype: of
    its operands, where autocast is to cast them to `dtype`.
    """

    m: int
    k: int
    n: int
    training: bool = True
    scaling: str = "current"
    granularity: str | tuple[int, int] = "tensor"
    dtype: torch.dtype = torch.bfloat16
    accumulate: tuple[str, str, str] = FAST_FORWARD
    shared: int = 1
    x_dtype: torch.dtype | None = None
    w_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if any(operator.index(size) < 1 for size in (self.m, self.k, self.n, self.shared)):
            raise ValueError(f"costs.Layer: m, k, n and shared are numbers above 0, got {(self.m, self.k, self.n, self.shared)}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"costs.Layer: scaling is one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        block = self.granularity
        sides = set(block) - {1} if isinstance(block, tuple) and len(block) == 2 else set()
        if block not in ("tensor", "row") and (len(sides) != 1 or not sides <= set(SIDES)):
            raise ValueError(
                f"costs.Layer: granularity is tensor, row, or a block (1, S), (S, 1) or (S, S) with S one of "
                f"{', '.join(map(str, sorted(SIDES)))}, got {block!r}"
            )

    def width(self, dtype: torch.dtype | None) -> float:
        """Of an element, over those of bf16, which the table's casts read: casts move bytes."""
        return (dtype or self.dtype).itemsize / 2


@dataclass(frozen=True)
class Cost:
    """Microseconds on the GPU and on the host that launches it; `fixed` is the host's per graph, whatever is in it."""

    gpu_bf16: float
    gpu_fp8: float
    host_bf16: float
    host_fp8: float
    fixed: float

    @property
    def speedup(self) -> float:
        """Of the layer on its own."""
        return max(self.gpu_bf16, self.fixed + self.host_bf16) / max(self.gpu_fp8, self.fixed + self.host_fp8)

    @property
    def gpu_speedup(self) -> float:
        """Where the host is not what limits."""
        return self.gpu_bf16 / self.gpu_fp8


def cost(layer: Layer, table: Table | None = None) -> Cost:
    """The layer's cost by `table`, that of the H100 by default (`costs.load(torch.cuda.get_device_name())` is that of a GPU)."""
    table = load() if table is None else table
    if not isinstance(table, Table):
        raise TypeError(f"costs: table is a Table, as costs.load gives it, not {table!r}")
    host = table.host["training" if layer.training else "inference"]
    return Cost(_gpu_bf16(layer, table), _gpu_fp8(layer, table), host["bf16"], host["fp8"], host["fixed"])


def speedup(
    m: int,
    k: int,
    n: int,
    training: bool = True,
    scaling: str = "current",
    granularity: str | tuple[int, int] = "tensor",
    dtype: torch.dtype = torch.bfloat16,
    *,
    table: Table | None = None,
) -> float:
    """How many times as fast as in `dtype` one linear layer, X [m, k] by W [n, k], is in FP8 on its own; below 1 it is slower."""
    return cost(Layer(m, k, n, training, scaling, granularity, dtype), table).speedup


def choose(layers: Sequence[Layer], table: Table | None = None, least: float = 1.0) -> list[bool]:
    """Which layers of one graph to run in FP8, so that the graph takes least time.

    Each layer trades GPU time saved for host time added. Those that save most per added host time come first, and as many are taken as make
    max(GPU, host) least. A layer whose GPU time is not better by the factor `least` stays in high precision.
    """
    costs = [cost(layer, table) for layer in layers]
    gains = [c.gpu_bf16 - c.gpu_fp8 if c.gpu_speedup > least else 0.0 for c in costs]
    added = [max(c.host_fp8 - c.host_bf16, 1e-9) for c in costs]
    order = sorted((i for i in range(len(layers)) if gains[i] > 0), key=lambda i: -gains[i] / added[i])
    gpu = sum(c.gpu_bf16 for c in costs)
    host = max((c.fixed for c in costs), default=0.0) + sum(c.host_bf16 for c in costs)
    best, taken = max(gpu, host), 0
    for count, i in enumerate(order, start=1):
        gpu, host = gpu - gains[i], host + added[i]
        if max(gpu, host) < best:
            best, taken = max(gpu, host), count
    chosen = set(order[:taken])
    return [i in chosen for i in range(len(layers))]


def _gpu_bf16(layer: Layer, table: Table) -> float:
    m, k, n = layer.m, layer.k, layer.n
    if layer.dtype not in (torch.bfloat16, torch.float16):
        rate = table.rates["tf32" if layer.dtype == torch.float32 and _tf32() else "float32"]
        flops = 2e-6 * m * k * n
        times = [table.forward(m, k, n, "bf16"), table.forward(m, n, k, "bf16"), table.weight(m, k, n, "bf16")]
        return sum(max(us, flops / rate) for us in times[: 3 if layer.training else 1])  # latency and memory bound it too
    forward = table.forward(m, k, n, "bf16")
    if layer.w_dtype is not None and layer.w_dtype != layer.dtype:  # autocast's own cast, kept from forward for backward
        forward += layer.width(layer.w_dtype) * table.cast("rows", n * k)
    return forward + table.forward(m, n, k, "bf16") + table.weight(m, k, n, "bf16") if layer.training else forward


def _tf32() -> bool:
    """float32 products run in TF32. torch raises where its newer switch is read by the older name after it was set."""
    matmul = torch.backends.cuda.matmul
    return str(matmul.fp32_precision) == "tf32" if hasattr(matmul, "fp32_precision") else bool(matmul.allow_tf32)


def _gpu_fp8(layer: Layer, table: Table) -> float:
    m, k, n = layer.m, layer.k, layer.n
    kind = _kind(layer)
    of_x_bytes, of_w_bytes, of_dy_bytes = (layer.width(dtype) for dtype in (layer.x_dtype, layer.w_dtype, None))
    output, grad_input, grad_weight = (_column(layer, accumulate) for accumulate in layer.accumulate)
    gemms = table.forward(m, k, n, _whose(output, m, n, k))
    if not layer.training:
        return gemms + of_x_bytes * table.cast(_INFERENCE[kind], m * k) / layer.shared
    gemms += table.forward(m, n, k, _whose(grad_input, m, k, n)) + table.weight(m, k, n, _whose(grad_weight, n, k, m))
    of_x, of_w, of_w_again, of_dy = _TRAINING[kind]
    weights = table.cast(of_w, n * k) + table.cast(of_w_again, n * k)
    inputs, gradients = table.cast(of_x, m * k) / layer.shared, table.cast(of_dy, m * n)
    return gemms + of_x_bytes * inputs + of_w_bytes * weights + of_dy_bytes * gradients


def _kind(layer: Layer) -> str:
    if layer.granularity == "tensor":
        return "current" if layer.scaling == "current" else "known"
    return "row" if layer.granularity == "row" else "block"


def _whose(column: str, m: int, n: int, k: int) -> str:
    """The column of the kernel that computes C [m, n], contracting k."""
    scales, _, accumulate = column.partition("_")
    if scales not in ("tensor", "row") or not own_is_faster(m, n, k, scales, accumulate):
        return column
    return "own_precise" if accumulate == "precise" else "tensor_fast"  # ours by rows has no column, and takes as long as that


def _column(layer: Layer, accumulate: str) -> str:
    kind = _kind(layer)
    if kind == "block":
        return "block"
    if layer.scaling == "none" and accumulate == "precise":  # all in e5m2, which torch's kernel refuses
        return "own_precise"
    return f"{'row' if kind == 'row' else 'tensor'}_{accumulate}"
