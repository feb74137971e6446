"""LoRA through peft: frozen base layers and small adapters, both in FP8; adapters switched, disabled and merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from semantics.harness import ENTRIES, WAYS, Run, Tensors, check, data
from semantics.models import Mlp
from torch import Tensor, nn

import fp8fx

LAYERS = ["up", "down"]


def with_adapters(count: int = 1) -> nn.Module:
    """`peft` starts B at zero, so that its gradient hides A's: both are made random here."""
    model: Any = get_peft_model(Mlp(), LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, lora_dropout=0.0))
    for number in range(1, count):
        model.add_adapter(f"other{number}", LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model


def step(run: Run) -> dict[str, Tensor | None]:
    run.model.zero_grad()
    y = run(run.tensor(data(4, 16)))
    if y.requires_grad:
        run.loss(y).backward()
    return {"y": y.detach(), **run.gradients()}


def numbered(*steps: Tensors) -> Tensors:
    return {f"{n} {name}": value for n, tensors in enumerate(steps) for name, value in tensors.items()}


def trains(run: Run) -> Tensors:
    """Two optimizer steps: only adapters have gradients, and only they move."""
    base = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.05 / run.scale)
    steps = []
    for _ in range(2):
        steps.append(step(run))
        optimizer.step()
    assert all(torch.equal(base[name], p) for name, p in run.model.named_parameters() if name in base)
    assert {name for name, g in steps[0].items() if g is not None and name != "y"} == {
        f"base_model.model.{layer}.lora_{which}.default.weight" for layer in LAYERS for which in "AB"
    }
    return numbered(*steps)


@pytest.mark.parametrize(("recipe", "entry"), WAYS)
def test_lora_trains_adapters_only(recipe: str, entry: str) -> None:
    called = check(with_adapters, trains, recipe, entry)
    names = {row.name.removeprefix("base_model.model.") for row in fp8fx.plan(called).fp8}
    assert names == {"inp", "head", *(f"{layer}.{part}" for layer in LAYERS for part in ("base_layer", "lora_A.default", "lora_B.default"))}


def switches(run: Run) -> Tensors:
    """The first adapter, the second, none, and the first again."""
    model = run.model
    steps = [step(run)]
    model.set_adapter("other1")
    steps.append(step(run))
    with model.disable_adapter():
        steps.append(step(run))
    model.set_adapter("default")
    steps.append(step(run))
    assert not torch.equal(steps[0]["y"], steps[1]["y"])  # type: ignore[arg-type]
    assert torch.equal(steps[0]["y"], steps[3]["y"])  # type: ignore[arg-type]
    return numbered(*steps)


@pytest.mark.parametrize("entry", ENTRIES)
def test_adapters_are_switched_and_disabled(entry: str) -> None:
    check(lambda: with_adapters(2), switches, "hybrid", entry)


def merges(run: Run) -> Tensors:
    """Merged into the base weights and out of them again, in evaluation, where quantized weights are kept.

    peft writes through `.data`, which leaves no trace on the tensor: hence `fp8fx.invalidate`.
    """
    model = run.model.eval()
    found: dict[str, Tensor | None] = {}
    with torch.no_grad():
        for number, adapter in enumerate(("default", "other1")):
            model.set_adapter(adapter)
            for change in (None, "merge_adapter", "unmerge_adapter"):
                if change is not None:
                    getattr(model, change)()
                    if run.around is None and run.dtype is torch.float32:
                        fp8fx.invalidate(run.call)
                found[f"{number} {change}"] = run(run.tensor(data(4, 16))).clone()
    assert not torch.equal(found["0 None"], found["0 merge_adapter"])  # type: ignore[arg-type]
    assert not torch.equal(found["0 merge_adapter"], found["1 merge_adapter"])  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("entry", ENTRIES)
def test_adapters_are_merged_and_unmerged(entry: str) -> None:
    check(lambda: with_adapters(2), merges, "hybrid", entry)


def test_adapters_alone_are_exempt() -> None:
    called = check(with_adapters, trains, "hybrid", "compile", exempt=["*lora_*"])
    plan = fp8fx.plan(called)
    assert {row.name.split(".")[3] for row in plan.exempt} == {"lora_A", "lora_B"}
    assert len(plan.fp8) == 4
