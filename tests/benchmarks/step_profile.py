"""Where the time of a training step goes: kernels by GPU time, how long the GPU is busy, how long the host takes to launch the step."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 4


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def launch_ms(step: Callable[[], Any], device: str) -> float:
    """Host milliseconds until a step has been launched, the GPU idle before it: median of 7. On a CPU, all of the step."""
    found = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - start))
    synchronize(device)
    return statistics.median(found)


def busy(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profiled(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """{launch_ms, busy_ms, span_ms, idle_ms, kernels: [{name, ms, count}] by time}, per step. On a CPU, operators stand for kernels.

    span_ms counts the wait before the steps too; idle_ms is what a step in their midst is not busy: the median over the inner ones.
    """
    for _ in range(3):
        step()
    launch = launch_ms(step, device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        synchronize(device)
    times, counts, intervals = defaultdict[str, float](float), defaultdict[str, int](int), []
    for event in profiler.events():
        if not _is_work(event, device):
            continue
        stop = event.time_range.end
        times[event.name] += event.self_cpu_time_total if device == "cpu" else stop - event.time_range.start
        counts[event.name] += 1
        intervals.append((event.time_range.start, stop))
    kernels = [
        {"name": name, "ms": times[name] / STEPS / 1e3, "count": counts[name] / STEPS} for name in sorted(times, key=times.get)[::-1]
    ]  # type: ignore[arg-type]
    span = max((stop for _, stop in intervals), default=0.0) - min((start for start, _ in intervals), default=0.0)
    figures = {
        "launch_ms": launch,
        "busy_ms": busy(intervals) / STEPS / 1e3,
        "span_ms": span / STEPS / 1e3,
        "idle_ms": idle(intervals) / 1e3,
    }
    return figures | {"kernels": kernels}


def idle(intervals: list[tuple[float, float]]) -> float:
    """Of a step, from its first kernel to the next step's, what no kernel fills: the median over all but the first and the last."""
    ordered = sorted(intervals)
    each = len(ordered) // STEPS
    steps = [ordered[i * each : (i + 1) * each + 1] for i in range(1, STEPS - 1)] if each else []
    return statistics.median([step[-1][0] - step[0][0] - busy(step[:-1]) for step in steps] or [0.0])


def _is_work(event: Any, device: str) -> bool:
    """A kernel or a copy on the GPU: no operator that launched it, and no annotation that spans several."""
    if device == "cpu":
        return event.device_type == DeviceType.CPU and not event.name.startswith(("##", "Torch-Compiled"))
    if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
        return False
    return not event.name.startswith(("##", "Torch-Compiled", "ProfilerStep", "CompiledFunction"))


def print_profile(name: str, found: dict[str, Any], top: int = 25) -> None:
    total = sum(kernel["ms"] for kernel in found["kernels"])
    print(
        f"{name}: GPU busy {found['busy_ms']:.2f} ms a step (sum over kernels {total:.2f}, first to last {found['span_ms']:.2f}),", end=" "
    )
    print(f"idle for {found['idle_ms']:.2f};", end=" ")
    print(f"the host launches it in {found['launch_ms']:.2f} ms; {sum(k['count'] for k in found['kernels']):.0f} kernels")
    print(f"{'ms':>9} {'share':>6} {'count':>7}  kernel")
    for kernel in found["kernels"][:top]:
        print(f"{kernel['ms']:9.3f} {kernel['ms'] / (total or 1):6.1%} {kernel['count']:7.1f}  {kernel['name'][:110]}", flush=True)
