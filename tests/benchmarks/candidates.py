"""What the benchmarks compare: bf16, fp8fx under a recipe, torchao.float8, by name.

bf16                       torch.compile of the model
bf16-eager                 the model
RECIPE                     fp8fx.compile under a shipped recipe, with Inductor
RECIPE-eager               the same, the rewritten graph run as it is
RECIPE-fast                fast accumulation in all three GEMMs
RECIPE-saved               save_activation_inputs: fp8
RECIPE-keep                weight_transpose: keep
RECIPE-graphs              inside CUDA graphs, inner_mode: reduce-overhead; also bf16-graphs, the same of torch.compile
                           (changes combine: delayed-fast-graphs)
torchao-RECIPE             convert_to_float8_training (tensorwise, rowwise, rowwise_with_gw_hp) under torch.compile
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fp8fx

BF16, BF16_EAGER, TORCHAO, GRAPHS = "bf16", "bf16-eager", "torchao-", "-graphs"
TORCHAO_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
CHANGES: dict[str, dict[str, Any]] = {
    "fast": {"accumulate": {"output": "fast", "grad_input": "fast", "grad_weight": "fast"}},
    "saved": {"save_activation_inputs": "fp8"},
    "keep": {"weight_transpose": "keep"},
}
# direct has no scales: a loss scaler keeps gradients in the range of E5M2. Here dy, which is about 1 / 4096, is multiplied by hand.
LOSS_SCALES = {"direct": 2.0**14}


@dataclass(frozen=True)
class Compiled:
    """A model to run. `step` ends an optimizer step; `loss_scale` multiplies dy, and so all gradients."""

    run: Callable[[Tensor], Tensor]
    step: Callable[[], None]
    loss_scale: float = 1.0


def candidate(name: str) -> str:
    """An argument: a name that `compiled` knows."""
    recipes = [recipe for recipe in fp8fx.Recipe.shipped() if "-" not in recipe]
    plain = [BF16, BF16_EAGER, BF16 + GRAPHS, *(TORCHAO + recipe for recipe in TORCHAO_RECIPES)]
    base, *changes = name.split("-")
    known = base in recipes and (changes == ["eager"] or {*changes} <= {*CHANGES, "graphs"})
    if not known and name not in plain:
        endings = ", ".join(f"-{change}" for change in (*CHANGES, "graphs"))
        raise argparse.ArgumentTypeError(
            f"no candidate {name!r}; there are {', '.join(plain)}, and {', '.join(recipes)}, these also with -eager or any of {endings}"
        )
    return name


def recipe_of(name: str) -> Any:
    """The recipe a candidate's name asks for."""
    base, *changes = name.split("-")
    defaults = {key: value for change in changes for key, value in CHANGES.get(change, {}).items()}
    return {"extends": base, "defaults": defaults} if defaults else base


def compiled(name: str, model: nn.Module, inner: str = "inductor", inner_mode: str | None = None) -> Compiled:
    """`model` as candidate `name`. torchao changes it in place. Raises ImportError where torchao is not installed.

    inner: the compiler behind torch.compile and fp8fx; inner_mode: a mode of Inductor, for all but the eager ones.
    """
    inner_mode = "reduce-overhead" if GRAPHS.strip("-") in name.split("-") else inner_mode
    mode = {} if inner_mode is None else {"mode": inner_mode}
    if name == BF16_EAGER:
        return Compiled(model, lambda: None)
    if name.startswith(TORCHAO):
        model = _torchao(model, name.removeprefix(TORCHAO))
    if name in (BF16, BF16 + GRAPHS) or name.startswith(TORCHAO):
        return Compiled(torch.compile(model, backend=inner, fullgraph=True, **mode), lambda: None)  # type: ignore[call-overload]
    eager = name.endswith("-eager")
    base = name.partition("-")[0]
    how = {"inner": "eager"} if eager else {"inner": inner, "inner_mode": inner_mode}
    fast = fp8fx.compile(model, base if eager else recipe_of(name), fullgraph=True, **how)  # type: ignore[arg-type]
    return Compiled(fast, lambda: fp8fx.step(fast), LOSS_SCALES.get(base, 1.0))


def _torchao(model: nn.Module, recipe: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        return convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
