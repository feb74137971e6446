"""`direct` on the demo's GPT: without its scaler a layer is named, with one that grows every 4 steps it trains."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "loss_scaling.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("loss_scaling_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_scaler_the_layer_is_named(benchmark: Any) -> None:
    assert any("attn" in name or "mlp" in name for name in benchmark.train(10, scaled=False).warned)


def test_with_a_scaler_the_scale_settles_and_the_loss_falls(benchmark: Any) -> None:
    outcome = benchmark.train(120, scaled=True)
    assert benchmark.settled(outcome.scales), [int(math.log2(scale)) for scale in outcome.scales]
    assert sum(outcome.losses[-10:]) / 10 < 0.67 * outcome.losses[0]
    assert outcome.warned == []
