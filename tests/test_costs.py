"""The cost model: lookups agree with the table, decisions follow from times, shipped data loads."""

from __future__ import annotations

import importlib
import json
import math
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8fx import costs
from fp8fx.costs.table import CASTS, COLUMNS, Table

BENCHMARKS = Path(__file__).parent / "benchmarks"


def table_of(gemm: Any, cast: float = 1.0, host: tuple[float, float, float] = (0.1, 0.1, 0.1)) -> Table:
    """A table whose GEMM times are gemm(m, k, n, column) in both directions; casts take `cast` per 1000 elements."""
    axes = ((16, 1024, 32768), (256, 16384), (256, 16384))
    rows = [[m, k, n, *(2 * [gemm(m, k, n, column) for column in COLUMNS])] for m, k, n in product(*axes)]
    times = dict(zip(("fixed", "bf16", "fp8"), host, strict=True))
    data = {
        "machine": {}, "source": "estimated", "gemm": rows, "casts": {kind: [[1, cast / 1e3], [10**9, cast * 1e6]] for kind in CASTS},
        "host": {"training": times, "inference": times}, "rates": {"float32": 50.0, "tf32": 400.0},
    }  # fmt: skip
    return Table.of(data)


def by_rate(bf16: float, fp8: float) -> Any:
    """Times in proportion to the work, in TFLOP/s."""
    return lambda m, k, n, column: 2e-6 * m * k * n / (bf16 if column == "bf16" else fp8)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_shipped_tables_have_their_points(device: str) -> None:
    data = json.loads(resources.files("fp8fx.costs").joinpath(f"{costs.table_name(device)}.json").read_text())
    table = costs.load(device)
    assert table.source in ("measured", "estimated")
    for m, k, n, *times in data["gemm"]:
        assert table.forward(m, k, n, "bf16") == pytest.approx(times[0])
        assert table.weight(m, k, n, "block") == pytest.approx(times[-1])
    for kind, points in data["casts"].items():
        assert all(table.cast(kind, elements) == pytest.approx(us) for elements, us in points)


def test_shipped_table_knows_small_from_large() -> None:
    assert costs.speedup(16, 256, 256) < 1
    assert costs.speedup(16384, 8192, 8192) > 1.2
    assert costs.speedup(16384, 8192, 8192, scaling="delayed") > costs.speedup(16384, 8192, 8192)
    assert costs.speedup(16384, 8192, 8192, granularity="row") > costs.speedup(16384, 8192, 8192, granularity=(1, 128))
    assert costs.speedup(16384, 8192, 8192, training=False) > 1.2


def test_between_and_beyond_the_grid() -> None:
    table = table_of(by_rate(700, 1400))
    for size in ((16, 256, 256), (100, 4096, 1000), (20000, 300, 16384)):  # proportional times stay so in between
        assert table.forward(*size, "bf16") == pytest.approx(by_rate(700, 1400)(*size, "bf16"))
    assert table.forward(32768, 256, 65536, "bf16") == pytest.approx(by_rate(700, 1400)(32768, 256, 65536, "bf16"))
    assert table.forward(1, 256, 256, "bf16") == table.forward(16, 256, 256, "bf16")  # fewer rows take no less
    assert table.cast("both", 5000) == pytest.approx(5.0)


def test_speedup_by_hand() -> None:
    m, k, n = 4096, 2048, 1024
    table = table_of(by_rate(700, 1400))
    flops = 2e-6 * m * k * n
    casts = (m * k + 2 * n * k + m * n) / 1e3
    assert costs.speedup(m, k, n, table=table) == pytest.approx(3 * flops / 700 / (3 * flops / 1400 + casts))
    inference = flops / 700 / (flops / 1400 + m * k / 1e3)  # kept weights are cast once for all
    assert costs.speedup(m, k, n, training=False, table=table) == pytest.approx(inference)
    shared = costs.cost(costs.Layer(m, k, n, shared=4), table)
    assert shared.gpu_fp8 == pytest.approx(3 * flops / 1400 + casts - 0.75 * m * k / 1e3)
    in_fp32 = 3 * flops / 50 / (3 * flops / 1400 + 2 * casts)
    assert costs.speedup(m, k, n, dtype=torch.float32, table=table) == pytest.approx(in_fp32)


@pytest.mark.parametrize(
    ("scaling", "granularity", "accumulate", "columns"),
    [
        ("current", "tensor", ("fast", "precise", "fast"), ("tensor_fast", "tensor_precise", "tensor_fast")),
        ("delayed", "row", ("precise", "fast", "fast"), ("row_precise", "row_fast", "row_fast")),
        ("none", "tensor", ("fast", "precise", "precise"), ("tensor_fast", "own_precise", "own_precise")),
        ("current", (1, 128), ("fast", "precise", "precise"), ("block", "block", "block")),
    ],
)
def test_each_gemm_reads_its_column(scaling: str, granularity: Any, accumulate: Any, columns: tuple[str, ...]) -> None:
    table = table_of(lambda m, k, n, column: 10.0 ** COLUMNS.index(column), cast=1e-9)
    layer = costs.Layer(32, 256, 256, scaling=scaling, granularity=granularity, accumulate=accumulate)
    assert costs.cost(layer, table).gpu_fp8 == pytest.approx(sum(10.0 ** COLUMNS.index(column) for column in columns))


def test_the_host_limits_a_layer_alone() -> None:
    table = table_of(lambda m, k, n, column: 10.0 if column == "bf16" else 5.0, cast=1e-6, host=(50, 20, 60))
    assert costs.speedup(16, 256, 256, table=table) == pytest.approx(70 / 110)
    assert costs.cost(costs.Layer(16, 256, 256), table).gpu_speedup == pytest.approx(2, rel=1e-3)


def test_choose_leaves_what_only_costs_launches() -> None:
    """Ten large layers and ten tiny ones that are faster in FP8 too, but by less than launching them costs."""
    table = table_of(lambda m, k, n, column: m * (1.0 if column == "bf16" else 0.5), cast=1e-9, host=(0, 1, 49000))
    large, tiny = costs.Layer(32768, 256, 256), costs.Layer(16, 256, 256)
    assert costs.choose([large] * 10 + [tiny] * 10, table) == [True] * 10 + [False] * 10
    assert costs.choose([tiny] * 10, table) == [False] * 10
    assert costs.choose([], table) == []
    assert costs.choose([tiny] * 10, table.without_host()) == [True] * 10  # in CUDA graphs launches cost nothing
    assert costs.choose([large], table, least=2.5) == [False]  # 2 times is not enough


def test_choose_takes_all_where_the_host_runs_ahead() -> None:
    table = table_of(lambda m, k, n, column: m * (1.0 if column == "bf16" else 0.5), cast=1e-9, host=(60, 25, 110))
    layers = [costs.Layer(32768, 256, 256), costs.Layer(16, 256, 256)]
    assert costs.cost(layers[1], table).speedup < 1
    assert costs.choose(layers, table) == [True, True]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
    ],
)
def test_names_of_tables(device: str, name: str) -> None:
    assert costs.table_name(device) == name


def test_a_device_without_a_table_takes_the_default() -> None:
    assert costs.load("NVIDIA X999").logs == costs.load().logs


def test_a_table_with_holes_is_refused() -> None:
    data = json.loads(resources.files("fp8fx.costs").joinpath("h100.json").read_text())
    with pytest.raises(ValueError, match="14 times at every point of a full grid"):
        Table.of({**data, "gemm": data["gemm"][1:]})
    with pytest.raises(ValueError, match="14 times at every point of a full grid"):
        Table.of({**data, "gemm": [row[:-1] for row in data["gemm"]]})


def test_short_products_are_priced_as_the_kernel_that_runs() -> None:
    """Precise gradients that contract 512 terms are the project's own kernel's (fp8fx.ops.inductor), whatever torch's would take."""
    table = table_of(lambda m, k, n, column: {"own_precise": 1.0, "tensor_precise": 100.0}.get(column, 10.0))
    short, long = (costs.cost(costs.Layer(8192, 4096, n, True, "delayed", "tensor", torch.bfloat16), table).gpu_fp8 for n in (512, 4096))
    assert long - short > 90
    assert costs.own_is_faster(8192, 4096, 512, "tensor", "precise")
    assert not any(
        costs.own_is_faster(*size, scales, "precise")  # type: ignore[arg-type]
        for size, scales in (
            ((8192, 4096, 64), "row"),
            ((8192, 4096, 1024), "tensor"),
            ((64, 65536, 512), "row"),
            ((65536, 128, 512), "row"),
        )
    )


def test_few_rows_with_their_own_scales_are_priced_as_the_kernel_that_runs() -> None:
    table = table_of(lambda m, k, n, column: {"row_fast": 100.0, "tensor_fast": 1.0}.get(column, 10.0))
    few, more = (costs.cost(costs.Layer(m, 4096, 4096, False, granularity="row"), table).gpu_fp8 for m in (16, 17))
    assert more - few > 90


def test_own_products_of_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's precise product takes half as long, ours is expected to; nothing else changes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure_costs = importlib.import_module("measure_costs")
    columns, (own, block) = measure_costs.COLUMNS, map(measure_costs.COLUMNS.index, measure_costs.CHANGED)
    times = [float(10 + i) for i in range(2 * len(columns))]
    casts = {kind: [[100.0, 8.0], [1000.0, 20.0]] for kind in ("rows", "row", "row_both", "block", "block_both")}
    slower = casts | {"rows": [[101.0, 16.0], [1001.0, 60.0]]}
    other = {"machine": {"device": "other"}, "gemm": [[16, 32, 64, *times]], "casts": casts}
    data = {"machine": {"device": "this"}, "source": "measured", "gemm": [[16, 32, 64, *(time / 2 for time in times)]], "casts": slower}
    data["gemm"][0][3 + own] = data["gemm"][0][3 + len(columns) + block] = 1e6
    made = measure_costs.transferred(data, other)
    assert made["gemm"] == [[16, 32, 64, *(time / 2 for time in times)]]
    assert made["transferred"]["of"] == {"device": "other"}
    assert made["machine"] == {"device": "this"}
    assert made["casts"] == slower | {key: [[101.0, 16.0], [1001.0, 60.0]] for key in measure_costs.CHANGED_CASTS}


def test_estimate_between_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid is fine enough: against the estimate's own formula, between its points."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure_costs = importlib.import_module("measure_costs")
    table = Table.of(measure_costs.estimated())
    worst = max(
        abs(math.log(table.forward(m, k, n, column) / measure_costs.estimated_gemm(m, n, k, column)))
        for m, k, n in ((4096, 4096, 14336), (1024, 4096, 4096), (8192, 14336, 4096), (4096, 1024, 2048), (300, 2048, 2048))
        for column in ("bf16", "tensor_fast")
    )
    assert worst < math.log(1.35)


def test_a_kernel_that_fails_counts_as_the_slowest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure_costs = importlib.import_module("measure_costs")
    times = {column: 10.0 + i for i, column in enumerate(COLUMNS)}

    def gpu_us(call: Any) -> float:
        if call() == "row_fast":
            raise RuntimeError("no kernel of this size")
        return times[call()]

    monkeypatch.setattr(measure_costs, "gpu_us", gpu_us)
    monkeypatch.setattr(measure_costs, "products", lambda a, b, width: ((column, lambda column=column: column) for column in COLUMNS))
    assert measure_costs.gemm_point(16, 32, 48, "cpu") == 2 * [10.0, 11.0, 12.0, 16.0, 14.0, 15.0, 16.0]
    assert "row_fast at (16, 48, 32): RuntimeError: no kernel of this size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling": "dlayed"}, "scaling is one of none, current, delayed, fixed, got 'dlayed'"),
        ({"granularity": "rows"}, "granularity is tensor, row, or a block .* S one of 32, 64, 128, got 'rows'"),
        ({"granularity": (7, 9)}, r"got \(7, 9\)"),
        ({"granularity": (32, 64)}, r"got \(32, 64\)"),
        ({"m": -8192}, "numbers above 0, got"),
    ],
    ids=str,
)
def test_what_is_no_layer(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        costs.speedup(**({"m": 8192, "k": 4096, "n": 4096} | changes))
    for block in ((1, 128), (128, 1), (64, 64)):
        costs.Layer(8192, 4096, 4096, granularity=block)


def test_a_table_is_loaded_first() -> None:
    with pytest.raises(TypeError, match=r"as costs\.load gives it, not 'h200'"):
        costs.speedup(8192, 4096, 4096, table="h200")  # type: ignore[arg-type]
