"""Delayed scaling: the state beside an independent oracle, step by step, and when it moves and when it does not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from delayed_oracle import DelayedOracle
from gate.stages import QUANTIZED_STAGES, run_stages
from oracle import sqnr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fp8fx
from fp8fx import watch
from fp8fx.clone import IN_PLACE, runtime_of

ALL_ROLES = {role: {"scaling": "delayed"} for role in ("input", "weight", "output", "grad_output", "grad_input", "grad_weight")}
SATURATED = {role: {"scaling": "delayed", "overflow": "saturate"} for role in ("grad_output", "grad_input", "grad_weight")}
EVERY_ROLE: dict[str, Any] = {"extends": "delayed", "defaults": {**ALL_ROLES, **SATURATED}}
RECIPES: dict[str, Any] = {
    "delayed": "delayed",
    "after": {"extends": "delayed", "delayed": {"order": "after", "history": 3}},
    "most_recent": {"extends": "delayed", "delayed": {"algorithm": "most_recent", "margin": 1}},
    "not_powers_of_two": {"extends": "delayed", "scale": {"power_of_two": False}},
    "every_role": EVERY_ROLE,
}


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = torch.matmul(self.q(h), self.k(h).transpose(-1, -2)).softmax(-1)
        x = x + torch.matmul(scores, self.v(h))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Shared inputs, products without a parameter, an mlp, a convolution, and a block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(11, 16), Block()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 11)

    def forward(self, index: Tensor) -> Tensor:
        x = self.block(self.embed(index))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.block(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(seed: int, size: int = 2) -> Tensor:
    return torch.randint(0, 11, (size, 6), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Callable[..., Tensor], index: Tensor) -> Tensor:
    return F.cross_entropy(model(index).flatten(0, 1), index.flatten())


def by_backend(model: nn.Module, recipe: Any, inner: str) -> tuple[Any, Callable[[], Any]]:
    torch._dynamo.reset()  # torch's own limit of compilations counts all models of one class
    fast = torch.compile(model, backend="fp8fx", options={"recipe": recipe, "inner": inner}, fullgraph=True)

    def runtime() -> Any:
        (made,) = IN_PLACE[model].values()
        return made

    return fast, runtime


def by_compile(model: nn.Module, recipe: Any, inner: str) -> tuple[Any, Callable[[], Any]]:
    fast = fp8fx.compile(model, recipe, inner=inner, fullgraph=True)
    return fast, lambda: runtime_of(fast)


def scales(fast: nn.Module) -> dict[str, Tensor]:
    """Everything that is kept, by `<site>.<role>.<field>`."""
    return {
        key.removeprefix("_fp8fx."): value for key, value in fp8fx.state_dict(fast).items() if key.endswith((".scale", ".history", ".amax"))
    }


def train(fast: nn.Module, steps: int, seed: int = 0, microbatches: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    for step in range(steps):
        for micro in range(microbatches):
            loss_of(fast, batch(100 * seed + 10 * step + micro)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("entry", [by_compile, by_backend])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_is_the_oracles(recipe: str, entry: Any, inner: str) -> None:
    """Five steps of two microbatches: outputs, gradients, and the scales that follow."""
    model = net()
    fast, runtime = entry(model, RECIPES[recipe], inner)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(fast, batch(0)).backward()  # captured; what it measured belongs to the first step
    oracle = DelayedOracle(copy.deepcopy(model), RECIPES[recipe], runtime().plan(), dtype=None)
    loss_of(oracle, batch(0)).backward()
    for step in range(5):
        for micro in range(2):
            index = batch(10 * step + micro + 1)
            ours, theirs = fast(index), oracle(index)
            assert sqnr(theirs, ours) > 80
            F.cross_entropy(ours.flatten(0, 1), index.flatten()).backward()
            F.cross_entropy(theirs.flatten(0, 1), index.flatten()).backward()
        for (name, mine), other in zip(model.named_parameters(), oracle.model.parameters(), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            assert sqnr(other.grad, mine.grad) > 40, name
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # the same weights: a code that flips must not grow into another run
            for mine, other in zip(model.parameters(), oracle.model.parameters(), strict=True):
                other.copy_(mine)
                other.grad = None
        oracle.end_step()
        fast(batch(0))  # the step begins
        oracle(batch(0))
        state = runtime().scaling
        for slot, row in state.slots.items():
            record = oracle.records[slot.site.removesuffix(".embedding"), slot.role]
            assert state.scale[row].item() == pytest.approx(record.scale, rel=1e-6), slot
            kept = state.history[row].tolist()
            assert kept[: len(record.history)] == pytest.approx(record.history, rel=1e-4), slot
            assert not any(kept[len(record.history) :])
    assert len(state.slots) >= 13


def test_the_plan_says_what_has_no_parameter() -> None:
    fast = fp8fx.compile(net(), "delayed")
    fast(batch(0))
    rows = {row.name: row for row in fast.plan().rows}  # type: ignore[operator]
    assert rows["block.matmul"].spec.input.scaling == "current"
    assert "no parameter, so current scaling" in rows["block.matmul"].reason
    assert rows["block.q"].spec.input.scaling == "delayed"
    assert not any("matmul" in key for key in scales(fast))


def test_one_record_serves_a_shared_input() -> None:
    fast = fp8fx.compile(net(), "delayed")
    fast(batch(0))
    held = {key.removesuffix(".scale") for key in scales(fast) if key.endswith(".scale")}
    assert {"block.q.input", "block.q.weight", "block.k.weight", "block.v.weight"} <= held
    train(fast, 2)
    kept = scales(fast)
    for other in ("block.k.input", "block.v.input"):  # it is theirs too: each may be the first reader of another graph
        assert torch.equal(kept[f"{other}.history"], kept["block.q.input.history"])
        assert torch.equal(kept[f"{other}.scale"], kept["block.q.input.scale"])


def test_microbatches_share_a_scale_and_merge_by_max() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.0)
    x = torch.ones(2, 8)
    for factor in (1.0, 5.0, 3.0):
        fast(factor * x).sum().backward()
        assert next(value for key, value in scales(fast).items() if key.endswith("input.scale")).item() == 1
    optimizer.step()
    fast(x)
    kept = next(value for key, value in scales(fast).items() if key.endswith("input.history"))
    assert kept.tolist() == [5.0, *[0.0] * 15]


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_reads_the_scales_and_changes_nothing(how: str) -> None:
    fast = fp8fx.compile(net(), EVERY_ROLE)
    train(fast, 3)
    before = {key: value.clone() for key, value in scales(fast).items()}
    outputs = []
    for seed in (1, 2, 1):
        if how == "eval":
            loss = loss_of(fast.eval(), batch(seed))
            loss.backward()
            outputs.append(loss.detach())
        else:
            with getattr(torch, how)():
                outputs.append(loss_of(fast, batch(seed)))
    assert torch.equal(outputs[0], outputs[2])
    after = scales(fast)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_goes_on_after_inference_mode_captured_it_first() -> None:
    fast = fp8fx.compile(net(), "delayed")
    with torch.inference_mode():
        fast(batch(0))
    train(fast, 2)
    assert any(value.item() != 1 for key, value in scales(fast).items() if key.endswith(".scale"))


def test_a_layer_that_is_not_reached_keeps_its_record() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            x = self.a(x)
            return self.b(x) if both else x

    torch.manual_seed(0)
    fast = fp8fx.compile(Optional(), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    x = torch.randn(4, 8)
    for both in (True, True, False, False):
        fast(x, both).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    fast(x, False)
    kept = scales(fast)
    assert torch.count_nonzero(kept["a.input.history"]) == 4
    assert torch.count_nonzero(kept["b.input.history"]) == 2
    assert kept["b.weight.scale"] != 1


def test_an_overflowed_step_does_not_spoil_the_scale() -> None:
    torch.manual_seed(0)
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.0)
    for value in (1.0, float("inf"), float("nan"), 0.0):
        fast(torch.full((2, 8), value)).sum().backward()
        optimizer.step()
    fast(torch.ones(2, 8))
    kept = scales(fast)
    assert all(torch.isfinite(value).all() and (value > 0).all() for key, value in kept.items() if key.endswith(".scale"))


class Auxiliary(nn.Module):
    """Another head in training, which reads the shared tensor first."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.main = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.aux(x) + self.main(x) if self.training else self.main(x)


def test_evaluation_that_reads_in_another_order_finds_its_scales() -> None:
    torch.manual_seed(0)
    model = Auxiliary()
    fast = fp8fx.compile(model, "delayed")
    x = torch.randn(64, 16) * 3000
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    for _ in range(3):
        fast(x).square().mean().mul(1e-8).backward()
        optimizer.step()
    fast(x)
    assert sqnr(model.eval()(x), fast.eval()(x)) > 20


def test_a_head_that_backward_does_not_reach_keeps_its_history() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    fast = fp8fx.compile(Heads(), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    for both in (True, True, False, False):
        a, b = fast(torch.randn(4, 8))
        (a.sum() + b.sum() if both else a.sum()).backward()
        optimizer.step()
    fast(torch.randn(4, 8))
    assert torch.count_nonzero(scales(fast)["a.grad_output.history"]) == 4
    assert torch.count_nonzero(scales(fast)["b.grad_output.history"]) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model_changes_nothing(reentrant: bool) -> None:
    """The scales of a step are those of its first forward, also in the recomputation, also where that alone has gradients."""
    models = [net(), net()]
    fasts = [fp8fx.compile(model, "delayed") for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for step in range(4):
        index = batch(step)
        ones = [torch.ones(1, requires_grad=True) for _ in models]  # the reentrant form wants an input with a gradient
        plain = fasts[0](index) * ones[0]
        saved = checkpoint(lambda one, index=index: fasts[1](index) * one, ones[1], use_reentrant=reentrant)
        assert torch.equal(plain, saved)
        for y, optimizer in ((plain, optimizers[0]), (saved, optimizers[1])):
            F.cross_entropy(y.flatten(0, 1), index.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other)


def test_steps_that_no_optimizer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand-written update is invisible: a warning says so, and fp8fx.step is the remedy."""
    monkeypatch.setattr(watch, "BACKWARDS", 3)
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed")

    def update(count: int) -> None:
        for _ in range(count):
            fast(torch.ones(2, 8)).sum().backward()

    update(2)
    with pytest.warns(fp8fx.FP8Warning, match=r"fp8fx\.step\(model\)"):
        update(1)
    fp8fx.step(fast)
    fast(torch.ones(2, 8))
    assert all(value != 1 for key, value in scales(fast).items() if key.endswith("input.scale"))
    with pytest.raises(fp8fx.ModelError, match="not compiled by fp8fx"):
        fp8fx.step(nn.Linear(2, 2))


def test_gradients_that_are_not_measured_warn() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    parameters = list(fast.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(fast(torch.ones(2, 8)).sum(), parameters), strict=True):
        parameter.grad = grad
    with pytest.warns(fp8fx.FP8Warning, match=r"torch\.autograd\.grad"):
        optimizer.step()


def test_evaluation_with_scales_that_were_never_set_warns_once() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed").eval()
    with pytest.warns(fp8fx.FP8Warning, match="never set: linear.input, linear.weight"):
        fast(torch.ones(2, 8))
    fast(torch.ones(2, 8))
    calibrated = fp8fx.compile(nn.Linear(8, 8), "delayed").eval()
    with fp8fx.autocast(calibrating=True):
        calibrated(torch.ones(2, 8))
    calibrated(torch.ones(2, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        fast = fp8fx.compile(nn.Linear(8, 8), "delayed")
        fast(torch.ones(2, 8)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(value.dtype == torch.float32 for value in scales(fast).values())


def test_the_models_own_entries_come_first_and_keep_their_place() -> None:
    """An average of weights that pairs the values of two state_dicts by position, one of them older, finds the weights."""
    fast = fp8fx.compile(net(), "delayed")
    before = list(fast.state_dict())
    train(fast, 2)
    after = list(fast.state_dict())
    own = [key for key in after if not key.startswith("_fp8fx.")]
    assert after[: len(own)] == own == [key for key in before if not key.startswith("_fp8fx.")]
    shapes = {key: value.shape for key, value in fp8fx.state_dict(fast).items()}
    fast(batch(1))  # a step begins
    assert {key: value.shape for key, value in fp8fx.state_dict(fast).items()} == shapes


def test_a_compiled_model_inside_another() -> None:
    outer = nn.Sequential(nn.Linear(8, 8), fp8fx.compile(nn.Linear(8, 8), "delayed"))
    outer(torch.ones(2, 8)).sum().backward()
    state = outer.state_dict()
    assert list(fp8fx.strip(state)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert fp8fx.state_dict(outer).keys() == state.keys() - fp8fx.strip(state).keys()


def test_the_state_of_the_bare_backend_can_be_saved() -> None:
    first, runtime = by_backend(net(), "delayed", "eager")
    for seed in range(2):
        loss_of(first, batch(seed)).backward()
    fp8fx.step(first)
    loss_of(first, batch(3))
    state = fp8fx.state_dict(first)
    second, other = by_backend(net(), "delayed", "eager")
    with pytest.raises(fp8fx.ModelError, match="call a model under"):
        fp8fx.load_state_dict(second, state)
    loss_of(second, batch(9))
    fp8fx.load_state_dict(second, state)
    assert torch.equal(runtime().scaling.scale, other().scaling.scale)


def test_damaged_state() -> None:
    fast = fp8fx.compile(net(), "delayed")
    train(fast, 1)
    for damaged in (torch.rand(5), torch.tensor([1, 2], dtype=torch.uint8)):
        with pytest.raises(fp8fx.ModelError, match="'delayed' of the state is damaged"):
            fast.load_state_dict({**fast.state_dict(), "_fp8fx.delayed": damaged})


def test_the_plan_notes_gradients_that_may_overflow() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), {"extends": "hybrid", "defaults": {"grad_output": {"scaling": "delayed"}}})
    fast(torch.ones(2, 8))
    assert "write overflow: saturate" in str(fast.plan())  # type: ignore[operator]


def test_training_in_eval_warns_once() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed").eval()
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    with pytest.warns(fp8fx.FP8Warning, match="never set"):
        fast(torch.ones(2, 8)).sum().backward()
    with pytest.warns(fp8fx.FP8Warning, match="trains in eval"):
        optimizer.step()
    fast(torch.ones(2, 8)).sum().backward()
    optimizer.step()


def test_two_forwards_in_flight() -> None:
    """Each backward uses the scales its own forward was given, and merges into the step it is in."""
    one, two = fp8fx.compile(net(), EVERY_ROLE), fp8fx.compile(net(), EVERY_ROLE)
    for fast in (one, two):
        train(fast, 2)
    first, second = loss_of(one, batch(7)), loss_of(one, batch(8))
    first.backward()
    second.backward()
    for seed in (7, 8):
        loss_of(two, batch(seed)).backward()
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
    assert_equal_state(one, two)


def assert_equal_state(one: nn.Module, two: nn.Module) -> None:
    a, b = fp8fx.state_dict(one), fp8fx.state_dict(two)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_state_and_goes_on_the_same(how: Any) -> None:
    fast = fp8fx.compile(net(), EVERY_ROLE)
    train(fast, 3)
    copied = how(fast)
    before = {key: value.clone() for key, value in scales(fast).items()}
    train(copied, 2, seed=1)
    assert all(torch.equal(before[key], value) for key, value in scales(fast).items())
    train(fast, 2, seed=1)
    for mine, other in zip(fast.parameters(), copied.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert_equal_state(fast, copied)


@pytest.mark.parametrize("microbatch", [0, 1])
def test_a_checkpoint_goes_on_bit_for_bit(microbatch: int) -> None:
    """Also from the middle of gradient accumulation, and from between an optimizer step and the next forward."""
    fast = fp8fx.compile(net(), EVERY_ROLE)
    optimizer = train(fast, 3)
    for seed in range(microbatch):
        loss_of(fast, batch(50 + seed)).backward()
    other = fp8fx.compile(net(), EVERY_ROLE)
    other.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert torch.equal(fast(batch(3)), other(batch(3)))  # evaluation reads the same scales
    for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    second = torch.optim.SGD(other.parameters(), 0.1)
    for model, opt in ((fast, optimizer), (other, second)):
        loss_of(model, batch(60)).backward()
        opt.step()
        opt.zero_grad()
        loss_of(model, batch(61)).backward()
    for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    assert_equal_state(fast, other)


def test_state_is_plain_tensors_and_an_original_checkpoint_loads(tmp_path: Any) -> None:
    model = net()
    fast = fp8fx.compile(model, "delayed")
    train(fast, 1)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    state = torch.load(tmp_path / "fast.pt", weights_only=True)
    assert fp8fx.strip(state).keys() == model.state_dict().keys()
    before = scales(fast)
    fast.load_state_dict(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in scales(fast).items())


def foreign(there: Any, here: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model, other = net(), net()
    saved = fp8fx.compile(other, there)
    train(saved, 1)
    loading = fp8fx.compile(model, here)
    loading(batch(0))
    return loading, saved.state_dict()


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ("delayed", "hybrid", "it holds delayed scales, and recipe 'hybrid' keeps none"),
        ("hybrid", "delayed", "it holds no delayed scales, and recipe 'delayed' keeps them"),
        ({"extends": "delayed", "delayed": {"history": 4}}, "delayed", "delayed.history is 4 there and 16 here"),
        ({"extends": "delayed", "delayed": {"order": "after"}}, "delayed", "delayed.order is 'after' there and 'before' here"),
        (
            {"extends": "delayed", "scale": {"power_of_two": False}}, "delayed",
            "weight of 'embed.embedding' is e4m3fn there and e4m3fn with powers of two here",
        ),
        ({"extends": "delayed", "defaults": {"weight": {"format": "e5m2"}}}, "delayed", "weight of 'embed.embedding' is e5m2 with powers"),
    ],
)  # fmt: skip
def test_a_state_of_another_recipe_is_refused_before_anything_is_loaded(there: Any, here: Any, message: str) -> None:
    loading, state = foreign(there, here)
    before = {key: value.clone() for key, value in loading.state_dict().items()}
    with pytest.raises(fp8fx.ModelError, match="this state is of another recipe: ") as caught:
        loading.load_state_dict(state)
    assert message in str(caught.value)
    assert "fp8fx.strip(state)" in str(caught.value)
    for key, value in loading.state_dict().items():
        assert torch.equal(before[key], value), key
    loading.load_state_dict(fp8fx.strip(state))


def test_a_format_that_no_graph_has_met_yet_is_refused_at_the_first_call() -> None:
    saved = fp8fx.compile(net(), {"extends": "delayed", "defaults": {"weight": {"format": "e5m2"}}})
    train(saved, 1)
    fresh = fp8fx.compile(net(), "delayed")
    fresh.load_state_dict(saved.state_dict())
    with pytest.raises(
        fp8fx.ModelError, match=r"of another recipe: weight of 'embed.embedding' is e5m2 with powers of two there and e4m3fn"
    ):
        fresh(batch(0))


@pytest.mark.parametrize("recipe", ["delayed", "every_role"])
def test_same_bits_and_same_amax_after_every_pass(recipe: str) -> None:
    amax: dict[str, Tensor] = {}
    fasts: list[Any] = []
    compile_ = fp8fx.compile
    model = net().train()

    def watched(*args: Any, **kwargs: Any) -> Any:
        fasts.append(compile_(*args, **kwargs))
        return fasts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8fx, "compile", watched)
        results = run_stages(model, RECIPES[recipe], (batch(0),), on_stage=lambda stage: amax.update({stage: _taken(fasts[0])}))
    for stage in QUANTIZED_STAGES[1:]:
        assert torch.equal(amax[stage], amax[QUANTIZED_STAGES[0]]), stage
        for ours, theirs in zip(results[stage][0], results[QUANTIZED_STAGES[0]][0], strict=True):
            assert torch.equal(ours, theirs), stage
        for name, grad in results[stage][1].items():
            assert torch.equal(grad, results[QUANTIZED_STAGES[0]][1][name]), (stage, name)
    assert (amax["lower"] >= 0).all()


def _taken(fast: Any) -> Tensor:
    """This step's amax, which is then forgotten."""
    state = runtime_of(fast).scaling
    taken: Tensor = state.amax.clone()
    state.amax.fill_(-1)
    return taken


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_measure_and_round_as_plain_ones(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, index: Tensor) -> Tensor:
            x = checkpoint(self.block, self.embed(index), use_reentrant=reentrant)
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
            return self.head(checkpoint(self.block, x, use_reentrant=reentrant))

    model = net()
    torch.manual_seed(0)
    saving = Checkpointed()
    fasts = [fp8fx.compile(m, EVERY_ROLE) for m in (model, saving)]
    for fast in fasts:
        train(fast, 3)
    for mine, other in zip(model.parameters(), saving.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert_equal_state(*fasts)


def test_kept_weights_follow_the_scales() -> None:
    """Evaluation between an optimizer step and the next forward keeps weights under the old scales: they must not outlive them."""
    kept, fresh = (fp8fx.compile(net(), {"extends": "delayed", "defaults": {"weight_cache": c}}) for c in ("step", "none"))
    for fast in (kept, fresh):
        optimizer = train(fast, 2)
        loss_of(fast, batch(1)).backward()
        optimizer.step()
        with torch.no_grad():
            fast(batch(2))
        loss_of(fast, batch(3))
    assert torch.equal(kept(batch(4)), fresh(batch(4)))


def test_a_tied_weight_has_one_scale_and_its_two_gradients_have_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.embed(index))

    torch.manual_seed(0)
    fast = fp8fx.compile(Tied(), "delayed")
    train(fast, 2)
    loss_of(fast, batch(1)).backward()
    records = {key.removesuffix(".scale") for key in scales(fast) if key.endswith(".scale")}
    assert {key for key in records if key.endswith("weight")} == {"embed.embedding.weight", "head.weight"}
    gradients = {key: scales(fast)[f"{key}.amax"].item() for key in records if key.endswith("grad_output")}
    assert len(gradients) == len(set(gradients.values())) == 2


def test_dynamic_sizes_share_the_records() -> None:
    fast = fp8fx.compile(net(), "delayed", dynamic=True)
    count = None
    for size in (2, 3, 5):
        loss_of(fast, batch(size, size)).backward()
        count = count or len(scales(fast))
        assert len(scales(fast)) == count
    assert len(runtime_of(fast).graphs) == 1
