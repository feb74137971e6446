"""Hooks that change what passes: registered before compiling, after it, and after the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from semantics.harness import ENTRIES, Run, Tensors, check, data, enter, seeded
from semantics.models import Mlp
from torch import Tensor, nn

import fp8fx

Handles = list[Any]


def forward_pre(model: Any) -> Handles:
    return [
        model.register_forward_pre_hook(lambda m, args: (args[0] * 0.75,)),
        model.up.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] - 0.125,), kwargs), with_kwargs=True),
    ]


def forward(model: Any) -> Handles:
    return [
        model.register_forward_hook(lambda m, args, y: y * 1.5),
        model.up.register_forward_hook(lambda m, args, y: y + 0.25),
        model.norm.register_forward_hook(lambda m, args, y: y * 0.5),
    ]


def full_backward(model: Any) -> Handles:
    return [model.up.register_full_backward_hook(lambda m, inputs, outputs: (inputs[0] * 3,))]


def full_backward_pre(model: Any) -> Handles:
    return [model.down.register_full_backward_pre_hook(lambda m, outputs: (outputs[0] * 0.5,))]


def on_root_backward(model: Any) -> Handles:
    return [model.register_full_backward_pre_hook(lambda m, outputs: (outputs[0] * 0.5,))]


def on_parameters(model: Any) -> Handles:
    def halve(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)

    return [
        model.inp.weight.register_hook(lambda g: g * 2),
        model.down.bias.register_post_accumulate_grad_hook(halve),
    ]


def on_activations(model: Any) -> Handles:
    def hook(m: nn.Module, args: Any, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda g: g * 4)

    return [model.norm.register_forward_hook(hook)]


KINDS = [forward_pre, forward, full_backward, full_backward_pre, on_root_backward, on_parameters, on_activations]


def step(run: Run) -> dict[str, Tensor | None]:
    run.model.zero_grad()
    x = run.tensor(data(4, 16).requires_grad_())
    y = run(x)
    run.loss(y).backward()
    return {"y": y.detach(), "x": x.grad, **run.gradients()}


def differ(ours: Tensors, theirs: Tensors) -> bool:
    return any(not torch.equal(ours[name], theirs[name]) for name in ours)  # type: ignore[arg-type]


LEAVES_THE_GRAPH = (full_backward, full_backward_pre)  # their layer then runs in high precision


TIMES = [
    ("before compile", "compile"),
    ("after compile", "compile"),
    ("after the first call", "compile"),
    ("after the first call", "backend"),
]


@pytest.mark.parametrize(("when", "entry"), TIMES)
@pytest.mark.parametrize("register", KINDS)
def test_hooks_act_as_on_the_plain_model(register: Callable[[Any], Handles], when: str, entry: str) -> None:
    def make() -> nn.Module:
        model = Mlp()
        if when == "before compile":
            register(model)
        return model

    def body(run: Run) -> Tensors:
        if when == "before compile":
            return step(run)
        if when == "after the first call":
            run(run.tensor(data(4, 16)))
        register(run.model)
        return step(run)

    called = check(make, body, "hybrid", entry)
    layer = "up" if register is full_backward else "down"
    row = fp8fx.plan(called)[layer]
    assert (row.decision == "not_captured") == (register in LEAVES_THE_GRAPH)
    assert ("backward hook" in row.reason) == (register in LEAVES_THE_GRAPH)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("register", [kind for kind in KINDS if kind not in LEAVES_THE_GRAPH])
def test_removed_hooks_are_gone(register: Callable[[Any], Handles], entry: str) -> None:
    def body(run: Run) -> Tensors:
        without = step(run)
        handles = register(run.model)
        hooked = step(run)
        for handle in handles:
            handle.remove()
        removed = step(run)
        assert differ(hooked, removed)
        assert not differ(without, removed)
        return {f"hooked {k}": v for k, v in hooked.items()} | {f"removed {k}": v for k, v in removed.items()}

    check(Mlp, body, "hybrid", entry)


class Feed(nn.Module):
    """A module of the user's own around two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.feed, self.head = nn.Linear(16, 16), Feed(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.feed(self.inp(x)))


def test_backward_hooks_around_layers_leave_them_in_fp8() -> None:
    """The way to look at a layer's gradients and keep it in FP8: the hook sits on a module around it, or on a tensor."""

    def body(run: Run) -> Tensors:
        run(run.tensor(data(4, 16)))
        run.model.feed.register_full_backward_hook(lambda m, inputs, outputs: (inputs[0] * 3,))
        return step(run)

    plan = fp8fx.plan(check(Around, body, "hybrid", "compile"))
    assert {row.name: row.decision for row in plan.rows} == dict.fromkeys(("inp", "feed.up", "feed.down", "head"), "fp8")


@pytest.mark.parametrize("child", ["0", "1", "2"])
def test_a_backward_hook_in_a_loop_takes_the_loop_along(child: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Feed(), nn.Linear(16, 8))
    model.get_submodule(child).register_full_backward_hook(lambda m, inputs, outputs: None)
    fast = fp8fx.compile(model, "hybrid")
    fast(torch.randn(4, 16, requires_grad=True)).sum().backward()
    decisions = {row.name: row.decision for row in fp8fx.plan(fast).rows}
    assert decisions == {"0": "not_captured", "2.up": "fp8", "2.down": "fp8", "3": "not_captured"}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(16, 16), Feed())
        self.a, self.seq, self.b = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), inner, nn.Linear(16, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.seq(self.a(x)))


@pytest.mark.filterwarnings("ignore:fp8fx. no layer runs in FP8")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("hooked", ["seq.1.1.up", "seq.1.1", "seq.1.0", "seq.1", "seq", "a"])
def test_the_plan_follows_a_hook_inside_of_a_sequential(hooked: str, late: bool) -> None:
    """Also one that came after the first call, when no graph is captured any more; what it says runs in high precision, does."""
    model = Nested()
    fast, alone = fp8fx.compile(model, "hybrid"), fp8fx.compile(model, "hybrid", exempt=["a", "b", "seq.1.1"])
    x = torch.randn(4, 16, requires_grad=True)
    for each in (fast, alone):
        if late:
            each(x).sum().backward()
        each.get_submodule(hooked).register_full_backward_hook(lambda m, inputs, outputs: None)
        each(x).sum().backward()
    left = {row.name for row in fp8fx.plan(fast).rows if row.decision == "not_captured"}
    assert left == ({"a"} if hooked == "a" else {"seq.0", "seq.1.0", "seq.2"} | {hooked} & {"seq.1.1.up"})
    assert torch.equal(alone(x), model(x)) == (hooked != "a")


class Unrolled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](self[0](x)))


def test_a_sequential_with_a_forward_of_its_own_is_no_loop() -> None:
    model = Unrolled(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    model[0].register_full_backward_hook(lambda m, inputs, outputs: None)
    fast, x = fp8fx.compile(model, "hybrid"), torch.randn(4, 16, requires_grad=True)
    fast(x).sum().backward()
    for plan in (fp8fx.plan(fast), fp8fx.plan(model, "hybrid", example_inputs=x)):
        assert {row.name: row.decision for row in plan.rows} == {"0": "not_captured", "2": "fp8"}


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
def test_symbolic_tracing_keeps_hooked_layers_in_fp8() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    model[0].register_full_backward_hook(lambda m, inputs, outputs: None)
    fast, x = fp8fx.compile(model, "hybrid", capture="symbolic"), torch.randn(4, 16, requires_grad=True)
    fast(x).sum().backward()
    assert {row.decision for row in fp8fx.plan(fast).rows} == {"fp8"}


def test_hooks_of_the_original_registered_later_are_not_the_clones() -> None:
    """The clone has the hooks that were there when it was made; each side may change its own afterwards."""
    model = seeded(Mlp)
    fast = enter(model)
    before = fast(data(4, 16))
    model.register_forward_hook(lambda m, args, y: y * 0)
    model.up.register_forward_hook(lambda m, args, y: y * 0)
    assert torch.equal(fast(data(4, 16)), before)
    assert not model(data(4, 16)).any()


def test_state_dict_hooks() -> None:
    """Each kind, before and after compiling; fp8fx's own entries pass through them like any other."""
    seen: list[str] = []

    def register(model: nn.Module, tag: str) -> None:
        model.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append(f"{tag} save pre"))
        model._register_state_dict_hook(lambda m, state, prefix, meta: seen.append(f"{tag} save"))
        model.register_state_dict_post_hook(lambda m, state, prefix, meta: state.update({f"{tag} extra": torch.ones(1)}))
        model.register_load_state_dict_pre_hook(lambda m, state, *rest: state.pop(f"{tag} extra"))
        model.register_load_state_dict_post_hook(lambda m, keys: seen.append(f"{tag} load"))

    model = seeded(Mlp)
    register(model, "before")
    fast = fp8fx.compile(model, "direct")
    register(fast, "after")
    fast(data(4, 16))
    register(fast, "late")
    saved = fast.state_dict()
    assert seen == [f"{tag} {what}" for what in ("save pre", "save") for tag in ("before", "after", "late")]
    assert {f"{tag} extra" for tag in ("before", "after", "late")} <= set(saved)
    assert set(fp8fx.state_dict(fast)) <= set(saved)
    seen.clear()
    other = seeded(Mlp, seed=1)
    register(other, "before")
    again = fp8fx.compile(other, "direct")
    for tag in ("after", "late"):
        register(again, tag)
    assert not again.load_state_dict(saved, strict=True).unexpected_keys
    assert seen == ["before load", "after load", "late load"]
    assert torch.equal(again.up.weight, fast.up.weight)


def test_global_hooks_see_every_module_once() -> None:
    """torch's own global forward hooks: the compiled model's children are seen as the plain model's are."""
    found: dict[str, list[str]] = {}
    models = {"plain": seeded(Mlp), "fast": enter(seeded(Mlp))}
    for name, model in models.items():
        names = {id(module): path for path, module in model.named_modules()}
        seen = found[name] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, y, names=names, seen=seen: seen.append(names[id(m)]))
        try:
            model(data(4, 16))
        finally:
            handle.remove()
    assert found["plain"] == found["fast"] == ["inp", "norm", "up", "down", "head", ""]
