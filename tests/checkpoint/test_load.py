"""Loading: all or nothing, wrong uses by name."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.runs import same
from checkpoint.small import compiled, make, state, train
from safetensors.torch import save_file
from torch import Tensor, nn

import fp8fx

# -- all or nothing -------------------------------------------------------------------------------------------------------


class Fails(RuntimeError):
    pass


def fails(*_: Any) -> None:
    raise Fails("no")


@pytest.mark.parametrize("error", [Fails, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "optimizer", "scheduler", "scaler"])
def test_what_fails_on_the_way_is_taken_back(
    where: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own hooks run when everything has been checked: what they leave half done is put back."""

    def setup(seed: int, steps: int) -> tuple[Any, ...]:
        fast = compiled(seed)
        optimizer = torch.optim.AdamW(fast.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        train(fast, optimizer, steps)
        scheduler.step()
        return fast, optimizer, scheduler, fp8fx.GradScaler("direct", device="cpu", init_scale=2.0**steps)

    names = ("optimizer", "scheduler", "scaler")
    fast, *rest = setup(0, 2)
    fp8fx.save(fast, tmp_path / "a.safetensors", **dict(zip(names, rest, strict=True)))
    parts = setup(1, 3)
    loss = parts[0](torch.ones(2, 8))
    before = state(*parts)
    target: Any = dict(zip(("model", *names), parts, strict=True))[where]

    def broken(*_: Any, **__: Any) -> None:
        raise error("no")

    if where == "model":
        handle = target[2].register_load_state_dict_post_hook(broken)
    else:
        monkeypatch.setattr(type(target), "load_state_dict", broken)
    with pytest.raises(
        fp8fx.CheckpointError if error is Fails else error, match="everything is as it was before: no" if error is Fails else "no"
    ):
        fp8fx.load(tmp_path / "a.safetensors", parts[0], **dict(zip(names, parts[1:], strict=True)))
    assert same(state(*parts), before) == []
    assert torch.equal(parts[0](torch.ones(2, 8)), loss)  # scales and kept weights too
    if where == "model":
        handle.remove()
    monkeypatch.undo()
    fp8fx.load(tmp_path / "a.safetensors", parts[0], **dict(zip(names, parts[1:], strict=True)))
    assert same(state(*parts), state(fast, *rest)) == []


def test_gradients_are_those_of_the_file(tmp_path: Path) -> None:
    fast, optimizer = compiled(), None
    fast(torch.ones(2, 8)).sum().backward()
    fast[0].bias.grad = None
    fp8fx.save(fast, tmp_path / "with.safetensors")
    fp8fx.save(fast, tmp_path / "without.safetensors", gradients=False)
    assert (tmp_path / "without.safetensors").stat().st_size < (tmp_path / "with.safetensors").stat().st_size
    for name, count in (("with", 3), ("without", 0)):
        other = compiled(1)
        other(torch.ones(2, 8)).sum().backward()
        fp8fx.load(tmp_path / f"{name}.safetensors", other, optimizer=optimizer)
        assert sum(p.grad is not None for p in other.parameters()) == count
    fp8fx.load(tmp_path / "with.safetensors", other)
    assert other[0].bias.grad is None
    assert torch.equal(other[0].weight.grad, fast[0].weight.grad)
    assert other[0].weight.grad is not fast[0].weight.grad


def test_loading_in_inference_mode_leaves_a_model_that_trains(tmp_path: Path) -> None:
    fast = compiled()
    optimizer = torch.optim.AdamW(fast.parameters())
    train(fast, optimizer)
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer)
    other = compiled(1)
    made = torch.optim.AdamW(other.parameters())
    with torch.inference_mode():
        fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made)
    train(other, made)


# -- what fits and what does not ------------------------------------------------------------------------------------------


def test_the_result_says_what_was_left_out(tmp_path: Path) -> None:
    fast = compiled()
    optimizer = torch.optim.AdamW(fast.parameters())
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer, extra={"epoch": 3})
    made = fp8fx.load(tmp_path / "a.safetensors", compiled(1))
    assert (made.extra, made.unused, made.migrated, made.recipes) == ({"epoch": 3}, ["optimizer"], [], {"": "delayed"})
    assert "not loaded: optimizer" in str(made)
    with pytest.raises(fp8fx.CheckpointError, match=r"holds no scheduler: it was saved without one\. Leave out scheduler="):
        fp8fx.load(tmp_path / "a.safetensors", fast, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: make(width=6),
            r"of another model: '0.weight' is float32 \[8, 8\] there and float32 \[6, 6\] here.* and 1 more|another model",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8, bias=False)), "It has '2.bias', which this model has not"),
        (lambda: nn.Sequential(*make(), nn.Linear(8, 8)), "It lacks '3.weight', '3.bias'"),
        (lambda: nn.ModuleDict({"net": make()}), "All of this model's names seem to start with 'net.'"),
        (lambda: nn.ModuleDict({"1": nn.Linear(8, 8)}), "Did you mean"),
    ],
)
def test_other_models_are_refused(other: Any, message: str, tmp_path: Path) -> None:
    fp8fx.save(compiled(), tmp_path / "a.safetensors")
    made = fp8fx.compile(other(), "delayed")
    before = state(made)
    with pytest.raises(fp8fx.CheckpointError, match=message):
        fp8fx.load(tmp_path / "a.safetensors", made)
    assert same(state(made), before) == []


class Wrapper(nn.Module):
    """Compiled models inside a module that is not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.a, self.b, self.plain = compiled(seed), compiled(seed + 10, "direct"), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.b(self.a(x)))


def test_several_compiled_parts(tmp_path: Path) -> None:
    model, other = Wrapper(0), Wrapper(1)
    optimizer, made = (torch.optim.AdamW(m.parameters()) for m in (model, other))
    train(model, optimizer)
    model(torch.ones(2, 8)).sum().backward()
    fp8fx.save(model, tmp_path / "a.safetensors", optimizer=optimizer)
    assert fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made).recipes == {"a.": "delayed", "b.": "direct"}
    assert same(state(other, made), state(model, optimizer)) == []
    optimizer.step()
    made.step()
    train(model, optimizer)
    train(other, made)
    assert same(state(other), state(model)) == []
    with pytest.raises(fp8fx.CheckpointError, match=r"of another model"):
        fp8fx.load(tmp_path / "a.safetensors", model.a)


def test_the_bare_backend(tmp_path: Path) -> None:
    def by_backend(seed: int) -> tuple[Any, nn.Module]:
        torch._dynamo.reset()
        model = make(seed)
        return torch.compile(model, backend="fp8fx", options={"recipe": "delayed"}), model

    fast, model = by_backend(0)
    with pytest.raises(fp8fx.ModelError, match="after a first call: call it once"):
        fp8fx.save(fast, tmp_path / "a.safetensors")
    optimizer = torch.optim.AdamW(model.parameters())
    train(fast, optimizer)
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer)
    other, plain = by_backend(1)
    made = torch.optim.AdamW(plain.parameters())
    with pytest.raises(fp8fx.ModelError, match="after a first call: call it once"):
        fp8fx.load(tmp_path / "a.safetensors", other)
    other(torch.ones(2, 8))
    fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made)
    assert same(fp8fx.state_dict(other), fp8fx.state_dict(fast)) == []
    train(fast, optimizer)
    train(other, made)
    assert same(state(plain), state(model)) == []
    fp8fx.load(tmp_path / "a.safetensors", compiled(3))  # a clone takes it too: the same names, the same recipe


def test_a_model_compiled_in_place_twice() -> None:
    torch._dynamo.reset()
    model = make()
    for recipe in ("hybrid", "delayed"):
        torch.compile(model, backend="fp8fx", options={"recipe": recipe})(torch.ones(2, 8))
    with pytest.raises(fp8fx.ModelError, match="with 2 recipes or options, and has a state for each"):
        fp8fx.save(model, "a.safetensors")


def test_data_parallel_is_looked_through(tmp_path: Path) -> None:
    fast = compiled()
    fp8fx.save(nn.DataParallel(fast), tmp_path / "a.safetensors")
    fp8fx.load(tmp_path / "a.safetensors", compiled(1))


def test_model_and_path_in_either_order_or_by_name(tmp_path: Path) -> None:
    """The model first, as documented; the path first, as load once had it; names, and names beside a position."""
    calls: list[Callable[[Any, nn.Module, Any], Any]] = [
        lambda do, fast, path: do(fast, path),
        lambda do, fast, path: do(path, fast),
        lambda do, fast, path: do(fast=fast, path=path),
        lambda do, fast, path: do(fast, path=path),
        lambda do, fast, path: do(path, fast=fast),
    ]
    for seed, (save, path) in enumerate(itertools.product(calls, (tmp_path / "a.safetensors", str(tmp_path / "b.safetensors")))):
        fast = compiled(seed)
        save(fp8fx.save, fast, path)
        for load in calls:
            other = compiled(seed + 100)
            load(fp8fx.load, other, path)
            assert same(state(other), state(fast)) == []


@pytest.mark.parametrize("do", [fp8fx.save, fp8fx.load])
def test_the_number_and_the_names_of_arguments(do: Any) -> None:
    fast = compiled()
    for call, message in (
        (lambda: do(fast), "takes a model and a path, and the rest by keyword; got 1 for the two"),
        (lambda: do(fast, "a", None), "got 3 for the two"),
        (lambda: do(fast, "a", path="b"), "got 3 for the two"),
        (lambda: do(fast, "a", model=fast), "unexpected keyword argument 'model'"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda fast, path: fp8fx.save(fast, fast),
            r"fp8fx\.save\(model, path\): got two models, Sequential and Sequential; one of the two",
        ),
        (lambda fast, path: fp8fx.load(fast, path=fast), r"fp8fx\.load\(model, path\): got two models"),
        (
            lambda fast, path: fp8fx.load(fast=path, path=fast),
            "got a model as path; one of the two is the compiled model, the other the path",
        ),
        (lambda fast, path: fp8fx.load(path, path), "takes a compiled model, got a PosixPath: pass what fp8fx.compile returned"),
        (lambda fast, path: fp8fx.load(path, None), "takes a compiled model, got a NoneType"),
        (lambda fast, path: fp8fx.load(fast.state_dict(), path), "pass the model, not its state_dict"),
        (lambda fast, path: fp8fx.save(fast.state_dict(), path), "pass the model, not its state_dict"),
        (lambda fast, path: fp8fx.load(path, fast.state_dict()), "pass the model, not its state_dict"),
        (lambda fast, path: fp8fx.save(None, path), "takes a compiled model, got a NoneType"),
        (lambda fast, path: fp8fx.save(make(), path), r"not compiled by fp8fx.*for a plain model: torch\.save"),
        (lambda fast, path: fp8fx.load(path, make()), r"not compiled by fp8fx.*safetensors\.torch\.load_file"),
        (lambda fast, path: fp8fx.save(fp8fx.unwrap(fast), path), "Pass what fp8fx.compile returned"),
        (lambda fast, path: fp8fx.save(fast[0], path), "this Linear is not compiled"),
        (
            lambda fast, path: fp8fx.save(fast, path, optimizer=torch.optim.SGD(fast.parameters(), 0.1).state_dict()),
            "pass the optimizer itself",
        ),
        (lambda fast, path: fp8fx.save(fast, path, optimizer=fast), "optimizer is a Sequential, which has no param_groups"),
        (lambda fast, path: fp8fx.save(fast, path, scaler=3), "scaler is a int, which has no state_dict"),
        (lambda fast, path: fp8fx.save(fast, path, optimizer=torch.optim.SGD(make().parameters(), 0.1)), "none of the model's parameters"),
        (lambda fast, path: fp8fx.load(path.parent / "b.safetensors", fast), "no file.*b.safetensors'; in '.*' there is 'a.safetensors'"),
        (lambda fast, path: fp8fx.load(path.parent / "sub" / "b.safetensors", fast), "does not exist either"),
        (lambda fast, path: fp8fx.load(path.parent, fast), "is a directory; fp8fx.save writes one file: name that; in .*'a.safetensors'"),
        (lambda fast, path: fp8fx.load(3, fast), r"fp8fx\.load\(model, path\): path is a int"),
        (lambda fast, path: fp8fx.save(3, fast), "path is a int"),
    ],
)
def test_wrong_uses(call: Any, message: str, tmp_path: Path) -> None:
    fast = compiled()
    fp8fx.save(fast, tmp_path / "a.safetensors")
    with pytest.raises(fp8fx.FP8Error, match=message):
        call(fast, tmp_path / "a.safetensors")


def test_files_of_others(tmp_path: Path) -> None:
    fast, path = compiled(), tmp_path / "a"
    files: dict[str, Any] = {
        r"a zip file, as torch\.save.*torch\.load\(path, weights_only=True\)": lambda: torch.save(fast.state_dict(), path),
        r"a pickle, as older torch\.save": lambda: torch.save(fast.state_dict(), path, _use_new_zipfile_serialization=False),
        r"of 4 tensors that fp8fx\.save did not write.*load_file": lambda: save_file(make().state_dict(), path),
        "it is empty": lambda: path.write_bytes(b""),
        "text, perhaps JSON": lambda: path.write_text('{"a": 1}'),
        "has version '2' of the format, and this fp8fx reads version 1: install a newer fp8fx": lambda: save_file(
            make().state_dict(), path, {"fp8fx": "2"}
        ),
        "it has no manifest": lambda: save_file(make().state_dict(), path, {"fp8fx": "1"}),
    }
    for message, write in files.items():
        write()
        with pytest.raises(fp8fx.CheckpointError, match=message):
            fp8fx.load(path, fast)


def test_damage_is_said_once_and_where(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fp8fx.save(compiled(), path)
    data = bytearray(path.read_bytes())
    start = (
        8 + int.from_bytes(data[:8], "little") + json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["2.weight"]["data_offsets"][0]
    )
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(fp8fx.CheckpointError) as caught:
        fp8fx.load(path, compiled())
    assert (
        str(caught.value) == f"{str(path)!r} is damaged (the digest of '2.weight' is wrong). Nothing was loaded; take an earlier checkpoint"
    )


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom no mode keeps out."""
    from fp8fx.checkpoint import read

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    fp8fx.save(compiled(), tmp_path / "a.safetensors")
    monkeypatch.setattr(read, "open", denied, raising=False)
    with pytest.raises(fp8fx.CheckpointError, match=r"a\.safetensors' cannot be read: Permission denied"):
        fp8fx.load(tmp_path / "a.safetensors", compiled())


def test_nothing_of_the_file_is_kept(tmp_path: Path) -> None:
    """The mapped file is let go: overwriting or removing it changes no model."""
    fast, other = compiled(), compiled(1)
    optimizer = torch.optim.AdamW(fast.parameters())
    train(fast, optimizer)
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer, extra=torch.ones(1000))
    made = torch.optim.AdamW(other.parameters())
    extra = fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made).extra
    before = state(other, made)
    with open(tmp_path / "a.safetensors", "r+b") as file:
        file.write(b"\xff" * (tmp_path / "a.safetensors").stat().st_size)
    gc.collect()
    assert same(state(other, made), before) == []
    assert extra.sum() == 1000
