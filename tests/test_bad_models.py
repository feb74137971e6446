"""Models that cannot be compiled, or not as wished: a clear error or a stated fallback, and the model passed in is never changed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_input import Branch, net, rows, untouched
from torch import nn

import fp8fx


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
