"""`fp8fx.qat`: a model whose formats are trained with its weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fp8fx import formats
from fp8fx.clone import BASE, QUANTIZERS, RUNTIME, base_class, compiled_class
from fp8fx.compile import RecipeLike
from fp8fx.errors import FormatError, ModelError, allowed, nearest
from fp8fx.qat.quantizer import LearnedQuantizer, Quantizers
from fp8fx.recipe import Recipe
from fp8fx.recipe.load import is_path
from fp8fx.search.candidates import MAX_VALUES, candidates, errors, ranked
from fp8fx.search.data import Forward, batches_of, check_runs, run_all
from fp8fx.search.measure import Sample, Sampling
from fp8fx.search.result import document_of, rule_of
from fp8fx.search.run import ROLES
from fp8fx.search.taps import Operand, Product, Site, TapRuntime, tapped

M = TypeVar("M", bound=nn.Module)
LEARNED = ("max_value", "mantissa_bits")


class QatRuntime(TapRuntime):
    """Rounds operands and outputs of every tapped site with the model's LearnedQuantizers. `handler`, where there is one, comes first."""

    def handle(self, site: Site, x: Tensor, w: Tensor, product: Product) -> Tensor:
        if self.handler is not None:
            return self.handler(site, x, w, product)
        known = self.root._modules.get(QUANTIZERS)
        if not isinstance(known, Quantizers):
            return product(x, w)
        rounded = [_rounded(known, site, operand, value) for operand, value in zip(site.operands, (x, w), strict=True)]
        return _rounded(known, site, site.output, product(*rounded))


def _rounded(known: Quantizers, site: Site, operand: Operand | None, value: Tensor) -> Tensor:
    """The operand (or output) on its learned grid; as it is where nothing rounds it, or calibration never met it."""
    quantizer = None if operand is None else known.get(site.name, operand.role)
    if operand is None or quantizer is None:
        return value
    return operand.restore(quantizer(operand.rows(value)), value)


def qat(
    model: M,
    recipe: RecipeLike = "hybrid",
    *,
    data: Any,
    learn: str | Sequence[str] = ("max_value",),
    exempt: Sequence[Any] = (),
    batches: int | None = None,
    forward: Forward | None = None,
    samples: int = 32768,
) -> M:
    """A clone of `model` that rounds weights, inputs and outputs to grids which are trained with the weights, where `recipe` rounds them.

    recipe: as for fp8fx.compile, or the name of a format for inputs and weights, or a dict of role (input, weight, output) to format.
    What it says of formats and granularities is where training starts; of scaling and gradients nothing is used: gradients stay in high
    precision. Layers with an arithmetic or with e8m0 scales are refused: `recipe()` could not say what was trained.
    learn: max_value, the largest value of each grid, or, for scales per row or block, its ratio to each one's own largest magnitude;
    mantissa_bits, how the bits of each format are split into exponent and mantissa. What is not named keeps its first value.
    data, batches, forward: as for fp8fx.search; the largest values start with the least mean square error on about `samples` elements.

    The clone has the model's own Parameters, and those of its quantizers (float32 scalars, in parameters() and in the state_dict under
    `_fp8fx_qat.`, which fp8fx.strip takes away). Any optimizer trains it. `.recipe()` is what was learned: fp8fx.compile(model, learned)
    runs the same grids, and under fp8fx.autocast(enabled=False) it runs in high precision.
    Raises ModelError for data, arguments, and models without a layer to quantize; RecipeError and FormatError.
    """
    learned = _learned(learn)
    loaded = recipe_of(recipe).with_overrides(exempt=exempt)
    found = batches_of(data, batches)
    runtime = QatRuntime(loaded)
    fast = tapped(model, runtime)
    check_runs(model, found, forward)
    fast.__class__ = trainable_class(type(model))
    runtime.handler = sampling = Sampling(lambda site, role: role in ROLES, max(samples // len(found), 1))
    flags = [(module, module.training) for module in fast.modules()]
    run_all(fast.eval(), found, forward)
    for module, flag in flags:
        module.training = flag
    for site in runtime.sites.values():
        _check_honoured(site)
    known = Quantizers()
    for (name, role), sample in sampling.samples.items():
        if sample.parts:
            known.add(name, role, _start(sample, "mantissa_bits" in learned))
    if not len(known.by_name):
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in runtime.plan().rows[:4])
        raise ModelError(
            f"fp8fx.qat: no layer has a quantized input, weight or output under this recipe, so there is nothing to learn. {reasons}"
        )
    known.requires_grad_("max_value" in learned)
    for quantizer in known.by_name.values():
        if quantizer.mantissa_bits is not None:
            quantizer.mantissa_bits.requires_grad_()
    fast._modules[QUANTIZERS] = known.to(sample.parts[0].device)
    runtime.handler = None
    return cast(M, fast)


def _learned(learn: str | Sequence[str]) -> tuple[str, ...]:
    found = (learn,) if isinstance(learn, str) else tuple(learn)
    for word in found:
        if word not in LEARNED:
            raise ModelError(f"fp8fx.qat(learn=...): got {word!r}, allowed are {allowed(LEARNED)}.{nearest(word, LEARNED)}")
    if not found:
        raise ModelError(f"fp8fx.qat(learn=...): nothing to learn; allowed are {allowed(LEARNED)}, one or both")
    return found


def _check_honoured(site: Site) -> None:
    """ModelError where the recipe asks a layer for what training does not do: what is learned would not describe what was trained."""
    spec, asked = site.spec, {}
    if spec.arithmetic is not None:
        asked["arithmetic"] = (spec.arithmetic, "training multiplies exactly", "arithmetic: none")
    for role in site.roles():
        own = getattr(spec, role)
        if own.scale_format != "float32":
            said = f"scale_format: {own.scale_format}"
            asked[role] = (said, "the scales of what is learned are float32", f"{role}: {{scale_format: float32}}")
    for key, (value, instead, write) in asked.items():
        raise ModelError(
            f"fp8fx.qat: the recipe gives layer {site.name!r} {key}: {value}, and {instead}, so that the learned recipe would not "
            f"describe what was trained. Write `{write}` for it, or leave the layer out with exempt=[{site.name!r}]"
        )


def recipe_of(recipe: RecipeLike) -> Recipe:
    """A recipe, or `hybrid` with other formats of input and weight, and of the output where it is named."""
    if isinstance(recipe, str) and recipe not in Recipe.shipped() and not is_path(recipe):
        try:
            name = formats.get(recipe).name
        except FormatError as error:
            shipped = f"{allowed(Recipe.shipped())}{nearest(recipe, Recipe.shipped()).replace(' Did', '; did')}"
            raise ModelError(f"fp8fx.qat: {recipe!r} is neither a shipped recipe ({shipped}) nor a format: {error}") from None
        recipe = dict.fromkeys(("input", "weight"), name)
    if isinstance(recipe, Mapping) and set(recipe) & set(ROLES) and (unknown := [key for key in recipe if key not in ROLES]):
        hint = nearest(unknown[0], ROLES)
        raise ModelError(f"fp8fx.qat: unknown role {unknown[0]!r} beside a format; allowed: {allowed(ROLES)}.{hint}")
    if isinstance(recipe, Mapping) and recipe and set(recipe) <= set(ROLES) and all(isinstance(v, str) for v in recipe.values()):
        recipe = {"extends": "hybrid", "defaults": {role: {"format": name} for role, name in recipe.items()}}
    return Recipe.load(recipe)


def _start(sample: Sample, learn_mantissa: bool) -> LearnedQuantizer:
    """The quantizer whose largest value has the least error on the sample, of the base recipe's format and granularity."""
    spec = getattr(sample.site.spec, sample.role)
    spec = dataclasses.replace(spec, granularity="tensor") if sample.flat else spec
    if sample.largest == 0.0:  # all zeros: any grid holds them
        return LearnedQuantizer(spec, 1.0, learn_mantissa)
    top = torch.full((), sample.largest, dtype=torch.float32, device=sample.parts[0].device)
    best = ranked(errors(sample.rows(), candidates(spec.format, [spec.granularity], MAX_VALUES), top))[0].candidate
    return LearnedQuantizer(spec, best.fraction * (sample.largest if spec.granularity == "tensor" else 1.0), learn_mantissa)


def learned_recipe(model: nn.Module) -> Recipe:
    """The recipe of a model made by `qat`, with each layer's learned formats as rules."""
    runtime = vars(model)[RUNTIME]
    known = cast(Quantizers, model._modules[QUANTIZERS])
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rules: dict[str, dict[str, Any]] = {}
    for site, role, quantizer in known.items():
        if not quantizer.finite:
            raise ModelError(
                f"layer {site!r}: what is learned for its {role} is no longer finite, {quantizer}, so that there is no recipe of it. "
                "Training diverged: go back to an earlier state, with a lower learning rate for fp8fx.quantizer_parameters(model)"
            )
        rules.setdefault(site, rule_of(site, parameters))[role] = quantizer.entry()
    for rule in rules.values():
        rule["reason"] = "learned"
    return Recipe.load(document_of(runtime.recipe, (), list(rules.values())))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def trainable_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of what `qat` makes of a `base`: a compiled class with `recipe()`. It is copied and pickled as such."""
    if base not in _CLASSES:
        compiled = compiled_class(base)

        def reduce(self: nn.Module, protocol: Any = None) -> Any:
            return _rebuild, (base,), self.__getstate__()  # type: ignore[operator]

        def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            known = self._modules.get(QUANTIZERS)
            if isinstance(known, Quantizers):
                known.check_state(state_dict, f"{prefix}{QUANTIZERS}.")
            compiled._load_from_state_dict(self, state_dict, prefix, *rest)

        members = {BASE: base, "__reduce_ex__": reduce, "__module__": base.__module__, "__qualname__": base.__qualname__}
        members["_load_from_state_dict"] = load
        if not hasattr(base, "recipe"):
            members["recipe"] = functools.wraps(learned_recipe)(lambda self: learned_recipe(self))
        _CLASSES[base] = type(base.__name__, (compiled,), members)
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = trainable_class(base)
    return cls.__new__(cls)


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned parameters of a model made by `qat`, for a group of their own in an optimizer (no weight decay, another rate)."""
    known = model._modules.get(QUANTIZERS)
    if known is None:
        raise ModelError(f"this {base_class(model).__name__} was not made by fp8fx.qat: it has no learned formats")
    return [parameter for parameter in known.parameters() if parameter.requires_grad]
