"""fp8fx.Statistics: every figure recomputed here in numpy and ml_dtypes; the files after a kill; what cannot be written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fp8fx
from fp8fx import sinks, tally
from fp8fx.ops import observe

FORMATS = {"e4m3fn": (ml_dtypes.float8_e4m3fn, 464.0), "e5m2": (ml_dtypes.float8_e5m2, 61440.0)}  # and half a step past the largest


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_place(path: Path, step: int) -> dict[str, dict[str, Any]]:
    return {f"{line['layer']}.{line['role']}": line for line in lines(path) if line["step"] == step}


def shares(x: Tensor, format: str, scale: float) -> tuple[float, float]:
    """Underflow and overflow of `x` under one scale, independent of fp8fx."""
    kind, reach = FORMATS[format]
    values = x.detach().double().numpy() / scale
    codes = np.clip(values, -float(ml_dtypes.finfo(kind).max), float(ml_dtypes.finfo(kind).max)).astype(kind).astype(np.float64)
    nonzero = values != 0
    return float((nonzero & (codes == 0)).sum() / max(nonzero.sum(), 1)), float((np.abs(values) > reach).mean())


def train(fast: nn.Module, inputs: list[Tensor], statistics: fp8fx.Statistics | None = None) -> None:
    optimizer = torch.optim.SGD(fast.parameters(), lr=1e-6)
    for x in inputs:
        optimizer.zero_grad()
        fast(x).mean().backward()
        optimizer.step()
        if statistics is not None:
            statistics.step()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def growing(steps: int) -> list[Tensor]:
    """Each ten times as large as the one before, with elements far below the largest: both ends of the range are left."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(64, 16, generator=generator) ** 9 * 10.0**step for step in range(steps)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("recipe", ["delayed", "hybrid"])
def test_figures_are_those_of_the_tensors(recipe: str, inner: str, tmp_path: Path) -> None:
    plain = model()
    fast = fp8fx.compile(plain, recipe, inner=inner)
    inputs = growing(4)
    path = tmp_path / "fp8.jsonl"
    with fp8fx.Statistics(fast, jsonl=path, every=2) as statistics:
        train(fast, inputs[:3], statistics)
        weight = plain[0].weight.detach().clone()
        train(fast, inputs[3:], statistics)
    assert {line["step"] for line in lines(path)} == {2, 4}
    found = by_place(path, 4)
    assert set(found) == {f"{layer}.{role}" for layer in "02" for role in ("input", "weight", "grad_output")}
    for place, x in (("0.input", inputs[3]), ("0.weight", weight)):
        assert found[place]["amax"] == x.abs().max().item()
        assert (found[place]["underflow"], found[place]["overflow"]) == pytest.approx(shares(x, "e4m3fn", found[place]["scale"]), abs=1e-9)
    assert found["0.input"]["underflow"] > 0.05
    assert (found["0.input"]["overflow"] > 0) == (recipe == "delayed")  # the scale of a step before against ten times as much
    if recipe == "hybrid":
        assert found["0.input"]["scale"] == pytest.approx(inputs[3].abs().max().item() / 448, rel=1e-6)


def test_gradients(tmp_path: Path) -> None:
    """dY of the last layer is known: 2 y / n. Under direct, too large a loss scale overflows to inf."""
    plain = model()
    fast = fp8fx.compile(plain, {"extends": "direct", "defaults": {"output": "none"}})
    seen: list[Tensor] = []
    fast.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    for scale in (1.0, 2.0**30):
        path = tmp_path / f"{scale}.jsonl"
        with fp8fx.Statistics(fast, jsonl=path, every=1, start=0) as statistics:
            x = torch.randn(64, 16)
            (fast(x).square().mean() * scale).backward()
            statistics.step()
        grad = 2 * seen[-1] / seen[-1].numel() * scale
        found = by_place(path, 1)["2.grad_output"]
        assert found["amax"] == pytest.approx(grad.abs().max().item(), rel=1e-6)
        assert found["overflow"] == pytest.approx(shares(grad, "e5m2", 1.0)[1], abs=0.02)  # rounding is stochastic: an edge either way
        assert (found["overflow"] > 0.5) == (scale > 1)


def test_several_scales(tmp_path: Path) -> None:
    fast = fp8fx.compile(model(), "rowwise")
    with fp8fx.Statistics(fast, jsonl=tmp_path / "s.jsonl", every=1) as statistics:
        train(fast, growing(1), statistics)
    found = by_place(tmp_path / "s.jsonl", 1)
    assert 0 < found["0.input"]["scale_min"] < found["0.input"]["scale"]


def test_microbatches_are_one_step_and_evaluation_is_none(tmp_path: Path) -> None:
    fast = fp8fx.compile(model(), "hybrid")
    x = torch.randn(8, 16)
    with fp8fx.Statistics(fast, jsonl=tmp_path / "s.jsonl", every=1) as statistics:
        for part in (x[:4], 3 * x[4:]):
            fast(part).sum().backward()
        with torch.no_grad():
            fast(100 * x)
        fast.eval()
        fast(100 * x)
        fast.train()
        statistics.step()
    found = by_place(tmp_path / "s.jsonl", 1)
    assert found["0.input"]["amax"] == max(x[:4].abs().max(), (3 * x[4:]).abs().max())


def test_models_of_one_class_keep_apart(tmp_path: Path) -> None:
    """Same layer names, one backward through both, another model beside them: each tensor is counted where it belongs."""
    both = nn.ModuleDict({"first": fp8fx.compile(model(), "hybrid"), "second": fp8fx.compile(model(), "hybrid")})
    other = fp8fx.compile(model(), "hybrid")
    x = torch.randn(8, 16)
    with fp8fx.Statistics(both, jsonl=tmp_path / "s.jsonl", every=1) as statistics:
        (both["first"](x).sum() + both["second"](2 * x).sum() * 16 + other(1000 * x).sum() * 1024).backward()
        statistics.step()
    found = by_place(tmp_path / "s.jsonl", 1)
    assert len(found) == 12
    assert found["second.0.input"]["amax"] == 2 * found["first.0.input"]["amax"] == 2 * x.abs().max().item()
    assert found["first.2.grad_output"]["amax"] == 1.0
    assert found["second.2.grad_output"]["amax"] == 16.0


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    ended = []
    for every in (1, 1000):
        fast = fp8fx.compile(model(), "direct")
        with fp8fx.Statistics(fast, jsonl=tmp_path / f"{every}.jsonl", every=every) as statistics:
            train(fast, growing(3), statistics)
        ended.append(fast.state_dict())
    assert all(torch.equal(ended[0][key], ended[1][key]) for key in ended[0])
    assert len(lines(tmp_path / "1.jsonl")) > 20
    assert lines(tmp_path / "1000.jsonl") == []


def test_nobody_looks_in_steps_that_are_not_written(tmp_path: Path) -> None:
    fast = fp8fx.compile(model(), "hybrid")
    looking = []
    statistics = fp8fx.Statistics(fast, jsonl=tmp_path / "s.jsonl", every=3)
    for x in growing(6):
        looking.append(len(observe.OBSERVERS))
        train(fast, [x], statistics)
    statistics.close()
    assert looking == [0, 0, 1, 0, 0, 1]
    assert observe.OBSERVERS == []


def test_counting_goes_on_where_the_model_stands(tmp_path: Path) -> None:
    fast = fp8fx.compile(model(), "delayed")
    train(fast, growing(3))
    again = fp8fx.compile(model(), "delayed")
    again.load_state_dict(fast.state_dict())
    with fp8fx.Statistics(again, jsonl=tmp_path / "s.jsonl", every=2) as statistics:
        train(again, growing(3), statistics)
    assert {line["step"] for line in lines(tmp_path / "s.jsonl")} == {4, 6}


def test_the_bare_backend(tmp_path: Path) -> None:
    compiled = torch.compile(model(), backend="fp8fx", options={"recipe": "hybrid"})
    with pytest.raises(fp8fx.ModelError, match="must have been called once"):
        fp8fx.Statistics(compiled, jsonl=tmp_path / "s.jsonl")  # type: ignore[arg-type]
    compiled(torch.randn(2, 16))
    with fp8fx.Statistics(compiled, jsonl=tmp_path / "s.jsonl", every=1) as statistics:  # type: ignore[arg-type]
        compiled(torch.randn(2, 16)).sum().backward()
        statistics.step()
    assert set(by_place(tmp_path / "s.jsonl", 1)) >= {"0.input", "0.weight", "2.grad_output"}


class Writer:
    """What a SummaryWriter has."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.values[tag, step] = value


def test_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fast, writer = fp8fx.compile(model(), "hybrid"), Writer()
    with fp8fx.Statistics(fast, tensorboard=writer, every=1) as one, fp8fx.Statistics(fast, tensorboard=tmp_path, every=1) as two:
        fast(torch.ones(2, 16)).sum().backward()
        one.step()
        two.step()
    assert writer.values["fp8/0/input/amax", 1] == 1.0
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert {(tag, 1) for tag in events.Tags()["scalars"]} == set(writer.values)
    for (tag, _), value in writer.values.items():
        assert events.Scalars(tag)[0].value == pytest.approx(value, rel=1e-6)


def test_missing_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(fp8fx.FP8Error, match=r"pip install tensorboard, or 'fp8fx\[trainers\]'"):
        fp8fx.Statistics(fp8fx.compile(model(), "hybrid"), tensorboard=tmp_path)


def record(step: int) -> sinks.Record:
    return sinks.Record(step, "layer", "input", tally.Figures("e4m3fn", 1.0, 0.5, 0.5, 0.0, 0.0))


def test_a_line_that_was_cut_off_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    sinks.JsonLines(path).write([record(1), record(2)])
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        sinks.JsonLines(path).write([record(2)])
        assert path.read_bytes() == whole
    path.write_text("somebody else's last line")
    sinks.JsonLines(path).write([record(1)])
    assert path.read_text().splitlines()[0] == "somebody else's last line"
    assert json.loads(path.read_text().splitlines()[1])["step"] == 1


def test_a_full_disk_does_not_end_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = sinks.JsonLines(tmp_path / "s.jsonl")
    sink.write([record(1)])
    write, calls = os.write, []

    def half(file: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.warns(fp8fx.FP8Warning, match="the statistics of step 2 could not be written .* No space left on device"):
        sink.write([record(2)])
    monkeypatch.undo()
    sink.write([record(3)])
    assert [line["step"] for line in lines(tmp_path / "s.jsonl")] == [1, 3]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    fast = fp8fx.compile(model(), "hybrid")
    (tmp_path / "file").touch()
    with pytest.raises(fp8fx.FP8Error, match=r"statistics cannot be written to .*file.s\.jsonl"):
        fp8fx.Statistics(fast, jsonl=tmp_path / "file" / "s.jsonl")
    with pytest.raises(fp8fx.FP8Error, match="Is a directory"):
        fp8fx.Statistics(fast, jsonl=tmp_path)
    with pytest.raises(fp8fx.FP8Error, match="statistics cannot be written to the folder"):
        fp8fx.Statistics(fast, tensorboard=tmp_path / "file" / "runs")


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    fast = fp8fx.compile(model(), "hybrid")
    with pytest.raises(fp8fx.ModelError, match="nowhere to write"):
        fp8fx.Statistics(fast)
    with pytest.raises(fp8fx.ModelError, match="from 1 on; got 0"):
        fp8fx.Statistics(fast, jsonl=tmp_path / "s.jsonl", every=0)
    with pytest.raises(fp8fx.ModelError, match="holds no module that is"):
        fp8fx.Statistics(model(), jsonl=tmp_path / "s.jsonl")
    with pytest.raises(fp8fx.ModelError, match=r"something with add_scalar\), got int"):
        fp8fx.Statistics(fast, tensorboard=3)
    assert not (tmp_path / "s.jsonl").exists()
