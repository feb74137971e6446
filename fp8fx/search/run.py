"""`fp8fx.search`: a format, a largest value and a granularity for every layer and role, by the error they make on calibration data."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp8fx.compile import RecipeLike
from fp8fx.errors import ModelError, allowed, nearest
from fp8fx.recipe import Recipe
from fp8fx.search.candidates import FORMATS, MAX_VALUES, Candidate, Found, candidates, errors, ranked
from fp8fx.search.data import Forward, batches_of, call, check_runs, run_all
from fp8fx.search.measure import Key, OutputErrors, Outputs, Quantized, Sample, Sampling
from fp8fx.search.progress import progress as progress_bar
from fp8fx.search.result import Choice, SearchResult
from fp8fx.search.taps import Operand, Site, TapRuntime, tapped
from fp8fx.sensitivity.files import check_place
from fp8fx.spec import ROLES as ALL_ROLES
from fp8fx.spec import Granularity

SHORTLIST = 3  # largest values per format and granularity, by the tensor's own error, whose error in the output is measured
ROLES = ("input", "weight", "output")
GRADIENTS = tuple(role for role in ALL_ROLES if role not in ROLES)


def search(
    model: nn.Module,
    data: Any,
    *,
    formats: Iterable[str] = FORMATS,
    granularities: Iterable[Any] = ("tensor",),
    max_values: Iterable[float] = MAX_VALUES,
    roles: Sequence[str] = ROLES,
    objective: str = "mse",
    inputs: str = "quantized",
    scaling: str = "fixed",
    base: RecipeLike = "hybrid",
    exempt: Sequence[Any] = (),
    layers: str | Sequence[str] = "*",
    batches: int | None = None,
    forward: Forward | None = None,
    samples: int = 32768,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Search the best combination for every layer and role that `base` quantizes. The model is not changed; it runs in evaluation mode.

    data: a tensor, a dict of keyword arguments, or an iterable of batches, of which the first `batches` are used (all without it).
    forward(model, batch) calls the model where a batch is not its arguments.
    formats, granularities, max_values: the search space; max_values are fractions of the largest magnitude.
    roles: of input, weight and output those to search; a role is searched where `base` quantizes it. layers: globs of layers to search;
    the others, and those in `exempt`, keep what `base` says.
    objective: mse, the error of each tensor, on about `samples` elements of it; or output, the error in the layer's output against its
    high-precision output, layer by layer in execution order, each role with the others in high precision.
    inputs: for `output`. quantized: a layer gets what the layers before it, quantized as chosen, give; float: what they give unquantized.
    scaling: fixed writes the largest value into the recipe (one scale per tensor only); current lets each tensor's own magnitude
    set it, times the fraction found.
    out: a file for the recipe, written when all is done, whole or not at all; its place is checked first.

    Raises ModelError for data or a search space that is empty or cannot be used, and where there is nothing to search; RecipeError and
    FormatError for a base or formats that are none; FP8Error for an `out` that cannot be written.
    """
    if out is not None:
        check_place(out)
    _check_words(objective=objective, inputs=inputs, scaling=scaling)
    wanted_roles = _roles(roles)
    space = candidates(formats, granularities, max_values)
    recipe = Recipe.load(base)
    found = batches_of(data, batches)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    runtime = TapRuntime(recipe.with_overrides(exempt=exempt))
    fast = tapped(model, runtime).eval()

    def wanted(site: Site, role: str) -> bool:
        return role in wanted_roles and any(fnmatch.fnmatchcase(site.name, pattern) for pattern in patterns)

    sampling = Sampling(wanted, max(samples // len(found), 1))
    check_runs(model, found, forward)
    runtime.handler = sampling
    run_all(fast, found, forward)
    _check_found(runtime, sampling, patterns, wanted_roles)
    searcher = _Searcher(fast, runtime, found, forward, space, scaling)
    choices = searcher.by_mse(sampling.samples, progress) if objective == "mse" else searcher.by_output(sampling.samples, inputs, progress)
    said = f"{objective}{f' (inputs {inputs})' if objective == 'output' else ''}, base {recipe.name}, {len(found)} batches"
    searched = {key[0] for key in sampling.samples}
    left = [
        f"{row.name}: {row.reason if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns) else 'left out by layers=...'}"
        for row in runtime.plan().rows
        if row.name not in searched
    ]
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    result = SearchResult(choices, recipe, objective, list(exempt), said, left, parameters)
    if out is not None:
        result.save(out)
    return result


def _check_words(**given: str) -> None:
    words = {"objective": ("mse", "output"), "inputs": ("quantized", "float"), "scaling": ("fixed", "current")}
    for key, value in given.items():
        if value not in words[key]:
            raise ModelError(f"fp8fx.search({key}={value!r}): allowed are {allowed(words[key])}.{nearest(value, words[key])}")


def _roles(roles: Sequence[str]) -> tuple[str, ...]:
    found = (roles,) if isinstance(roles, str) else tuple(roles)
    if not found:
        raise ModelError("the search space is empty: roles has no entry")
    for role in found:
        if role not in ROLES:
            raise ModelError(f"fp8fx.search(roles=...): got {role!r}; the roles that can be searched are {allowed(ROLES)}.{_why_not(role)}")
    return found


def _why_not(role: str) -> str:
    if role in GRADIENTS:
        return " Gradients are there in training only, and change as it goes: give them scaling: current or delayed"
    return nearest(role, ROLES)


def _check_found(runtime: TapRuntime, sampling: Sampling, patterns: Sequence[str], roles: Sequence[str]) -> None:
    """Something was sampled, and every pattern of `layers` matched."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in runtime.sites) and pattern != "*":
            raise ModelError(f"layers: no layer that is quantized matches {pattern!r}.{nearest(pattern, runtime.sites)}")
    if not any(sample.parts for sample in sampling.samples.values()):
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in runtime.plan().rows[:4])
        raise ModelError(f"there is nothing to search: no layer has a quantized {allowed(roles)} under this base recipe. {reasons}")


def fits(candidate: Candidate, operand: Operand, site: Site, flat: bool = False) -> bool:
    """Whether this operand can have the candidate's granularity."""
    block: Granularity = candidate.granularity
    if block == "tensor":
        return True
    if flat or operand.layout == "none" or site.op == "grouped_mm":
        return False
    return block == "row" if operand.layout in ("tail", "turned_tail") or site.op == "embedding" else True


class _Searcher:
    """One search after its samples are taken."""

    def __init__(
        self, fast: nn.Module, runtime: TapRuntime, batches: list[Any], forward: Forward | None, space: list[Candidate], scaling: str
    ) -> None:
        self.fast, self.runtime, self.batches, self.forward = fast, runtime, batches, forward
        self.space, self.scaling = space, scaling

    def by_mse(self, samples: dict[Key, Sample], progress: bool) -> list[Choice]:
        choices = []
        with progress_bar("search", len(samples), progress) as advance:
            for key, sample in samples.items():
                if sample.parts:
                    choices.append(self.choice(sample, ranked(self.errors(sample))))
                advance(".".join(key))
        return choices

    def errors(self, sample: Sample) -> list[Found]:
        space = [c for c in self.space if all(fits(c, o, sample.site, sample.flat) for o in sample.site.having(sample.role))]
        if not space:
            kinds = ", ".join(sorted({c.text for c in self.space}))
            raise ModelError(
                f"the search space has nothing for the {sample.role} of layer {sample.site.name!r} ({sample.site.op}): it takes only one "
                f"scale per tensor, and the space holds {kinds}. Add 'tensor' to granularities, or leave the layer out"
            )
        top = torch.full((), sample.largest, dtype=torch.float32, device=sample.parts[0].device)
        return errors(sample.rows(), space, top)

    def choice(self, sample: Sample, order: Sequence[Found]) -> Choice:
        spec = getattr(sample.site.spec, sample.role)
        fixed = self.scaling == "fixed" and order[0].candidate.granularity == "tensor" and sample.largest > 0.0
        runner_up = order[1] if len(order) > 1 else None
        return Choice(sample.site.name, sample.site.op, sample.role, order[0], runner_up, sample.largest, fixed, spec)

    def by_output(self, samples: dict[Key, Sample], inputs: str, progress: bool) -> list[Choice]:
        names = list(dict.fromkeys(name for name, _ in samples))
        keys = {name: [key for key in samples if key[0] == name and samples[key].parts] for name in names}
        spaces = {key: shortlist(self.errors(samples[key])) for name in names for key in keys[name]}
        largest = {key: samples[key].largest for key in spaces}
        steps = len(names) if inputs == "quantized" else len(self.batches)
        with progress_bar("search", steps, progress) as advance, torch.no_grad():
            if inputs == "float":
                measured = self.runtime.handler = OutputErrors(spaces, largest)
                for number, batch in enumerate(self.batches):
                    call(self.fast, batch, self.forward, number)
                    advance(f"batch {number}")
                return [self.choice(samples[key], ranked(measured.found(key))) for key in spaces]
            choices: list[Choice] = []
            for name in names:
                chosen = {(c.layer, c.role): (c.candidate, c.largest) for c in choices}
                found = self.one_layer(name, {key: spaces[key] for key in keys[name]}, largest, chosen)
                choices += [self.choice(samples[key], ranked(found.found(key))) for key in keys[name]]
                advance(name)
        return choices

    def one_layer(
        self, name: str, spaces: dict[Key, list[Candidate]], largest: dict[Key, float], chosen: dict[Key, tuple[Candidate, float]]
    ) -> OutputErrors:
        """Output errors of one layer behind the quantized ones, against its output in the high-precision model."""
        measured = OutputErrors(spaces, largest)
        for number, batch in enumerate(self.batches):
            outputs: list[Tensor] = []
            self.runtime.handler = kept = Outputs(name)
            call(self.fast, batch, self.forward, number)
            outputs += kept.kept
            measured.targets = outputs
            self.runtime.handler = Quantized(chosen, measured)
            call(self.fast, batch, self.forward, number)
        return measured


def shortlist(found: Sequence[Found]) -> list[Candidate]:
    """Of every format and granularity the SHORTLIST largest values with the least error of the tensor itself."""
    kinds: dict[tuple[str, Granularity], list[Found]] = {}
    for each in found:
        kinds.setdefault(each.candidate.kind, []).append(each)
    return [each.candidate for group in kinds.values() for each in sorted(group, key=lambda each: each.mse)[:SHORTLIST]]
