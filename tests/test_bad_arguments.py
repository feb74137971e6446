"""Wrong arguments and recipes: a clear error, and the model passed in is never changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import net, rows, untouched
from torch import Tensor, nn

import fp8fx
from fp8fx.clone import runtime_of

# -- arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "inductr"}, r"inner='inductr': allowed are auto, eager, aot_eager or inductor. Did you mean 'inductor'\?"),
        ({"capture": "dynam"}, r"capture='dynam': allowed are dynamo or symbolic. Did you mean 'dynamo'\?"),
        ({"on_capture_error": "ignore"}, r"on_capture_error='ignore': allowed are raise or eager"),
        ({"exempt": ["fc"]}, r"exempt\[0\].*no module matches 'fc'"),
        ({"output_fused": ["fc"]}, r"output_fused\[0\].*no module matches 'fc'"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    model = net()
    with untouched(model, rows()), pytest.raises(fp8fx.FP8Error, match=message):
        fp8fx.compile(model, **options)


def test_stages() -> None:
    fast = fp8fx.compile(net())
    with pytest.raises(fp8fx.CaptureError, match="nothing is captured yet: call the model once"):
        fast.graph("lower")
    fast(rows())
    with pytest.raises(fp8fx.PassError, match=r"no stage 'insert_qqd'; there are capture, .* Did you mean 'insert_qdq'\?"):
        fast.graph("insert_qqd")
    with pytest.raises(fp8fx.CaptureError, match=r"there is no graph 3: the model was captured as 1 graph"):
        fast.graph("lower", 3)


def test_wrong_shape_fails_and_the_next_call_works() -> None:
    model = net()
    with untouched(model, rows()):
        fast = fp8fx.compile(model)
        with pytest.raises(RuntimeError, match="same reduction dim"):
            fast(torch.randn(3, 9))
        assert fast(rows()).shape == (3, 4)
        with pytest.raises(RuntimeError, match="same reduction dim"):
            fast(torch.randn(3, 9))
    assert len(fast.plan().fp8) == 2


def test_wrong_shape_does_not_use_up_the_fallback() -> None:
    fast = fp8fx.compile(net(), on_capture_error="eager")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(torch.randn(3, 9))
    fast(rows())
    assert len(fast.plan().fp8) == 2


@pytest.mark.parametrize("options", [{}, {"capture": "symbolic"}])
def test_wrong_arguments_fail_as_in_torch(options: dict[str, Any]) -> None:
    fast = fp8fx.compile(net(), **options)
    for args, kwargs in ((), {}), ((rows(), rows()), {}), ((), {"inp": rows()}):
        with pytest.raises(TypeError):
            fast(*args, **kwargs)


def test_an_error_of_the_model_passes_through() -> None:
    class Picky(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if input.shape[0] > 2:
                raise ValueError("too many rows")
            return super().forward(input)

    fast = fp8fx.compile(Picky(8, 4))
    with pytest.raises(ValueError, match="too many rows"):
        fast(rows())
    assert fast(rows(2)).shape == (2, 4)


# -- recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [", "is not YAML"),
        ("", "is empty; the shortest recipe is"),
        ("# only a comment\n", "is empty"),
        ("- hybrid\n", "a recipe is a mapping of keys"),
        ("extends: bad.yaml\n", "which is a circle"),
        ("extends: hybird\n", "Did you mean 'hybrid'"),
        ("extends: hybrid\nexempt: [fc]\n", r"bad.yaml:2: exempt\[0\]: no module matches 'fc'"),
    ],
)
def test_bad_recipes_leave_the_model_alone(tmp_path: Path, text: str, message: str) -> None:
    path, model = tmp_path / "bad.yaml", net()
    path.write_text(text)
    with untouched(model, rows()), pytest.raises(fp8fx.RecipeError, match=message):
        fp8fx.compile(model, path)


def test_a_circle_of_three_is_named_whole(tmp_path: Path) -> None:
    for here, there in ("a", "b"), ("b", "c"), ("c", "a"):
        (tmp_path / f"{here}.yaml").write_text(f"extends: {there}.yaml\n")
    with pytest.raises(fp8fx.RecipeError, match=r"circle: \S*a.yaml -> \S*b.yaml -> \S*c.yaml -> \S*a.yaml"):
        fp8fx.compile(net(), tmp_path / "a.yaml")


def test_a_pattern_only_capture_can_judge_fails_at_the_first_call() -> None:
    model = net()
    with untouched(model, rows()):
        fast = fp8fx.compile(model, {"extends": "hybrid", "exempt": [{"op": "conv2d"}]})
        with pytest.raises(fp8fx.RecipeError, match="conv2d"):
            fast(rows())
    assert runtime_of(fast).graphs == []


@pytest.mark.parametrize("recipe", [None, 7, ["hybrid"]])
def test_recipe_of_a_wrong_type(recipe: Any) -> None:
    with pytest.raises(fp8fx.RecipeError, match="a recipe is a shipped name, a path, a dict or a Recipe"):
        fp8fx.compile(net(), recipe)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), 1e-46, 1e39, "1"])
@pytest.mark.parametrize("function", [fp8fx.quantize, fp8fx.fake_quantize])
def test_a_number_that_is_no_scale(function: Any, scale: Any) -> None:
    with pytest.raises(fp8fx.ModelError, match="a scale is a finite number above 0 that float32 holds"):
        function(torch.ones(3), "e4m3fn", scale)
    with pytest.raises(fp8fx.ModelError, match="a scale is a finite number above 0 that float32 holds"):
        fp8fx.dequantize(fp8fx.quantize(torch.ones(3), "e4m3fn"), scale)
