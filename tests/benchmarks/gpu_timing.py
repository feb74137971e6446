"""Timing of kernels, for the benchmarks beside this file.

On a GPU each candidate is captured into a CUDA graph of several calls, so that what the host does per launch does not count. The
candidates take turns, so that temperature treats them alike. The figure is the median over the rounds. On a CPU, where a
benchmark only shows that it runs, calls are timed one by one.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
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
    if not torch.cuda.is_available():
        return {name: _on_cpu(calls) for name, calls in candidates.items()}
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


def _on_cpu(calls: list[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def host_microseconds(call: Call, count: int = 200) -> float:
    """Host time to launch `call` once, the GPU not being waited for: the least of five runs of `count` calls."""
    call()
    found = []
    for _ in range(5):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        found.append(1e6 * (time.perf_counter() - start) / count)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return min(found)
