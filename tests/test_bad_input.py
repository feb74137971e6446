"""Bad input: each case gets a clear error or a stated fallback, and the model passed in is never changed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.clone import runtime_of


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def rows(n: int = 3) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1))


class Branch(nn.Module):
    """Python that depends on data: Dynamo breaks the graph, symbolic tracing fails."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Weight(nn.Module):
    """A linear whose weight may have a size of zero."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, k))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a caller can see of a model, tensors by identity and by value."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    modules = list(model.named_modules())
    return {
        "class": [type(m) for _, m in modules],
        "identity": [id(m) for _, m in modules],
        "training": [m.training for _, m in modules],
        "keys": [sorted(vars(m)) for _, m in modules],
        "hooks": [[len(vars(m)[key]) for key in hooks] for _, m in modules],
        "tensors": {name: (id(t), t.requires_grad, t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "state_keys": list(model.state_dict()),
    }


@contextmanager
def untouched(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    """The model looks the same after the block as before it, and computes the same bits."""
    before, values = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        outputs = model(*inputs) if inputs else None
    yield
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value.nan_to_num(7.0), values[key].nan_to_num(7.0)), key
    if outputs is not None:
        with torch.no_grad():
            assert torch.equal(model(*inputs), outputs)


# -- values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_nonfinite_inputs_stay_in_their_rows(recipe: str) -> None:
    """NaN stays NaN; inf saturates to the format's largest value, as `overflow: saturate` says; neither moves the scale."""
    model, x = net(), rows()
    clean = fp8fx.compile(model, recipe)(x)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    with untouched(model, rows()):
        y = fp8fx.compile(model, recipe)(x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    if recipe == "direct":  # no scales: row 2 does not know of the others
        assert torch.equal(y[2], clean[2])
    else:
        assert y[2].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_stay_in_their_outputs(value: float) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    with untouched(model, rows()[:0]):
        y = fp8fx.compile(model, "hybrid")(rows())
    assert y[:, 1].isnan().all() if value != value else y[:, 1].isfinite().all()
    assert y[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("recipe", ["hybrid", "direct", "none"])
@pytest.mark.parametrize("first", [0, 3])
def test_empty_batch_forward_and_backward(recipe: str, first: int) -> None:
    model = net()
    with untouched(model, rows()):
        fast = fp8fx.compile(model, recipe)
        fast(rows(first))
        y = fast(rows(0))
        y.sum().backward()
    assert y.shape == (0, 4)
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("granularity", ["row", [2, 4]])
def test_empty_batch_with_finer_scales(granularity: Any) -> None:
    recipe = {"extends": "hybrid", "defaults": {role: {"granularity": granularity} for role in ("input", "weight", "grad_output")}}
    fast = fp8fx.compile(net(), recipe)
    fast(rows(0)).sum().backward()
    assert fast[0].weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
@pytest.mark.parametrize(("n", "k"), [(4, 0), (0, 8)])
def test_zero_sizes(recipe: str, n: int, k: int) -> None:
    model = Weight(n, k)
    x = torch.zeros(3, k, requires_grad=True)
    with untouched(model, x):
        y = fp8fx.compile(model, recipe)(x)
        y.sum().backward()
    assert y.shape == (3, n)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert model.weight.grad is not None
    assert model.weight.grad.shape == (n, k)


def test_zero_sizes_of_matmul_and_convolution() -> None:
    assert torch.equal(fp8fx.compile(Product())(torch.ones(3, 0), torch.ones(0, 5)), torch.zeros(3, 5))
    conv = fp8fx.compile(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
    y = conv(torch.zeros(0, 3, 8, 8))
    y.sum().backward()
    assert y.shape == (0, 4, 8, 8)
    assert conv[0].weight.grad.count_nonzero() == 0
    assert fp8fx.compile(nn.Sequential(nn.Embedding(5, 4)))(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 4)


def test_integer_operands_stay_as_they_are_with_a_reason() -> None:
    a, b = torch.randint(0, 9, (3, 4)), torch.randint(0, 9, (4, 5))
    fast = fp8fx.compile(Product())
    with pytest.warns(fp8fx.FP8Warning, match="no layer runs in FP8"):
        assert torch.equal(fast(a, b), a @ b)
    row = fp8fx.plan(fast).rows[0]
    assert row.decision == "high_precision"
    assert row.reason == "operands are int64, int64, not floating point"


def test_integer_input_of_a_linear_fails_as_in_torch() -> None:
    model, x = net(), torch.ones(3, 8, dtype=torch.int64)
    with untouched(model, rows()), pytest.raises(RuntimeError, match="same dtype"):
        fp8fx.compile(model)(x)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_models_of_other_dtypes_keep_them(dtype: torch.dtype, recipe: str) -> None:
    model, x = net().to(dtype), rows().to(dtype)
    with untouched(model, x):
        fast = fp8fx.compile(model, recipe)
        y = fast(x)
        y.sum().backward()
    assert y.dtype is dtype
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    assert len(fast.plan().fp8) == 2  # type: ignore[operator]
    reference = fp8fx.compile(net().to(dtype).float(), recipe)(x.float())  # the same weights and inputs, in fp32
    torch.testing.assert_close(y.float(), reference, rtol=0.15, atol=0.15)


# -- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), lambda: nn.Identity(), lambda: nn.Dropout(0.0)])
def test_nothing_to_quantize_runs_as_it_is_and_says_so(make: Callable[[], nn.Module]) -> None:
    model, x = make(), rows()
    with untouched(model, x):
        fast = fp8fx.compile(model)
        with pytest.warns(fp8fx.FP8Warning, match=r"no layer runs in FP8: 0 of 0 layers"):
            y = fast(x)
    assert torch.equal(y, model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)  # said once


def test_symbolic_capture_fails_when_compile_is_called() -> None:
    model = Branch()
    with untouched(model, rows()):
        with pytest.raises(fp8fx.CaptureError, match=r"Branch cannot be traced symbolically.*control flow(?s:.)*TorchDynamo"):
            fp8fx.compile(model, capture="symbolic")
        with pytest.raises(fp8fx.CaptureError, match=r"Branch cannot be traced symbolically(?s:.)*example_inputs"):
            fp8fx.plan(model)
        assert fp8fx.plan(model, example_inputs=rows().abs())["fc"].decision == "fp8"


@pytest.mark.parametrize("options", [{"capture": "symbolic"}, {"fullgraph": True}])
def test_failed_capture_falls_back_on_request(options: dict[str, Any]) -> None:
    model, x = Branch(), rows().abs()
    with untouched(model, x):
        fast = fp8fx.compile(model, on_capture_error="eager", **options)
        with pytest.warns(fp8fx.FP8Warning, match=r"could not capture|cannot be traced(?s:.)*Running in high precision"):
            y = fast(x)
        assert torch.equal(y, model(x))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(fast(-x), model(-x))


def test_fullgraph_refuses_a_break() -> None:
    model, x = Branch(), rows().abs()
    with untouched(model, x):
        fast = fp8fx.compile(model, fullgraph=True)
        with pytest.raises(fp8fx.CaptureError, match=r"could not capture the model: Data-dependent(?s:.)*untouched(?s:.)*on_capture_error"):
            fast(x)
        assert fp8fx.compile(model)(x).shape == (3, 8)  # without fullgraph both branches are captured
    assert vars(fast).keys() - vars(model).keys() == {"_fp8fx_runtime"}


def test_module_on_two_devices() -> None:
    model = net()
    model[2].to("meta")
    with untouched(model), pytest.raises(fp8fx.ModelError, match=r"several devices: cpu \('0.weight'\), meta \('2.weight'\)"):
        fp8fx.compile(model)


def test_input_on_another_device() -> None:
    model = net()
    with untouched(model, rows()), pytest.raises(fp8fx.CaptureError, match=r"device mismatch(?s:.)*meta and cpu"):
        fp8fx.compile(model)(rows().to("meta"))


@pytest.mark.parametrize(
    ("value", "found"), [(lambda x: x, "function"), (nn.Linear, "type"), (None, "NoneType"), ({"fc": nn.Linear(2, 2)}, "dict")]
)
def test_not_a_module(value: Any, found: str) -> None:
    with pytest.raises(fp8fx.ModelError, match=rf"takes a torch.nn.Module, got {found}"):
        fp8fx.compile(value)
    with pytest.raises(fp8fx.ModelError, match=rf"takes a torch.nn.Module, got {found}"):
        fp8fx.plan(value)


def test_compiled_twice() -> None:
    fast = fp8fx.compile(net())
    with untouched(fast), pytest.raises(fp8fx.ModelError, match=r"compiled by fp8fx already.*unwrap"):
        fp8fx.compile(fast)
    with pytest.raises(fp8fx.ModelError, match=r"holds one that is compiled by fp8fx already: '0'"):
        fp8fx.compile(nn.Sequential(fast, nn.Linear(4, 4)))


def test_torch_compiled_wrapper() -> None:
    model = torch.compile(net())
    with pytest.raises(fp8fx.ModelError, match=r"torch.compile'd wrapper; pass the model inside \(model._orig_mod\)"):
        fp8fx.compile(model)  # type: ignore[type-var]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_module() -> None:
    scripted = torch.jit.script(net())
    with pytest.raises(fp8fx.ModelError, match="TorchScript module has no Python forward"):
        fp8fx.compile(scripted)
    around = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.warns(fp8fx.FP8Warning, match="no layer runs in FP8: 0 of 1 layers.* 1 not captured"):
        fp8fx.compile(around)(rows())


def test_uncopyable_attribute() -> None:
    model = net()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with untouched(model, rows()), pytest.raises(fp8fx.ModelError, match=r"Sequential cannot be cloned: .*lock.*copyable"):
        fp8fx.compile(model)


def test_replaced_forward() -> None:
    model = net()
    old = model.forward
    model.forward = lambda x: old(x) * 2  # type: ignore[method-assign,assignment]
    with untouched(model, rows()), pytest.raises(fp8fx.ModelError, match=r"forward of this Sequential is replaced on the instance"):
        fp8fx.compile(model)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_uninitialized_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(fp8fx.ModelError, match=r"'0.weight' is not initialized yet: call the model once"):
        fp8fx.compile(model)
    model(rows())
    assert fp8fx.compile(model)(rows()).shape == (3, 4)


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
