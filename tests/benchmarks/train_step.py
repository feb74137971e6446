"""Time and memory of a training step in FP8 over torch.compile in bf16: two Llama-3-8B blocks, and TransformerEngine's quickstart layer.

    python tests/benchmarks/train_step.py --json out.json --picture out.svg
    python tests/benchmarks/train_step.py --rows '4x2048/*' '8x2048/hybrid' --limit 540
    python tests/benchmarks/train_step.py --profile 4x2048/delayed

A step is forward and backward, and what the next step's scales need; no optimizer. One model at a time is alive. A row is a group
(tokens, and what it is compared with) and a candidate (see candidates.py). Each group times its baseline first and last; speed-ups
are over the mean of the two. Times are wall clock around a synchronized region of several steps, the median of the rounds, after a
second of unmeasured steps. Peak memory is that of one step, over the baseline's. Each row of the Llama blocks is also compared with
bf16: the SQNR of the output, the input gradient and the worst weight gradient. Ratios hold within a run.
"""

from __future__ import annotations

import fnmatch
import gc
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmark_report import Bar, Report, Row, device_for, error_text, parser, refuse
from candidates import GRAPHS, compiled
from step_profile import print_profile, profiled, synchronize
from torch import Tensor, nn
from transformer_blocks import LLAMA, QUICKSTART, TINY, TINY_QUICKSTART, Blocks, Quickstart, Size, make, tokens


@dataclass(frozen=True)
class Group:
    kind: type[nn.Module]
    size: Size
    tiny: Size
    batch: int
    candidates: tuple[str, ...]  # the first is what the others are compared with


FURTHER = (
    *("delayed-fast", "hybrid-fast", "delayed-graphs", "delayed-fast-graphs", "delayed-keep-fast-graphs", "hybrid-graphs"),
    *("hybrid-fast-graphs", "hybrid-keep-fast-graphs", "direct-fast-graphs", "direct-graphs", "bf16-graphs"),
)
PEERS = ("torchao-tensorwise", "torchao-rowwise")
LARGE = ("bf16", "delayed", "hybrid", "delayed-saved", "hybrid-saved")
GROUPS = {
    "4x2048": Group(
        Blocks,
        LLAMA,
        TINY,
        4,
        (*LARGE, "rowwise", "blockwise", "blockwise-graphs", "direct-fast", "direct", "delayed-keep", *FURTHER, *PEERS),
    ),
    "8x2048": Group(Blocks, LLAMA, TINY, 8, (*LARGE, *FURTHER, *PEERS[:1])),
    "1x2048": Group(Blocks, LLAMA, TINY, 1, ("bf16", "delayed", "hybrid", "delayed-keep", *FURTHER, *PEERS[:1])),
    "eager": Group(Blocks, LLAMA, TINY, 4, ("bf16-eager", "hybrid-eager")),
    "quickstart": Group(Quickstart, QUICKSTART, TINY_QUICKSTART, 4, ("bf16", "delayed", "hybrid", *FURTHER, *PEERS[:1])),
}
SPEED = {  # row -> least speed-up
    "4x2048/delayed": 1.58, "8x2048/delayed": 1.88, "8x2048/hybrid": 1.75, "4x2048/hybrid": 1.50, "4x2048/rowwise": 1.30,
    "4x2048/direct-fast": 1.45, "4x2048/direct": 1.35, "1x2048/delayed": 1.42, "1x2048/hybrid": 1.34, "eager/hybrid-eager": 1.38,
    "quickstart/delayed": 1.50,
}  # fmt: skip
MEMORY = {"4x2048/hybrid": 1.00, "8x2048/hybrid": 0.93, "4x2048/hybrid-saved": 0.89, "8x2048/hybrid-saved": 0.81}  # row -> largest peak


class Step:
    """Forward and backward of one candidate. Raises what building the candidate raises."""

    def __init__(self, name: str, group: Group, options: Any) -> None:
        size = group.tiny if options.tiny else group.size
        self.model = make(group.kind, size, options.device)
        self.x, dy = tokens(size, group.batch, options.device)
        self.compiled = compiled(name, self.model, options.inner, None if name.startswith(("bf16", "torchao")) else options.inner_mode)
        self.dy = dy * self.compiled.loss_scale

    def __call__(self) -> Tensor:
        for tensor in (self.x, *self.model.parameters()):
            tensor.grad = None
        y = self.compiled.run(self.x)
        y.backward(self.dy)
        self.compiled.step()
        return y

    def tensors(self) -> dict[str, Tensor]:
        """Output and gradients after three steps, which delayed scales need to follow; on the CPU."""
        for _ in range(3):
            y = self()
        unscaled = 1 / self.compiled.loss_scale  # a power of two
        gradients = {"input gradient": self.x.grad, **{name: p.grad for name, p in self.model.named_parameters()}}
        return {"output": y.detach().cpu(), **{name: (g * unscaled).cpu() for name, g in gradients.items() if g is not None}}


def sqnr(wanted: Tensor, found: Tensor, device: str) -> float:
    a, b = wanted.to(device).float(), found.to(device).float()
    return float(20 * torch.log10(a.norm() / (a - b).norm()))


def quality(reference: dict[str, Tensor], found: dict[str, Tensor], device: str) -> dict[str, float]:
    each = {key: sqnr(reference[key], found[key], device) for key in reference}
    weights = [value for key, value in each.items() if reference[key].dim() == 2]
    return {"output_db": each["output"], "input_gradient_db": each["input gradient"], "weight_gradient_db": min(weights)}


def milliseconds(step: Step, options: Any) -> float:
    """Median over the rounds of the wall clock per step. Fewer rounds of fewer steps where they would take over ten seconds."""
    start, warm = time.perf_counter(), 0
    while warm < 3 or (time.perf_counter() - start < 1 and not options.tiny):
        step()
        synchronize(options.device)
        warm += 1
    each = (time.perf_counter() - start) / warm
    rounds, steps = (options.rounds, options.steps) if each * options.rounds * options.steps < 10 else (3, 1)
    found = []
    for _ in range(rounds):
        synchronize(options.device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(options.device)
        found.append(1e3 * (time.perf_counter() - start) / steps)
    return statistics.median(found)


def measure(name: str, group: Group, options: Any, reference: dict[str, Tensor] | None) -> tuple[Row, dict[str, Tensor]]:
    step = Step(name, group, options)
    values = step.tensors()
    row: Row = {"finite": all(bool(value.isfinite().all()) for value in values.values())}
    if reference is not None and group.kind is Blocks:  # with dropout, no two candidates draw the same
        row |= quality(reference, values, options.device)
    if options.device == "cuda" and not name.endswith(GRAPHS):  # the pool of a CUDA graph is not counted as allocated
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    row["ms"] = milliseconds(step, options)
    return row, values


def release(device: str) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # each candidate's peak has its own
        torch.cuda.empty_cache()


def attempt(name: str, group: Group, options: Any, reference: dict[str, Tensor] | None) -> tuple[Row, dict[str, Tensor] | None]:
    """The row of one candidate, or one that holds its error: the others go on."""
    values, start = None, time.perf_counter()
    try:
        row, values = measure(name, group, options, reference)
    except Exception as error:  # out of memory, a refused recipe, a kernel that fails: part of the table
        row = {"error": error_text(error)}
    release(options.device)
    return row | {"seconds": time.perf_counter() - start}, values


def with_ratios(rows: list[Row]) -> None:
    """Set speed-up and memory of every row, over the mean time and the least peak of its group's baselines."""
    for row in rows:
        base = [other for other in rows if other["group"] == row["group"] and other["baseline"] and "ms" in other]
        if not base or "ms" not in row:
            continue
        row["speed_up"] = statistics.mean(other["ms"] for other in base) / row["ms"]
        if row.get("peak_gib"):
            row["memory"] = row["peak_gib"] / min(other["peak_gib"] for other in base)


def line(row: Row) -> str:
    name = f"{row['group']}/{row['candidate']}"
    if "ms" not in row:
        return f"{name:<28} {row.get('error') or 'no figures'}"
    db = "  ".join(f"{row[f'{k}_db']:.1f}" for k in ("output", "input_gradient", "weight_gradient") if row.get(f"{k}_db") is not None)
    peak = f"{row['peak_gib']:6.2f} GiB x{row['memory']:.3f}" if "memory" in row else ""
    ratio = f"x{row['speed_up']:.3f}" if "speed_up" in row else ""
    finite = "" if row["finite"] else "  NOT FINITE"
    return f"{name:<28} {row['ms']:8.2f} ms {ratio}  {peak}  {db and db + ' dB'}{finite}"


def run_group(name: str, wanted: list[str], options: Any, report: Report) -> None:
    """The baseline, the candidates wanted, and the baseline again."""
    group = GROUPS[name]
    base, reference = group.candidates[0], None
    last = [base] if len(wanted) > 1 and not options.once else []
    for candidate in [base, *(c for c in wanted if c != base), *last]:
        if options.limit and time.perf_counter() - options.start > options.limit:
            print(f"{name}/{candidate}: not started, --limit {options.limit:.0f} s is over")
            continue
        row, values = attempt(candidate, group, options, reference)
        reference = reference or values
        again = any(r["group"] == name and r["candidate"] == base for r in report.rows)
        label = f"{candidate}-again" if candidate == base and again else candidate
        row = {"group": name, "candidate": label, "baseline": candidate == base, **row}
        report.add(row)
        with_ratios(report.rows)
        report.save()
        print(line(row), flush=True)


def selected(patterns: Sequence[str] | None) -> dict[str, list[str]]:
    """Group -> candidates, for `group/candidate` patterns; a group alone means all of it. SystemExit for one that matches nothing."""
    names = [f"{group}/{candidate}" for group, made in GROUPS.items() for candidate in made.candidates]
    found: dict[str, list[str]] = {}
    for pattern in patterns or ["*"]:
        hits = [name for name in names if fnmatch.fnmatch(name, pattern if "/" in pattern or pattern == "*" else f"{pattern}/*")]
        if not hits:
            refuse(f"no row {pattern!r}; there are {', '.join(names)}")
        for name in hits:
            group, candidate = name.split("/")
            if candidate not in found.setdefault(group, []):
                found[group].append(candidate)
    return found


def bars(rows: list[Row], selection: dict[str, list[str]] | None) -> list[Bar]:
    """selection: the rows that were asked for, which must have figures; None: what is there."""
    by_name = {f"{row['group']}/{row['candidate']}": row for row in rows}

    def value(name: str, key: str) -> float | None:
        group, candidate = name.split("/")
        row = by_name.get(name)
        if row is None or (selection is not None and candidate not in selection.get(group, [])):
            return None
        if key == "memory" and "ms" in row and "peak_gib" not in row:  # measured where there is no GPU memory
            return None
        return row.get(key, math.nan)

    speed = [
        Bar(f"{name} over {GROUPS[name.split('/')[0]].candidates[0]}, speed", value(name, "speed_up"), least)
        for name, least in SPEED.items()
    ]
    return speed + [Bar(f"{name}, peak memory over bf16", value(name, "memory"), most, at_most=True) for name, most in MEMORY.items()]


def draw(figure: Any, rows: list[Row]) -> None:
    """Bars of speed-up per group; a mark where the issue's bar lies."""
    shown = [row for row in rows if "speed_up" in row and not row["baseline"]]
    shown.sort(key=lambda row: (list(GROUPS).index(row["group"]), row["candidate"]))
    names = [f"{row['group']}/{row['candidate']}" for row in shown]
    axes = figure.add_subplot()
    figure.set_size_inches(8, 1 + 0.28 * max(len(shown), 4))
    colors = ["#999999" if row["candidate"].startswith("torchao") else "#2b6cb0" for row in shown]
    axes.barh(names, [row["speed_up"] for row in shown], color=colors)
    for i, name in enumerate(names):
        if name in SPEED:
            axes.plot([SPEED[name]] * 2, [i - 0.4, i + 0.4], color="#c53030", linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("forward + backward, times the speed of bf16 (grey: torchao; red: the bar)")


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--rows", nargs="+", help="`group`, `group/candidate`, with wildcards")
    made.add_argument("--inner", help="what compiles: inductor, on a CPU eager")
    made.add_argument("--inner-mode", help="a torch.compile mode for the FP8 candidates: reduce-overhead")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--steps", type=int, default=5, help="of a round")
    made.add_argument("--once", action="store_true", help="time the baseline first only")
    made.add_argument("--limit", type=float, help="seconds after which no further candidate starts")
    made.add_argument(
        "--profile", nargs="+", metavar="ROW", help="instead of timing: the kernels of a step of these rows, and its launch time"
    )
    options = made.parse_args(argv)
    options.device, options.start = device_for(options, made), time.perf_counter()
    options.inner = options.inner or ("inductor" if options.device == "cuda" else "eager")
    options.rounds, options.steps = (1, 1) if options.tiny else (options.rounds, options.steps)
    if options.profile:
        return profile_rows(selected(options.profile), options)
    report, selection = Report("train_step", options, options.device, ("group", "candidate")), None
    if report.measures:
        selection = selected(options.rows)
        for name, wanted in selection.items():
            run_group(name, wanted, options, report)
    if report.measures:  # rows put together from several runs keep the ratios of their own
        with_ratios(report.rows)
    print()
    for row in report.rows:
        print(line(row))
    return report.finish(bars(report.rows, selection), draw)


def profile_rows(selection: dict[str, list[str]], options: Any) -> int:
    """Print the profile of each row; with --json, write them."""
    report = Report("train_step profile", options, options.device, ("group", "candidate"))
    for name, wanted in selection.items():
        for candidate in wanted:
            step = Step(candidate, GROUPS[name], options)
            found = profiled(step, options.device)
            print_profile(f"{name}/{candidate}", found)
            report.add({"group": name, "candidate": candidate, **found})
            del step
            release(options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
