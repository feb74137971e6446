"""Two gloo processes against one with the batch joined. The processes run every case of ddp_worker.py once; tests read what they saw."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import ddp_worker

import fp8fx
from fp8fx.distributed import Processes

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-P", ddp_worker.__file__]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet)
        for rank in range(ddp_worker.WORLD)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ddp_worker.WORLD)]


def same(a: dict[str, Tensor], b: dict[str, Tensor], keys: Any = None) -> list[str]:
    """Names of what differs."""
    assert a.keys() == b.keys()
    return [key for key in keys or a if not torch.equal(a[key], b[key])]


def alone(steps: int) -> dict[str, Tensor]:
    model = ddp_worker.Exact()
    fast = fp8fx.compile(model, "delayed")
    ddp_worker.train_exact(fast, model, ddp_worker.exact_batches(steps), 0, 1)
    return ddp_worker.copied(fast)


def test_equals_one_process_exactly_where_sums_are_exact(seen: Seen) -> None:
    one = alone(5)
    assert sum(key.endswith(".history") for key in one) == 6  # input, weight and grad_output of two layers
    for rank in range(2):
        assert same(one, seen[rank]["exact"]) == []  # weights, scales, histories, amax, stream: all of it, bit for bit


def test_equals_one_process_on_text(seen: Seen) -> None:
    """Gradients are summed in another order, so weights differ in their last bits, and an element may now and then round to the next code.

    The two processes are equal bit for bit. Scales equal those of one process exactly, histories to 1e-3 (measured: exactly). Weights: the
    distance is below 1e-3 of the one that training moved them (measured: 1e-7).
    """
    start = ddp_worker.copied(ddp_worker.text_model())
    model = ddp_worker.text_model()
    fast = ddp_worker.compiled_text(model)
    ddp_worker.train_text(fast, model, 6, 0, 1)
    one, two = ddp_worker.copied(fast), seen[0]["text"]
    assert same(two, seen[1]["text"]) == []
    scales = [key for key in one if key.endswith(".scale")]
    assert len(scales) > 10
    assert same(one, two, scales) == []
    for key in one:
        if key.endswith(".history"):
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=0.0)
    apart = sum((two[key] - one[key]).square().sum() for key in start).sqrt()
    moved = sum((one[key] - start[key]).square().sum() for key in start).sqrt()
    assert apart <= 1e-3 * moved


def test_apart_means_apart(seen: Seen) -> None:
    """What the exchange is for: without it the processes follow different amax."""
    differ = same(seen[0]["apart"], seen[1]["apart"])
    assert any(key.endswith("input.history") for key in differ)


def test_a_named_group_without_ddp(seen: Seen) -> None:
    model = ddp_worker.Exact()
    fast = fp8fx.compile(model, "delayed")
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-10)
    for x in ddp_worker.exact_batches(3):
        (fast(x) - 1000.0).abs().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(2):
        assert same(ddp_worker.copied(fast), seen[rank]["named_group"]) == []


def test_a_state_saved_by_one_process_restores_all(seen: Seen) -> None:
    for rank in range(2):
        assert same(seen[rank]["resumed"], seen[0]["exact"]) == []


def test_calibration_is_exchanged_at_the_next_call(seen: Seen) -> None:
    (early, first), (_, second) = seen[0]["calibrated"], seen[1]["calibrated"]
    assert same(first, second, [key for key in first if not key.endswith(".amax")]) == []  # that of the next step is still its own
    history = [key for key in first if key.endswith("history")]
    assert all((first[key][0] > 0) and (first[key][1] == 0) for key in history)  # counted once
    assert all(early[key][0] > 0 for key in history)  # what one process saves before is its own
    assert all(first[key][0] >= early[key][0] for key in history)


def test_records_that_only_one_process_has(seen: Seen) -> None:
    first, second = seen[0]["branches"], seen[1]["branches"]
    assert first.keys() == second.keys()
    assert same(first, second) == []
    weight = first["_fp8fx.b.weight.history"]
    assert [float(v) > 0 for v in weight[:3]] == [True, False, False]  # due: the third step enters at the next forward
    assert torch.equal(first["_fp8fx.b.input.amax"], torch.tensor(4.0))  # 1 + rank + step, of the second process


def test_processes_of_different_recipes_are_refused(seen: Seen) -> None:
    for rank in range(2):
        message = seen[rank]["other_recipe"]
        assert "the processes of one group train under different recipes: input of 'down' is e4m3fn" in message
        assert "in process 0 and e5m2" in message
        assert "in process 1" in message


def test_each_process_draws_its_own_bits(seen: Seen) -> None:
    first, second = seen[0]["random_bits"], seen[1]["random_bits"]
    assert not torch.equal(first, second)
    model = ddp_worker.Exact()
    fast = fp8fx.compile(model, "direct")
    (fast(torch.linspace(-1, 1, 32).view(2, 16)) * torch.linspace(0.9, 1.1, 16).view(2, 8)).sum().backward()
    assert torch.equal(model.up.weight.grad, first)  # the first process draws what one process alone draws


def test_graphs_stay_whole(seen: Seen) -> None:
    """Cut at the borders of DDP's buckets, a graph's weights had no names: none had a delayed scale."""
    for rank in range(2):
        graphs, names = seen[rank]["buckets"]
        assert graphs == 1
        assert {f"_fp8fx.{layer}.weight.scale" for layer in range(3)} <= set(names)


def test_reduce_amax_says_what_it_takes() -> None:
    model = torch.nn.Linear(4, 4)
    fast = fp8fx.compile(model, "delayed")
    with pytest.raises(fp8fx.ModelError, match="not compiled by fp8fx"):
        fp8fx.reduce_amax(model)
    with pytest.raises(fp8fx.ModelError, match="before init_process_group"):
        fp8fx.reduce_amax(fast, torch.distributed.group.WORLD)
    with pytest.raises(fp8fx.ModelError, match="got 'world'"):
        fp8fx.reduce_amax(fast, "world")
    fp8fx.reduce_amax(fast, "none")
    fp8fx.reduce_amax(fast)
    assert Processes().enter(weakref.ref(fast)) == 0
