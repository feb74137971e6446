"""The GPU benchmarks run end to end on small sizes on the CPU, judge as they say, and read back what they write."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the benchmarks themselves run")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of 64 x 64 are no work for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of this folder as a script there would."""
    monkeypatch.syspath_prepend(str(HERE))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def rows_of(path: Path) -> list[dict[str, Any]]:
    data = json.loads(path.read_text())
    assert data["tiny"]
    assert data["machines"][0]["torch"]
    rows: list[dict[str, Any]] = data["rows"]
    return rows


def without_torchao(error: str | None) -> bool:
    """torchao is a peer, and no dependency."""
    return error is None or error.startswith("ModuleNotFoundError: No module named 'torchao'")


def test_memory_model(script: Any) -> None:
    """A weight's transposed codes are made in backward: none is alive at the peak. Activations kept in FP8 lower it."""
    size, model = script("transformer_blocks").TINY, script("memory_model")
    plain, saved = (model.peak(name, 2, size, "aot_eager") for name in ("hybrid", "hybrid-saved"))
    assert 0 < saved.peak < plain.peak
    assert any("act_linear" in label for _, label in plain.at_peak)
    assert not [label for _, label in plain.at_peak if label.startswith("fp8fx.cast.default") and "e4m3fn" in label]


def test_train_step(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, again = tmp_path / "out.json", tmp_path / "again.json"
    names = ["4x2048/torchao-tensorwise", "4x2048/direct-fast", "quickstart/delayed"]
    train_step = script("train_step")
    assert train_step.main(["--tiny", "--rows", *names, "--once", "--json", str(path), "--picture", str(tmp_path / "out.svg")]) == 0
    rows = {f"{row['group']}/{row['candidate']}": row for row in rows_of(path)}
    candidates = ["bf16", "torchao-tensorwise", "direct-fast"]
    assert set(rows) == {*(f"4x2048/{name}" for name in candidates), "quickstart/bf16", "quickstart/delayed"}
    assert all(without_torchao(row.get("error")) for row in rows.values())
    assert all(row["finite"] and row["ms"] > 0 and row["speed_up"] > 0 for row in rows.values() if "error" not in row)
    assert 25 < rows["4x2048/direct-fast"]["output_db"] < 40
    assert rows["4x2048/direct-fast"]["weight_gradient_db"] > 10  # its gradients are in the range of E5M2
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    capsys.readouterr()
    assert train_step.main(["--from-json", str(path), "--tiny", "--json", str(again)]) == 0
    assert json.loads(again.read_text())["rows"] == list(rows.values())
    assert re.search(r"(PASS|FAIL)  4x2048/direct-fast over bf16, speed: \d", text := capsys.readouterr().out)
    assert "----  8x2048/hybrid over bf16, speed: not measured (at least 1.75)" in text


def test_profile(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    assert script("train_step").main(["--tiny", "--profile", "eager/hybrid-eager", "--json", str(path)]) == 0
    (row,) = rows_of(path)
    assert 0 < row["busy_ms"] <= row["span_ms"] * 1.001
    assert any("scaled_mm" in kernel["name"] for kernel in row["kernels"])
    assert "the host launches it in" in capsys.readouterr().out


def test_idle_time_of_the_inner_steps(script: Any) -> None:
    """Four steps of two kernels: what lies between these, and before the next step. The wait after the first step counts for nothing."""
    profile = script("step_profile")
    starts = (0, 100, 120, 140)
    steps = [[(s, s + 10.0), (s + 5.0, s + 14.0)] for s in starts]
    assert profile.idle([kernel for step in steps for kernel in step]) == 6
    gap = [[(s, s + 4.0), (s + 7.0, s + 14.0)] for s in starts]
    assert profile.idle([kernel for step in gap for kernel in step][::-1]) == 9
    assert profile.idle([]) == 0


def test_rows_are_selected_by_name(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train_step = script("train_step")
    assert train_step.selected(["eager", "*/rowwise"]) == {"eager": ["bf16-eager", "hybrid-eager"], "4x2048": ["rowwise"]}
    assert list(train_step.selected(None)) == list(train_step.GROUPS)
    with pytest.raises(SystemExit):
        train_step.selected(["rowise"])
    assert "no row 'rowise'; there are 4x2048/bf16" in capsys.readouterr().err


def test_train_step_bars(script: Any) -> None:
    train_step = script("train_step")

    def row(group: str, candidate: str, ms: float, peak: float, baseline: bool = False) -> dict[str, Any]:
        return {"group": group, "candidate": candidate, "baseline": baseline, "ms": ms, "peak_gib": peak, "finite": True}

    rows = [
        row("4x2048", "bf16", 30.0, 4.0, True), row("4x2048", "delayed", 20.0, 4.0), row("4x2048", "hybrid", 23.0, 4.1),
        row("4x2048", "bf16-again", 34.0, 4.2, True), {"group": "4x2048", "candidate": "rowwise", "baseline": False, "error": "OOM"},
    ]  # fmt: skip
    train_step.with_ratios(rows)
    found = {bar.name: bar for bar in train_step.bars(rows, None)}
    assert found["4x2048/delayed over bf16, speed"].value == pytest.approx(32 / 20)
    assert found["4x2048/delayed over bf16, speed"].passed is True
    assert found["4x2048/hybrid over bf16, speed"].passed is False
    assert found["4x2048/hybrid, peak memory over bf16"].value == pytest.approx(4.1 / 4.0)
    assert found["4x2048/hybrid, peak memory over bf16"].passed is False
    assert math.isnan(found["4x2048/rowwise over bf16, speed"].value)
    assert found["4x2048/rowwise over bf16, speed"].passed is False
    assert found["8x2048/delayed over bf16, speed"].passed is None
    alone = [row("4x2048", "delayed", 20.0, 4.0)]  # its baseline failed
    train_step.with_ratios(alone)
    assert train_step.bars(alone, {"4x2048": ["delayed"]})[0].passed is False


def test_a_missed_bar_is_the_exit_status(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, accuracy = tmp_path / "accuracy.json", script("accuracy")
    figures = dict.fromkeys(accuracy.FIGURES, 30.0)
    rows = [{"candidate": name, "even": figures, "uneven": figures} for name in ("hybrid", "torchao-tensorwise", "rowwise")]
    data = {"benchmark": "accuracy", "machines": [{"device": "a GPU"}], "tiny": False, "rows": rows, "bars": []}
    path.write_text(json.dumps(data))
    assert accuracy.main(["--from-json", str(path)]) == 1
    text = capsys.readouterr().out
    assert "accuracy: device a GPU" in text
    assert "PASS  hybrid minus torchao-tensorwise, lowest of 6 (even output), dB: 0.000 (at least -0.3)" in text
    assert "FAIL  rowwise minus torchao-rowwise as measured earlier, lowest of 4 (output), dB: -9.900 (at least -0.3)" in text
    path.write_text(json.dumps({**data, "rows": rows[:2]}))
    assert accuracy.main(["--from-json", str(path)]) == 0
    assert "PASS: 1 of 3 bars measured, 0 missed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script("small_shapes").main(["--from-json", str(path)])
    assert "holds figures of accuracy, not of small_shapes" in capsys.readouterr().err


def test_later_files_win(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, paths = script("accuracy"), [tmp_path / "first.json", tmp_path / "second.json"]
    for path, value, device in zip(paths, (30.0, 31.0), ("one", "another"), strict=True):
        figures = dict.fromkeys(accuracy.FIGURES, value)
        rows = [{"candidate": name, "even": figures, "uneven": figures} for name in ("hybrid", path.stem)]
        path.write_text(json.dumps({"benchmark": "accuracy", "machines": [{"device": device}], "tiny": True, "rows": rows, "bars": []}))
    merged = tmp_path / "merged.json"
    assert accuracy.main(["--tiny", "--from-json", *map(str, paths), "--json", str(merged)]) == 0
    data = json.loads(merged.read_text())
    assert {row["candidate"]: row["even"]["output"] for row in data["rows"]} == {"hybrid": 31.0, "first": 30.0, "second": 31.0}
    assert [made["device"] for made in data["machines"]] == ["one", "another"]


def test_without_a_gpu_only_tiny_runs(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        script("train_step").main([])
    assert "there is no CUDA GPU: only --tiny and --from-json run here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("accuracy --from-json {here}/nothing.json", "nothing.json cannot be read: No such file or directory"),
        ("accuracy --from-json {here}/text", "text is not JSON: "),
        ("accuracy --from-json {here}/list", "list holds no figures of a benchmark"),
        ("accuracy --json {here}/no/out.json", "out.json: there is no folder"),
        ("accuracy --json {here}", "is a folder: name a file"),
        ("accuracy --picture {here}/no/out.svg", "out.svg: there is no folder"),
        ("accuracy --picture {here}/out.gif", "out.gif: pictures are .png or .svg"),
        ("accuracy --candidates hybrid foo", "no candidate 'foo'; there are bf16, "),
        ("accuracy --candidates hybrid-fats", "no candidate 'hybrid-fats'"),
        ("small_shapes --shapes 30:40", "argument --shapes: '30:40' holds none of the 2 sizes there are"),
        ("small_shapes --shapes 1:0", "holds none of the 2 sizes"),
        ("small_shapes --shapes a:b", "'a:b' is no slice such as 0:1"),
        ("measure_costs --transfer h200 b200", "argument --transfer: invalid choice: 'b200' (choose from "),
        ("measure_costs --json {here}/no/out.json", "out.json: there is no folder"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    for name, text in (("text", "no JSON"), ("list", "[]")):
        (tmp_path / name).write_text(text)
    name, *rest = arguments.format(here=tmp_path).split()
    with pytest.raises(SystemExit) as found:
        script(name).main(["--tiny", *rest])
    assert found.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_every_candidate_is_known(script: Any) -> None:
    known = script("candidates").candidate
    groups = script("train_step").GROUPS.values()
    for name in {*script("accuracy").CANDIDATES, *(name for group in groups for name in group.candidates)}:
        assert known(name) == name


WITHOUT_TRITON = """
import runpy, sys
sys.modules["triton"] = None
sys.argv = [sys.argv[1], "--tiny"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["gemm", "casts", "tile_sizes", "measure_costs"])
def test_without_triton(name: str) -> None:
    command = [sys.executable, "-P", "-W", "ignore", "-c", WITHOUT_TRITON, str(HERE / f"{name}.py")]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}.py: error: Triton is needed and not installed, for --tiny too: pip install ")
    assert done.stderr.count("\n") == 1


def test_accuracy(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    names = ["bf16", "torchao-rowwise", "rowwise", "direct"]
    arguments = ["--tiny", "--candidates", *names, "--json", str(path), "--picture", str(tmp_path / "a.svg")]
    assert script("accuracy").main(arguments) == 0
    rows = {row["candidate"]: row for row in rows_of(path)}
    assert all(without_torchao(row.get("error")) for row in rows.values())
    even = {name: row["even"]["lowest weight gradient"] for name, row in rows.items() if "even" in row}
    assert even["bf16"] > 35 > even["rowwise"] > 20 > even["direct"] > 10
    assert all(math.isfinite(row["uneven"]["mean weight gradient"]) for row in rows.values() if "uneven" in row)


def test_accuracy_bars(script: Any) -> None:
    accuracy = script("accuracy")

    def row(name: str, *values: float) -> dict[str, Any]:
        return {"candidate": name, **{case: dict(zip(accuracy.FIGURES, values, strict=True)) for case in accuracy.CASES}}

    rows = [row("hybrid", 39.7, 34, 19.9, 21), row("rowwise", 39.9, 36.2, 22.4, 23.7), row("torchao-tensorwise", 40, 34, 20, 21)]
    hybrid, delayed, rowwise = accuracy.bars(rows)
    assert hybrid.value == pytest.approx(-0.3)
    assert delayed.passed is None
    assert "as measured earlier, lowest of 4 (input gradient)" in rowwise.name
    assert rowwise.value == pytest.approx(-0.4)
    assert rowwise.passed is False
    rows[0]["even"]["output"] = None  # what JSON has for NaN
    assert accuracy.bars(rows)[0].passed is False


def test_small_shapes(script: Any, tmp_path: Path) -> None:
    small_shapes = script("small_shapes")
    assert len(set(small_shapes.SHAPES)) == 40
    path = tmp_path / "out.json"
    assert small_shapes.main(["--tiny", "--shapes", "0:1", "--json", str(path), "--picture", str(tmp_path / "s.svg")]) == 0
    (row,) = rows_of(path)
    assert row["errors"] == {}
    assert set(row["us"]) == {"bf16", "again", "fp8fx", "torch"}
    assert row["again_speed_up"] > 0
    assert row["decision"] == "fp8"
    rows = [
        {"decision": "fp8", "torch_speed_up": 1.3, "fp8fx_speed_up": 1.1},
        {"decision": "fp8", "torch_speed_up": 0.5, "fp8fx_speed_up": 0.99},
    ]
    assert [(bar.value, bar.passed) for bar in small_shapes.bars(rows)] == [(0.99, True), (1.0, True), (1.1, False)]


def test_turns_end_in_time(script: Any) -> None:
    """Rounds until the seconds are over, and a least number of them in any case."""
    small_shapes, calls = script("small_shapes"), []
    found = small_shapes.turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1000, 0.0, 0.0, "cpu")
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("ab", small_shapes.LEAST_ROUNDS)
    found = small_shapes.turns({"a": lambda: None}, 20, 0.0, 60.0, "cpu")
    assert len(found["a"]) == 20


def test_torchs_own_linear_is_right(script: Any) -> None:
    """The peer must not lose for being wrong."""
    torch.manual_seed(0)
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    layer = script("small_shapes").TorchLinear(64, 48, bias=False, dtype=torch.bfloat16)
    dy = torch.randn(32, 48, dtype=torch.bfloat16)
    found = (layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), dy))
    wanted = (x @ layer.weight.t(), dy @ layer.weight, dy.t() @ x)
    assert all(20 * torch.log10(a.norm() / (a - b).norm()) > 20 for a, b in zip(wanted, found, strict=True))


RUN = """
import importlib, sys
for arguments in sys.argv[1:]:
    name, *rest = arguments.split()
    print(name, importlib.import_module(name).main(["--tiny", *rest]))
"""


def test_kernel_benchmarks_in_the_interpreter(tmp_path: Path) -> None:
    """A process of its own: Triton reads the variable when kernels are defined."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    arguments = [f"{name} --json {tmp_path}/{name}.json" for name in ("gemm", "casts", "tile_sizes", "measure_costs")]
    command = [sys.executable, "-P", "-W", "ignore", "-c", RUN, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(f"{name} 0" in done.stdout for name in ("gemm", "casts", "tile_sizes", "measure_costs"))
    assert all(set(row) == {"m", "n", "k", "tflops"} for row in rows_of(tmp_path / "gemm.json"))
    casts, update = rows_of(tmp_path / "casts.json")
    assert casts["errors"] == {}
    assert len(casts["gbs"]) == 22
    assert update["update_us"] > 0
    tiles = rows_of(tmp_path / "tile_sizes.json")
    assert len(tiles) == 17
    assert all(row["gbs"] for row in tiles)
    assert json.loads((tmp_path / "measure_costs.json").read_text())["source"] == "measured"


def test_arithmetic(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert (
        script("arithmetic").main(
            ["--tiny", "--no-compile", "--only", "multiplier=mitchell", "--only", "products=e5m2", "--json", str(path)]
        )
        == 0
    )
    assert [row["form"] for row in json.loads(path.read_text())["rows"]] == ["factored", "tiles"]
    assert "FAIL" not in capsys.readouterr().out


def test_sensitivity_runs_as_a_script() -> None:
    """Its name is also that of the tests' folder that its models come from."""
    command = [sys.executable, str(HERE / "sensitivity.py"), "--tiny"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "2 of 2: found, and the suggestion meets its budget" in found.stdout
