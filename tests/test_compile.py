"""The contract of `fp8fx.compile`: what the returned object is, keeps, and does."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fp8fx
from fp8fx import state
from fp8fx.clone import runtime_of


class Net(nn.Module):
    """A little of everything: config, buffer, method that calls the model, optional arguments, an unused layer's hook."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.config = {"width": width}
        self.fc1, self.fc2, self.head = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """The documented forward."""
        h = F.relu(self.fc1(x))
        h = h + self.fc2(h)
        y = self.head(h) * scale
        return y if mask is None else y * mask

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)


class Mixed(nn.Module):
    """Embedding, convolution, products of activations, a layer called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(12, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.q, self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        x = torch.softmax(scores, -1) @ self.q(x)
        return self.out(x)


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def rows(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def is_fp8(model: nn.Module, x: Tensor | None = None) -> bool:
    """The model's output differs from high precision, and its plan says why."""
    x = rows() if x is None else x
    with torch.no_grad():
        return not torch.equal(model(x), fp8fx.unwrap(model)(x)) and bool(fp8fx.plan(model).fp8)


# -- a structural clone ---------------------------------------------------------------------------------------------------


def test_same_parameters_and_buffers_under_the_same_names() -> None:
    model = make()
    fast = fp8fx.compile(model)
    assert [(n, id(p)) for n, p in fast.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [(n, id(b)) for n, b in fast.named_buffers()] == [(n, id(b)) for n, b in model.named_buffers()]
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    assert fast.fc1 is not model.fc1


def test_class_signature_and_attributes() -> None:
    model = make()
    model.custom = "kept"  # type: ignore[assignment]
    fast = fp8fx.compile(model)
    assert isinstance(fast, Net)
    assert type(fast) is not Net
    assert type(fast).__name__ == type(fast).__qualname__ == "Net"
    assert type(fast).__module__ == Net.__module__
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert fast.forward.__doc__ == "The documented forward."
    assert fast.config == {"width": 16}
    assert fast.custom == "kept"
    assert repr(fast) == repr(model)
    assert type(fp8fx.compile(make(1))) is type(fast)


def test_flags_and_modes_are_separate() -> None:
    model = make()
    model.fc2.eval()
    model.head.weight.requires_grad_(False)
    fast = fp8fx.compile(model)
    assert fast.training
    assert not fast.fc2.training
    assert not fast.head.weight.requires_grad
    fast.eval()
    assert model.training
    fast.train()
    assert not model.fc2.training


def test_hooks_come_along() -> None:
    model, seen = make(), []
    model.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    model.fc2.register_forward_hook(lambda m, args, out: out * 0)
    fast = fp8fx.compile(model)
    fast(rows())
    assert seen == ["Net"]
    model.fc2._forward_hooks.clear()
    assert torch.equal(fast(rows()), fp8fx.compile(model)(rows())) is False  # the clone keeps its own


def test_out_of_place() -> None:
    model, x = make(), rows()
    expected = model(x)
    fast = fp8fx.compile(model)
    fast(x).sum().backward()
    fast.extra = 1  # type: ignore[assignment]
    assert torch.equal(model(x), expected)
    assert not hasattr(model, "extra")
    assert not torch.equal(fast(x), expected)
    assert fp8fx.unwrap(fast) is model


def test_methods_run_the_compiled_forward() -> None:
    fast = fp8fx.compile(make())
    assert torch.equal(fast.predict(rows()), fast(rows()).argmax(-1))
    assert fast.plan().summary.startswith("3 of 3 layers")  # type: ignore[operator]


def test_one_optimizer_serves_both() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fast = fp8fx.compile(model)
    before, x = model(rows()).detach(), rows()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = fast(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model(x), before)


def test_arguments_by_position_and_by_name() -> None:
    fast, model = fp8fx.compile(make(), "none"), make()
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert torch.equal(fast(rows(), mask, scale=2.0), model(rows(), mask, scale=2.0))
    assert torch.equal(fast(mask=mask, x=rows()), model(rows(), mask))


def test_models_that_use_our_names_keep_theirs() -> None:
    class Planner(nn.Linear):
        def plan(self) -> str:
            return "mine"

    fast = fp8fx.compile(Planner(8, 4))
    fast(rows())
    assert fast.plan() == "mine"
    assert len(fp8fx.plan(fast).fp8) == 1


def test_unwrap_of_others() -> None:
    with pytest.raises(fp8fx.ModelError, match="not compiled by fp8fx"):
        fp8fx.unwrap(make())
    with pytest.raises(fp8fx.ModelError, match="not compiled by fp8fx"):
        fp8fx.invalidate(make())


# -- copies ---------------------------------------------------------------------------------------------------------------


def by_pickle(fast: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(fast))  # type: ignore[no-any-return]


def by_torch_save(fast: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("copied_by", [copy.deepcopy, copy.copy, by_pickle, by_torch_save])
def test_copies_stay_fp8(copied_by: Callable[[nn.Module], nn.Module], called: bool) -> None:
    fast = fp8fx.compile(make(), exempt=["head"])
    if called:
        fast(rows())
    copied = copied_by(fast)
    assert isinstance(copied, Net)
    assert torch.equal(copied(rows()), fast(rows()))
    assert is_fp8(copied)
    assert fp8fx.plan(copied)["head"].decision == "exempt"
    plain = fp8fx.unwrap(copied)
    assert type(plain) is Net
    if copied_by is not copy.copy:
        assert copied.fc1.weight is not fast.fc1.weight
        assert plain.fc1.weight is copied.fc1.weight


class Locked(nn.Linear):
    """Copyable because it says how."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("copied_by", [copy.deepcopy, by_pickle])
def test_copies_follow_the_model_s_own_getstate(copied_by: Callable[[nn.Module], nn.Module]) -> None:
    fast = fp8fx.compile(Locked())
    copied = copied_by(fast)
    assert torch.equal(copied(rows()), fast(rows()))
    assert copied.lock is not fast.lock


@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
def test_a_compiled_model_is_freed(capture: str) -> None:
    """Dynamo's caches outlive it, and hold neither the model nor the clone."""
    model = make()
    fast = fp8fx.compile(model, capture=capture)
    fast(rows()).sum().backward()
    alive = [weakref.ref(model), weakref.ref(fast), weakref.ref(runtime_of(fast))]
    del model, fast
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


# -- state_dict -----------------------------------------------------------------------------------------------------------


def test_state_dict_is_the_original_s_plus_one_prefix() -> None:
    model = make()
    fast = fp8fx.compile(model, "direct")
    saved, ours = fast.state_dict(), fp8fx.state_dict(fast)
    assert list(fp8fx.strip(saved)) == list(model.state_dict())
    assert set(saved) - set(model.state_dict()) == set(ours)
    assert all(key.startswith("_fp8fx.") and type(value) is Tensor for key, value in ours.items())
    model.load_state_dict(fp8fx.strip(saved), strict=True)


def test_original_checkpoint_loads_strictly() -> None:
    model, other = make(), make(1)
    fast = fp8fx.compile(model)
    result = fast.load_state_dict(other.state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(fast(rows()), fp8fx.compile(other)(rows()))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fast.load_state_dict({**other.state_dict(), "nonsense": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        fast.load_state_dict({})


def test_checkpoint_resumes_bit_for_bit_with_weights_only(tmp_path: Path) -> None:
    """Stochastic rounding goes on where it stopped, from a checkpoint as from a copy."""

    def step(fast: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        (fast(rows(seed=seed)).square().mean() * 1024).backward()
        optimizer.step()

    first = fp8fx.compile(make(), "direct")
    optimizer = torch.optim.SGD(first.parameters(), lr=1e-4)
    for seed in range(3):
        step(first, optimizer, seed)
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second = fp8fx.compile(make(5), "direct")
    second.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    third = copy.deepcopy(first)
    others = [(fast, torch.optim.SGD(fast.parameters(), lr=1e-4)) for fast in (second, third)]
    for fast, made in (first, optimizer), *others:
        step(fast, made, 3)
        step(fast, made, 4)
    for (name, ours), *theirs in zip(first.named_parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(ours, theirs[0]), name
        assert torch.equal(ours, theirs[1]), name


def test_a_compiled_model_inside_another_module_saves_and_loads() -> None:
    outer = nn.ModuleDict({"net": fp8fx.compile(make(), "direct"), "other": nn.Linear(2, 2)})
    saved = outer.state_dict()
    assert any(key.startswith("net._fp8fx.") for key in saved)
    outer.load_state_dict(saved, strict=True)


# -- quantized weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters whose quantization ran, in order."""
    done: list[str] = []
    real = state.quantize_weight

    def spy(weight: Tensor, wanted: Any, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        done.append(wanted.parameter)
        return real(weight, wanted, scale)

    monkeypatch.setattr(state, "quantize_weight", spy)
    return done


WEIGHTS = ["fc1.weight", "fc2.weight", "head.weight"]


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_weights_are_quantized_once_in_evaluation(quantized: list[str], how: str) -> None:
    fast = fp8fx.compile(make())
    fast.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        first = fast(rows())
        quantized.clear()
        for _ in range(3):
            assert torch.equal(fast(rows()), first)
    assert quantized == []


def test_training_quantizes_every_time_by_default(quantized: list[str]) -> None:
    fast = fp8fx.compile(make())
    fast(rows())
    quantized.clear()
    fast(rows())
    assert sorted(quantized) == WEIGHTS


def changed(model: nn.Module, fast: nn.Module, how: str) -> None:
    """Change every weight in one of the ways users do."""
    if how in ("sgd", "foreach", "fused"):
        options: dict[str, Any] = {} if how == "sgd" else {how: True}
        kind = torch.optim.SGD if how == "sgd" else torch.optim.Adam
        optimizer = kind(model.parameters(), lr=0.1, **options)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    elif how == "load_state_dict":
        fast.load_state_dict(make(3).state_dict())
    elif how == "load into the original":
        model.load_state_dict(make(3).state_dict())
    elif how == "in place":
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
    elif how == "invalidate":
        for p in model.parameters():
            p.data.mul_(2)
        fp8fx.invalidate(fast)
    else:
        raise AssertionError(how)


CHANGES = ["sgd", "foreach", "fused", "load_state_dict", "load into the original", "in place", "invalidate"]


@pytest.mark.parametrize("cache", ["none", "step"])
@pytest.mark.parametrize("how", CHANGES)
def test_changed_weights_are_quantized_again(quantized: list[str], how: str, cache: str) -> None:
    model = make()
    fast = fp8fx.compile(model, {"extends": "hybrid", "defaults": {"weight_cache": cache}})
    if cache == "none":
        fast.eval()
    before = fast(rows())
    fast(rows())
    quantized.clear()
    changed(model, fast, how)
    after = fast(rows())
    assert sorted(quantized) == WEIGHTS
    assert not torch.equal(after, before)
    assert torch.equal(after, fp8fx.compile(model)(rows()))


def test_weight_cache_step_quantizes_once_per_step(quantized: list[str]) -> None:
    model = make()
    fast = fp8fx.compile(model, {"extends": "hybrid", "defaults": {"weight_cache": "step"}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast(rows())
    quantized.clear()
    for _ in range(2):
        for seed in range(3):  # gradient accumulation
            fast(rows(seed=seed)).square().mean().backward()
        optimizer.step()
    assert sorted(quantized) == WEIGHTS  # the first step's weights were there already


# -- what is said ---------------------------------------------------------------------------------------------------------


def test_one_info_line_after_the_first_capture(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8fx")
    fast = fp8fx.compile(make(), exempt=["head"])
    assert caplog.messages == []
    fast(rows())
    fast(rows(4))
    expected = "fp8fx: 2 of 3 layers, 100.0% of non-exempt FLOPs in FP8; 1 exempt; 0 fell back"
    assert caplog.messages == [expected]


def test_warning_when_nothing_runs_in_fp8(caplog: pytest.LogCaptureFixture) -> None:
    fast = fp8fx.compile(make(), exempt=["*"])
    with pytest.warns(fp8fx.FP8Warning, match=r"no layer runs in FP8: 0 of 3 layers.* 3 exempt"):
        fast(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp8fx.compile(make(), "none")(rows())  # asked for


# -- plan -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [rows(), (rows(), torch.ones(4)), [rows()], {"x": rows(), "scale": 2.0}])
def test_example_inputs_as_tensor_tuple_or_dict(inputs: Any) -> None:
    plan = fp8fx.plan(make(), "hybrid", example_inputs=inputs)
    assert [row.name for row in plan.rows] == ["fc1", "fc2", "head"]
    assert [row.shape for row in plan.rows] == ["6x16x8", "6x16x16", "6x4x16"]
    assert plan.flops == 2 * 6 * (16 * 8 + 16 * 16 + 4 * 16)
    assert plan.fp8_flops_share == 1.0


def test_plan_without_example_inputs() -> None:
    plan = fp8fx.plan(make(), "hybrid", exempt=["head"])
    assert [(row.name, row.decision) for row in plan.rows] == [("fc1", "fp8"), ("fc2", "fp8"), ("head", "exempt")]
    assert plan.flops == 0
    assert plan.summary == "2 of 3 layers in FP8, FLOPs not known; 1 exempt; 0 fell back"
    with pytest.raises(fp8fx.CaptureError, match="needs example_inputs"):
        fp8fx.plan(make(), capture="dynamo")


def test_plan_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    saved, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fp8fx.plan(model, example_inputs=rows())
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("recipe", ["hybrid", "direct", "none"])
@pytest.mark.parametrize(("cls", "x"), [(Net, rows()), (Mixed, torch.arange(10).reshape(2, 5))])
def test_both_front_ends_give_the_same_plan(cls: type[nn.Module], x: Tensor, recipe: str) -> None:
    plans = [fp8fx.plan(cls(), recipe, example_inputs=x, capture=capture) for capture in ("dynamo", "symbolic")]
    assert plans[0].rows == plans[1].rows
    assert str(plans[0]) == str(plans[1])


def test_symbolic_capture_computes_the_same_bits() -> None:
    torch.manual_seed(0)
    for model, x in ((make(), rows()), (Mixed(), torch.arange(10).reshape(2, 5))):
        results = []
        for capture in ("dynamo", "symbolic"):
            model.zero_grad(set_to_none=True)
            fast = fp8fx.compile(model, "emulation-direct", capture=capture)
            y = fast(x)
            (y.square().sum() * 1024).backward()
            results.append([y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) > 3
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_symbolic_capture_follows_arguments_modes_and_new_weights() -> None:
    fast, mask = fp8fx.compile(make(), capture="symbolic"), torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = fp8fx.compile(make())
    for _ in range(2):
        assert torch.equal(fast(rows()), expected(rows()))
        assert torch.equal(fast(rows(), mask, scale=3.0), expected(rows(), mask, scale=3.0))
        assert torch.equal(fast(rows(2)), expected(rows(2)))
    fast.load_state_dict(make(3).state_dict(), assign=True)
    assert torch.equal(fast(rows()), fp8fx.compile(make(3))(rows()))


def test_plan_lists_what_was_not_called() -> None:
    plan = fp8fx.plan(Mixed(), example_inputs=torch.arange(10).reshape(2, 5))
    assert [row.name for row in plan.not_captured] == ["unused"]
    assert "not called" in plan["unused"].reason
    assert plan["q"].calls == 2
    assert [row.name for row in plan.rows if row.op == "matmul"] == ["matmul", "matmul_1"]


def test_names_of_torch_s_own_modules_and_of_parametrized_layers() -> None:
    """torch.nn's forwards are captured through a wrapper, and a parametrized layer computes its weight: names stay theirs."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    names = [row.name for row in fp8fx.plan(encoder, example_inputs=torch.randn(2, 5, 16)).rows]
    expected = ["self_attn.in_proj_weight", "self_attn.attention", "self_attn.out_proj", "linear1", "linear2"]
    assert names == expected
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), parametrizations.spectral_norm(nn.Linear(8, 4)))
    plan = fp8fx.plan(normed, example_inputs=rows(), exempt=["1"])
    assert (plan["0"].decision, plan["1"].decision) == ("fp8", "exempt")
    assert plan.not_captured == []


def test_exempt_and_output_fused_arguments() -> None:
    model = make()
    plan = fp8fx.plan(model, "direct", example_inputs=rows(), exempt=["fc1"], output_fused=["head"])
    assert plan["fc1"].decision == "exempt"
    assert "output fused" in plan["head"].reason
    assert "output" not in plan["head"].formats
    assert "output e5m2" in fp8fx.plan(model, "direct", example_inputs=rows())["head"].formats
    fast = fp8fx.compile(model, "direct", exempt=[{"type": "Linear"}, "head"])
    with pytest.warns(fp8fx.FP8Warning, match="no layer runs"):
        assert torch.equal(fast(rows()), model(rows()))


def test_recipe_as_name_path_dict_and_object(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hybrid\nexempt: [head]\n")
    forms: list[Any] = [path, str(path), {"extends": "hybrid", "exempt": ["head"]}, fp8fx.Recipe.load(path)]
    outputs = [fp8fx.compile(make(), recipe)(rows()) for recipe in forms]
    outputs.append(fp8fx.compile(make(), "hybrid", exempt=["head"])(rows()))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert torch.equal(fp8fx.compile(make())(rows()), fp8fx.compile(make(), "hybrid")(rows()))


# -- dtypes and autocast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_sets_the_output_and_quantize_reads_what_was_there_before(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)
    fast = fp8fx.compile(model)
    full = fast(x)
    with torch.autocast("cpu", dtype):
        y = fast(x)
        ordinary = model(x)
    assert y.dtype is ordinary.dtype is dtype
    assert torch.equal(y, full.to(dtype))  # the same codes, accumulated in fp32, cast once
    assert not torch.equal(y, fp8fx.compile(copy.deepcopy(model).to(dtype))(x.to(dtype)))  # codes of a cast tensor differ
    y.float().sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype is x.grad.dtype is torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_training_in_other_dtypes(dtype: torch.dtype) -> None:
    fast = fp8fx.compile(make().to(dtype))
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = fast(rows().to(dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# -- loss scaling ---------------------------------------------------------------------------------------------------------


def train(recipe: Any, scaler: fp8fx.GradScaler, steps: int, seed: int = 0, loss_factor: float = 1.0) -> list[float]:
    fast = fp8fx.compile(make(seed), recipe)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = fast(rows(32)).square().mean() * loss_factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def test_scaler_is_a_pass_through_where_the_recipe_scales_gradients() -> None:
    scaler = fp8fx.GradScaler("hybrid")
    assert not scaler.is_enabled()
    loss = torch.ones((), requires_grad=True)
    assert scaler.scale(loss) is loss
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}
    scaler.load_state_dict({})
    losses = train("hybrid", scaler, 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_scaler_has_the_recipe_s_settings(device: str | None) -> None:
    recipe = {"extends": "direct", "loss_scaling": {"init": 1024, "growth_interval": 4, "growth_factor": 4}}
    scaler = fp8fx.GradScaler(recipe, device)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert (scaler.get_scale(), scaler.get_growth_interval(), scaler.get_growth_factor()) == (1024.0, 4, 4.0)
    assert fp8fx.GradScaler(recipe, "cpu", init_scale=2.0, growth_interval=7).get_growth_interval() == 7
    losses = train(recipe, scaler, 9)
    assert scaler.get_scale() == 1024.0 * 4 * 4
    assert losses[-1] < losses[0]


def test_scaler_backs_off_at_overflow_and_skips_the_step() -> None:
    """Gradients of `direct` overflow to inf, so that a scale which is too large shrinks until training goes on."""
    scaler = fp8fx.GradScaler({"extends": "direct", "loss_scaling": {"init": 2.0**40}}, "cpu")
    losses = train({"extends": "direct"}, scaler, 40)
    assert losses[0] == losses[1]  # the first step was skipped
    assert scaler.get_scale() < 2.0**30
    assert losses[-1] < losses[0]


def test_minimum_schedule() -> None:
    recipe = {"extends": "direct", "loss_scaling": {"init": 16, "minimum": {0: 32, 2: 64, 4: 256}}}
    scaler = fp8fx.GradScaler(recipe, "cpu")
    scales = [scaler.get_scale()]
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for _ in range(5):  # every step overflows, so that the scale would halve
        parameter.grad = torch.tensor([float("inf")])
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [32.0, 32.0, 64.0, 64.0, 256.0, 256.0]


def test_static_scaling_never_moves() -> None:
    recipe = {"extends": "direct", "loss_scaling": {"mode": "static", "init": 4096, "growth_interval": 1}}
    scaler = fp8fx.GradScaler(recipe, "cpu")
    train(recipe, scaler, 4)
    assert scaler.get_scale() == 4096.0
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.tensor([float("inf")])
    scaler.step(torch.optim.SGD([parameter], lr=1.0))
    scaler.update()
    assert scaler.get_scale() == 4096.0
    assert parameter.item() == 1.0


def test_scaler_state_round_trip() -> None:
    recipe = {"extends": "direct", "loss_scaling": {"init": 64, "growth_interval": 2, "minimum": {3: 4096}}}
    scaler = fp8fx.GradScaler(recipe, "cpu")
    train(recipe, scaler, 2)
    other = fp8fx.GradScaler(recipe, "cpu")
    other.load_state_dict(scaler.state_dict())
    assert other.get_scale() == scaler.get_scale() == 128.0
    assert other.steps == 2
    train(recipe, other, 1)
    assert other.get_scale() == 4096.0
    plain = torch.amp.GradScaler("cpu").state_dict()
    other.load_state_dict(plain)  # a checkpoint from before fp8fx
    assert other.get_scale() == 65536.0


# -- underflow ------------------------------------------------------------------------------------------------------------


def test_underflow_is_warned_about_once_after_five_steps() -> None:
    off = fp8fx.GradScaler("hybrid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train("direct", off, 5, loss_factor=1e-6)
    with pytest.warns(fp8fx.FP8Warning) as caught:
        train("direct", off, 9, loss_factor=1e-6)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 1  # the layers before it get zeros, and zeros do not underflow
    assert "underflow at layer 'head': 100% of their non-zero elements became zero in e5m2, 5 steps running" in texts[0]
    assert "GradScaler(recipe='direct')" in texts[0]


def test_no_underflow_with_a_scaler_or_with_scaled_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train("direct", fp8fx.GradScaler("direct", "cpu", init_scale=2.0**26), 8, loss_factor=1e-6)
        train("hybrid", fp8fx.GradScaler("hybrid"), 8, loss_factor=1e-6)


def test_runtime_is_one_attribute() -> None:
    fast = fp8fx.compile(make())
    assert runtime_of(fast) is vars(fast)["_fp8fx_runtime"]
    assert "_fp8fx_runtime" not in vars(fp8fx.unwrap(fast))


def test_more_models_of_one_class_than_dynamo_keeps_entries_for() -> None:
    """Dynamo keeps at most 256 entries per code object, for all models of a class together; a model has a copy of its own."""
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=4):
        for _ in range(8):
            fast = fp8fx.compile(nn.Sequential(nn.Linear(4, 4)), "hybrid", fullgraph=True)
            fast(torch.randn(2, 4))
            assert fast.plan().fp8
