"""fp8fx.autocast: a compiled model in high precision, or calibrating, without another capture."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from oracle import sqnr
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.autocast import mode
from fp8fx.clone import runtime_of

EVERY_ROLE: dict[str, Any] = {
    "extends": "delayed",
    "defaults": {
        "output": {"scaling": "delayed"},
        **{role: {"scaling": "delayed", "overflow": "saturate"} for role in ("grad_output", "grad_input", "grad_weight")},
    },
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.down = nn.Embedding(11, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = x + torch.matmul(x, x.transpose(1, 2)).softmax(-1) @ x
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(size: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(0, 11, (size, 6), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, index: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(index).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("recipe", ["hybrid", "direct", "delayed"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("calibrating", [False, True])
def test_off_and_calibrating_are_the_plain_model(recipe: str, inner: str, calibrating: bool) -> None:
    model = net()
    fast = fp8fx.compile(model, recipe, inner=inner, fullgraph=True)
    wanted, plain = model(batch()), gradients(model, batch())
    rounded, fp8 = fast(batch()), gradients(fast, batch())
    with fp8fx.autocast(enabled=False, calibrating=calibrating):
        torch.testing.assert_close(fast(batch()), wanted)
        for ours, theirs in zip(gradients(fast, batch()), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert sqnr(wanted, rounded) < 60
    if recipe != "delayed":  # its scales have moved
        assert torch.equal(fast(batch()), rounded)
        assert all(torch.equal(a, b) for a, b in zip(gradients(fast, batch()), fp8, strict=True) if recipe == "hybrid")
    assert len(runtime_of(fast).graphs) == 1


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_nothing_is_captured_again_and_sizes_stay_symbolic(inner: str) -> None:
    """A version made later holds for every size its graph does, not for those of the call that asked for it."""
    model = net()
    fast = fp8fx.compile(model, "delayed", inner=inner, fullgraph=True, dynamic=True)
    fast(batch(2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (3, 5):
            for off in (fp8fx.autocast(enabled=False), fp8fx.autocast(calibrating=True)):
                with off:
                    ours, theirs = fast(batch(size)), model(batch(size))
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
                    ours.square().sum().backward()
            fast(batch(size)).sum().backward()
    assert len(runtime_of(fast).graphs) == 1


def test_regions_nest_and_restore_on_exceptions() -> None:
    assert mode() == "fp8"
    with fp8fx.autocast(enabled=False):
        with fp8fx.autocast():
            assert mode() == "fp8"
            with fp8fx.autocast(enabled=True, calibrating=True):
                assert mode() == "calibrating"
            assert mode() == "fp8"
        assert mode() == "off"
        with pytest.raises(KeyError), fp8fx.autocast(calibrating=True):
            raise KeyError
        assert mode() == "off"
    assert mode() == "fp8"


def test_one_region_may_be_entered_again() -> None:
    region = fp8fx.autocast(enabled=False)
    with region, fp8fx.autocast(), region:
        assert mode() == "off"
    assert mode() == "fp8"


def test_a_region_that_is_left_late_takes_its_own_away() -> None:
    def suspended() -> Any:
        with fp8fx.autocast(enabled=False):
            yield

    generator = suspended()
    next(generator)
    with fp8fx.autocast(calibrating=True):
        generator.close()
        assert mode() == "calibrating"
    assert mode() == "fp8"


def test_as_a_decorator() -> None:
    @fp8fx.autocast(enabled=False)
    def evaluate() -> str:
        return mode()

    assert (evaluate(), mode(), evaluate()) == ("off", "fp8", "off")


def test_threads_have_their_own() -> None:
    fast = fp8fx.compile(net(), "hybrid")
    fp8 = fast(batch())
    with fp8fx.autocast(enabled=False):
        off = fast(batch())
    inside, done = threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}

    def other() -> None:
        with fp8fx.autocast(enabled=False):
            inside.set()
            done.wait(30)
            found["off"] = fast(batch())

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(30)
    found["fp8"] = fast(batch())
    done.set()
    thread.join()
    assert torch.equal(found["fp8"], fp8)
    assert torch.equal(found["off"], off)
    assert not torch.equal(fp8, off)


def test_a_backward_runs_as_its_forward_did() -> None:
    model = net()
    fast = fp8fx.compile(model, "hybrid")
    plain = gradients(model, batch())
    fast.zero_grad()
    with fp8fx.autocast(enabled=False):
        loss = fast(batch()).square().sum()
    loss.backward()
    for ours, theirs in zip(fast.parameters(), plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-4)


def kept(fast: nn.Module) -> dict[str, Tensor]:
    return {
        key.removeprefix("_fp8fx."): value for key, value in fp8fx.state_dict(fast).items() if key.endswith((".scale", ".history", ".amax"))
    }


def test_calibrating_measures_every_role_that_forward_and_backward_reach() -> None:
    """amax of the plain model's own tensors, caught by hooks, merged over both batches; the scales follow."""
    model, seen = net(), dict[str, float]()

    def see(name: str, value: Tensor) -> None:
        seen[name] = max(seen.get(name, 0.0), value.detach().abs().max().item())

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            see(f"{name}.input", args[0])
            see(f"{name}.output", output)
            see(f"{name}.weight", module.weight)  # type: ignore[arg-type]
            output.register_hook(lambda grad: see(f"{name}.grad_output", grad))
            args[0].register_hook(lambda grad: None)

        return hook

    layers = ("up", "down", "conv")
    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    for seed in (1, 2):
        model.zero_grad()
        model(batch(seed=seed)).square().sum().backward()
        for name in layers:
            see(f"{name}.grad_weight", model.get_submodule(name).weight.grad)  # type: ignore[arg-type]
    for hook in hooks:
        hook.remove()
    fast = fp8fx.compile(model, EVERY_ROLE)
    with fp8fx.autocast(calibrating=True):
        for seed in (1, 2):
            fast(batch(seed=seed)).square().sum().backward()
    state = kept(fast)
    for name, value in seen.items():
        site, role = name.split(".")
        if role == "output" and f"{site}.output.scale" not in state:  # fused into what reads it: not quantized, so not measured
            continue
        assert state[f"{name}.history"][0].item() == pytest.approx(value, rel=1e-4), name
        largest = 57344 if role.startswith("grad") else 448
        assert largest / 2 < value / state[f"{name}.scale"].item() <= largest
    assert {key.rsplit(".", 2)[1] for key in state} == {"input", "weight", "output", "grad_output", "grad_input", "grad_weight"}
    assert state["up.grad_input.history"][0] > 0


@pytest.mark.parametrize("order", ["before", "after"])
def test_calibrate_save_load_run(order: str, tmp_path: Any) -> None:
    """Calibrated in evaluation, saved, and run elsewhere: the scales are those of calibration, and stay."""
    recipe = {"extends": "delayed", "delayed": {"order": order}}
    fast = fp8fx.compile(net().eval(), recipe)
    with torch.no_grad(), fp8fx.autocast(enabled=False, calibrating=True):
        for seed in (1, 2, 3):
            fast(batch(seed=seed))
    torch.save(fast.state_dict(), tmp_path / "calibrated.pt")
    state = kept(fast)
    assert all(value != 1 for key, value in state.items() if key.endswith(("input.scale", "weight.scale")))
    other = fp8fx.compile(Net().eval(), recipe)
    other.load_state_dict(torch.load(tmp_path / "calibrated.pt", weights_only=True))
    with torch.no_grad():
        outputs = [other(batch(seed=seed)) for seed in (5, 6)]
        assert all(torch.equal(ours, fast(batch(seed=seed))) for ours, seed in zip(outputs, (5, 6), strict=True))
        for ours, seed in zip(outputs, (5, 6), strict=True):
            assert sqnr(fp8fx.unwrap(fast)(batch(seed=seed)), ours) > 17
    assert all(torch.equal(state[key], value) for key, value in kept(other).items())


def test_calibrating_a_recipe_without_delayed_scaling_keeps_nothing() -> None:
    fast = fp8fx.compile(net(), "hybrid")
    with fp8fx.autocast(calibrating=True):
        fast(batch()).sum().backward()
    assert list(fp8fx.state_dict(fast)) == ["_fp8fx.stream"]


@pytest.mark.parametrize("arguments", [{"enabled": "no"}, {"calibrating": 1}])
def test_arguments_are_bool(arguments: Any) -> None:
    with pytest.raises(fp8fx.ModelError, match=r"fp8fx\.autocast\((enabled|calibrating)=\.\.\.\): got .*, allowed are True and False"):
        fp8fx.autocast(**arguments)


def test_symbolic_capture_switches_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fast = fp8fx.compile(model, "delayed", capture="symbolic")
    x = torch.randn(4, 8)
    assert fast(x).shape == (4, 4)
    with fp8fx.autocast(calibrating=True):
        assert torch.equal(fast(x), model(x))
    assert sqnr(model(x), fast(x)) > 20


def test_under_the_bare_backend() -> None:
    torch._dynamo.reset()
    model = net()
    fast: Any = torch.compile(model, backend="fp8fx", options={"recipe": "hybrid", "inner": "eager"}, fullgraph=True)
    fp8 = fast(batch())
    with fp8fx.autocast(enabled=False):
        off = fast(batch())
    assert torch.equal(off, net()(batch()))
    assert not torch.equal(fp8, off)
