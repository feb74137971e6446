"""How far FP8 moves the outputs and gradients of two Llama-3-8B blocks: SQNR in dB against fp32, beside torchao's recipes.

    python tests/benchmarks/accuracy.py --json out.json --picture out.svg

2x2048 tokens of unit variance, weights in bf16, dy of unit variance over the width; the reference is the same model and the same
tensors in fp32, without TF32. `uneven` is the harder case: 8 channels of x are 60 times as large, and dy differs from token to token by a
log-normal factor (sigma 2). Weight gradients: the lowest and the mean of the 14 linear layers. Delayed scales are taken after 20
steps on the same batch, more than its history. direct has no scales, so its dy is multiplied by a power of two, which is halved until
all is finite, as a loss scaler does.

Bars: hybrid and delayed no lower than torchao's tensorwise recipe, rowwise no lower than its rowwise one, by more than 0.3 dB, in the four
figures of the even case and the weight gradients of the uneven one. Where torchao is not installed: than figures measured earlier,
in the even case only.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from benchmark_report import Bar, Report, Row, device_for, error_text, parser
from candidates import Compiled, candidate, compiled
from torch import Tensor, nn
from transformer_blocks import LLAMA, TINY, Blocks, make, tokens

CASES = ("even", "uneven")
FIGURES = ("output", "input gradient", "lowest weight gradient", "mean weight gradient")
CANDIDATES = ("bf16", "torchao-tensorwise", "torchao-rowwise", "torchao-rowwise_with_gw_hp", "hybrid", "delayed", "rowwise", "direct")
PEERS = {"hybrid": "torchao-tensorwise", "delayed": "torchao-tensorwise", "rowwise": "torchao-rowwise"}
EARLIER = {"torchao-tensorwise": (39.8, 34.0, 19.9, 21.0), "torchao-rowwise": (39.9, 36.6, 22.4, 23.7)}  # the even case, one H100
JUDGED = [("even", key) for key in FIGURES] + [("uneven", key) for key in FIGURES[2:]]
TOLERANCE = 0.3
BATCH, OUTLIERS, LARGER = 2, 8, 60.0

Tensors = dict[str, Tensor]


def batch(case: str, size: Any, device: str) -> tuple[Tensor, Tensor]:
    """x that wants a gradient, and dy; bf16 [B, L, D]."""
    x, dy = tokens(size, BATCH, device)
    if case == "uneven":
        generator = torch.Generator(device).manual_seed(2)
        channels = torch.randperm(size.width, generator=generator, device=device)[:OUTLIERS]
        x = x.detach().clone()
        x[..., channels] *= LARGER
        x.requires_grad_()
        dy = dy * (2 * torch.randn(dy.shape[:-1], generator=generator, device=device)).exp()[..., None].to(dy.dtype)
    return x, dy


def tensors(run: Compiled, model: nn.Module, x: Tensor, dy: Tensor, steps: int) -> Tensors:
    """Output and gradients of the last of `steps` steps, divided by the loss scale; where they lie."""
    scale = run.loss_scale
    while True:
        for _ in range(steps):
            for tensor in (x, *model.parameters()):
                tensor.grad = None
            y = run.run(x)
            y.backward(dy * scale)
            run.step()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found["input gradient"] = x.grad
        if run.loss_scale == 1 or scale < 1e-3 or all(bool(g.isfinite().all()) for g in found.values()):
            return {"output": y.detach(), **{name: g / scale for name, g in found.items()}}
        scale /= 2


def sqnr(wanted: Tensor, found: Tensor) -> float:
    """20 log10(|wanted| / |wanted - found|); `wanted` may lie on the CPU."""
    a, b = wanted.to(found.device), found.float()
    return float(20 * torch.log10(a.norm() / (a - b).norm()))


def figures(wanted: Tensors, found: Tensors) -> dict[str, float]:
    each = {key: sqnr(wanted[key], found[key]) for key in wanted}
    weights = [each[key] for key in wanted if wanted[key].dim() == 2]  # of the linear layers; norms have vectors
    values = (each["output"], each["input gradient"], min(weights), sum(weights) / len(weights))
    return dict(zip(FIGURES, values, strict=True))


def references(size: Any, device: str) -> dict[str, Tensors]:
    """Per case: output and gradients in fp32, on the CPU."""
    model = make(Blocks, size, device).float()
    made = {}
    for case in CASES:
        x, dy = batch(case, size, device)
        found = tensors(Compiled(model, lambda: None), model, x.detach().float().requires_grad_(), dy.float(), 1)
        made[case] = {name: value.cpu() for name, value in found.items()}
    return made


def attempt(name: str, size: Any, options: Any, wanted: dict[str, Tensors]) -> Row:
    row: Row = {"candidate": name}
    try:
        model = make(Blocks, size, options.device)
        run = compiled(name, model, options.inner)
        for case in CASES:
            steps = 20 if name == "delayed" else 1
            row[case] = figures(wanted[case], tensors(run, model, *batch(case, size, options.device), steps))
    except Exception as error:  # torchao is not installed, a kernel fails: part of the table
        row["error"] = error_text(error)
    return row


def value(row: Row, case: str, key: str) -> float:
    """In dB; NaN for what JSON holds as null."""
    found = row[case][key]
    return math.nan if found is None else found


def line(row: Row) -> str:
    if "error" in row:
        return f"{row['candidate']:<28} {row['error']}"
    return f"{row['candidate']:<28}" + "".join(f"{value(row, case, key):9.1f}" for case in CASES for key in FIGURES)


def bars(rows: list[Row]) -> list[Bar]:
    found = {row["candidate"]: row for row in rows}
    made = []
    for name, peer in PEERS.items():
        row, other = found.get(name), found.get(peer)
        label = f"{name} minus {peer}"
        if row is None or "error" in row:
            made.append(Bar(f"{label}, dB", None if row is None else math.nan, -TOLERANCE))
            continue
        if other is not None and "error" not in other:
            differences = {f"{case} {key}": value(row, case, key) - value(other, case, key) for case, key in JUDGED}
        else:
            label += " as measured earlier"
            differences = {key: value(row, "even", key) - known for key, known in zip(FIGURES, EARLIER[peer], strict=True)}
        worst = min(differences, key=lambda key: (not math.isnan(differences[key]), differences[key]))
        made.append(Bar(f"{label}, lowest of {len(differences)} ({worst}), dB", differences[worst], -TOLERANCE))
    return made


def draw(figure: Any, rows: list[Row]) -> None:
    """Grouped bars: one group per figure of each case, one colour per candidate."""
    shown = [row for row in rows if "error" not in row]
    figure.set_size_inches(9, 6)
    for axes, case in zip(figure.subplots(2, 1), CASES, strict=True):
        for i, row in enumerate(shown):
            width = 1 / (len(shown) + 1.5)
            places = [k + i * width for k in range(len(FIGURES))]
            axes.bar(places, [value(row, case, key) for key in FIGURES], width, label=row["candidate"])
        axes.set_xticks([k + 0.4 for k in range(len(FIGURES))], FIGURES)
        axes.set_ylabel(f"SQNR, dB ({case})")
    figure.axes[0].legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--candidates", nargs="+", type=candidate, default=list(CANDIDATES), help="names of candidates.py")
    made.add_argument("--inner", help="what compiles: inductor, on a CPU eager")
    options = made.parse_args(argv)
    options.device = device_for(options, made)
    options.inner = options.inner or ("inductor" if options.device == "cuda" else "eager")
    size = TINY if options.tiny else LLAMA
    report = Report("accuracy", options, options.device, ("candidate",))
    print(f"{'SQNR against fp32, dB':<28}" + "".join(f"{case + ' ' + word:>9}" for case in CASES for word in ("y", "dx", "dw<", "dw~")))
    if report.measures:
        torch.backends.cuda.matmul.allow_tf32 = False
        wanted = references(size, options.device)
        for name in options.candidates:
            report.add(row := attempt(name, size, options, wanted))
            print(line(row), flush=True)
            gc.collect()
            torch._dynamo.reset()
    else:
        print("\n".join(map(line, report.rows)))
    return report.finish(bars(report.rows), draw)


if __name__ == "__main__":
    sys.exit(main())
