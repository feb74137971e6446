"""Timing on a GPU, for the benchmarks beside this file.

Each candidate is captured into a CUDA graph of several calls, so that what the host does per launch does not count. The
candidates take turns, so that temperature treats them alike. The figure is the median over the rounds.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


def captured(calls: Iterable[Call]) -> torch.cuda.CUDAGraph:
    """A graph of `calls`, in order; each is run once before."""
    listed = list(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in listed:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in listed:
            call()
    return graph


def interleaved(candidates: dict[str, list[Call]], rounds: int = 9, least: float = 0.03) -> dict[str, float]:
    """Median seconds per call of each candidate, a list of calls that differ in their buffers only.

    A candidate's turn lasts `least` seconds after as much unmeasured, and every round has an order of its own: at the power limit a
    kernel runs for a while at the clock that the kernel before it left. For the same reason, compare what draws alike.
    """
    graphs = {name: captured(calls) for name, calls in candidates.items()}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    shuffle = random.Random(0)
    replays, times = {}, {name: list[float]() for name in graphs}
    for i in range(-1, rounds):  # the round before the first says how long a replay takes
        for name in shuffle.sample(list(graphs), len(graphs)):
            graph, count = graphs[name], replays.get(name, 2)
            for _ in range(count):
                graph.replay()
            start.record()
            for _ in range(count):
                graph.replay()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3 / count
            if i < 0:
                replays[name] = math.ceil(least / seconds)
            else:
                times[name].append(seconds / len(candidates[name]))
    return {name: statistics.median(each) for name, each in times.items()}


def conditions() -> dict[str, str]:
    """What a figure was measured on."""
    import triton

    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def finish(bars: list[tuple[str, float, float]], rows: list[dict[str, Any]], path: Path | None) -> int:
    """Print PASS or FAIL for each (bar, value, at least), write the JSON, and return the exit status."""
    for bar, value, least in bars:
        print(f"{'PASS' if value >= least else 'FAIL'}  {bar}: {value:.3f} (at least {least})")
    if path:
        data = [{"bar": bar, "value": value, "at_least": least, "pass": value >= least} for bar, value, least in bars]
        path.write_text(json.dumps({**conditions(), "rows": rows, "bars": data}, indent=1))
    return 0 if all(value >= least for _, value, least in bars) else 1
