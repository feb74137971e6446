"""Handlers for taps: samples of every operand and output, and the error a candidate makes in a layer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp8fx.errors import ModelError
from fp8fx.search.candidates import Candidate, Found, rounded
from fp8fx.search.taps import Operand, Product, Site

Key = tuple[str, str]  # site, role
CONTIGUOUS = 128  # rows side by side in a sample, so that blocks of up to this many rows are whole


@dataclass
class Sample:
    """What calibration saw of one role of one site: some of its rows, and the largest magnitude of all."""

    site: Site
    role: str
    parts: list[Tensor] = field(default_factory=list)
    largest: float = 0.0
    flat: bool = False  # sizes of the contraction differ from call to call, so that only one scale per tensor can serve

    def add(self, rows: Tensor, elements: int) -> None:
        """Keep rows of about `elements` elements, evenly spread over `rows` [R, K]."""
        self.largest = max(self.largest, float(rows.abs().amax()))
        some = _some(rows, elements).float().clone()
        if self.parts and some.shape[-1] != self.parts[0].shape[-1] and not self.flat:
            self.flat, self.parts = True, [part.reshape(-1, 1) for part in self.parts]
        self.parts.append(some.reshape(-1, 1) if self.flat else some)

    def rows(self) -> Tensor:
        """[R, K]; [elements, 1] where calls disagree about K."""
        return torch.cat(self.parts)


def _some(rows: Tensor, elements: int) -> Tensor:
    """Groups of neighbouring rows, evenly spread; all rows where they are few."""
    wanted = max(elements // max(rows.shape[-1], 1), 1)
    if wanted >= rows.shape[0]:
        return rows
    size = min(CONTIGUOUS, wanted)
    groups = max(wanted // size, 1)
    starts = torch.linspace(0, rows.shape[0] - size, groups, device=rows.device).long()
    picked = (starts.unsqueeze(1) + torch.arange(size, device=rows.device)).flatten()
    return rows[picked]


class Sampling:
    """Collects a Sample of every role of every wanted site, and changes nothing. Weights are looked at once."""

    def __init__(self, wanted: Callable[[Site, str], bool], elements: int) -> None:
        self.wanted = wanted
        self.elements = elements  # per call of a site
        self.samples: dict[Key, Sample] = {}

    def __call__(self, site: Site, x: Tensor, w: Tensor, product: Product) -> Tensor:
        for operand, value in zip(site.operands, (x, w), strict=True):
            if operand is not None and operand.spec is not None and self.wanted(site, operand.role):
                self._add(site, operand, value.detach())
        y = product(x, w)
        if site.output.spec is not None and self.wanted(site, "output"):
            self._add(site, site.output, y.detach())
        return y

    def _add(self, site: Site, operand: Operand, value: Tensor) -> None:
        sample = self.samples.setdefault((site.name, operand.role), Sample(site, operand.role))
        if value.numel() == 0 or (operand.role == "weight" and sample.parts):
            return
        if not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise ModelError(
                f"layer {site.name!r}: {count} of the {value.numel()} elements of its {operand.role} are NaN or inf in calibration, before "
                "anything is quantized. Look for the first layer of the model that gives such values, or leave it out with exempt=[...]"
            )
        sample.add(operand.rows(value), self.elements)


def apply(candidate: Candidate | None, operand: Operand | None, x: Tensor, largest: float) -> Tensor:
    """`x` as `operand` of its site, on the candidate's grid; x itself for None. `largest` counts for one scale per tensor."""
    if candidate is None or operand is None or operand.spec is None:
        return x
    top = torch.full((), largest, dtype=torch.float32, device=x.device)
    rows = rounded(operand.rows(x.detach()), candidate, top)
    return operand.restore(rows, x).to(x.dtype)


class Quantized:
    """Runs every site that has been decided with its choice; `at` sees the others. choices: (site, role) -> (candidate, largest)."""

    def __init__(self, choices: Mapping[Key, tuple[Candidate, float]], at: Callable[[Site, Tensor, Tensor, Product], Tensor]) -> None:
        self.choices, self.at = choices, at

    def __call__(self, site: Site, x: Tensor, w: Tensor, product: Product) -> Tensor:
        chosen = [self.choices.get((site.name, operand.role)) if operand is not None else None for operand in site.operands]
        output = self.choices.get((site.name, "output"))
        if not any(chosen) and output is None:
            return self.at(site, x, w, product)
        pairs = zip(chosen, site.operands, (x, w), strict=True)
        y = product(*(value if choice is None else apply(choice[0], operand, value, choice[1]) for choice, operand, value in pairs))
        return y if output is None else apply(output[0], site.output, y, output[1])


class OutputErrors:
    """Sums, over calls, the squared error that each candidate of each role makes in the output of the sites it is asked about.

    Each role is judged with all else in high precision. target: the outputs to be met, in the order of the calls; without it,
    the product of what reaches the site.
    """

    def __init__(self, spaces: Mapping[Key, Sequence[Candidate]], largest: Mapping[Key, float]) -> None:
        self.spaces, self.largest = spaces, largest
        self.sums: dict[Key, list[float]] = {key: [0.0] * len(space) for key, space in spaces.items()}
        self.power: dict[Key, float] = dict.fromkeys(spaces, 0.0)
        self.elements: dict[Key, int] = dict.fromkeys(spaces, 0)
        self.targets: list[Tensor] | None = None

    def __call__(self, site: Site, x: Tensor, w: Tensor, product: Product) -> Tensor:
        y = product(x, w)
        keys = [(site.name, role) for role in site.roles() if (site.name, role) in self.spaces]
        if not keys:
            return y
        target = (y if self.targets is None else self.targets.pop(0)).double()
        for key in keys:
            self.power[key] += float(target.square().sum())
            self.elements[key] += target.numel()
            for place, candidate in enumerate(self.spaces[key]):
                made = self._output(site, key, candidate, (x, w, y), product)
                self.sums[key][place] += float((made.double() - target).square().sum())
        return y

    def _output(self, site: Site, key: Key, candidate: Candidate, values: tuple[Tensor, Tensor, Tensor], product: Product) -> Tensor:
        """The output of the site where what has this role is on the candidate's grid; values: x, w and the product y of both."""
        if key[1] == "output":
            return apply(candidate, site.output, values[2], self.largest[key])
        operands = [
            apply(candidate, operand, value, self.largest[key]) if operand is not None and operand.role == key[1] else value
            for operand, value in zip(site.operands, values[:2], strict=True)
        ]
        return product(*operands)

    def found(self, key: Key) -> list[Found]:
        """Mean squared error of the output, per candidate of this site and role."""
        count = max(self.elements[key], 1)
        pairs = zip(self.spaces[key], self.sums[key], strict=True)
        return [Found(candidate, total / count, self.power[key] / count) for candidate, total in pairs]


class Outputs:
    """Keeps the outputs of one site, in the order of its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: list[Tensor] = []

    def __call__(self, site: Site, x: Tensor, w: Tensor, product: Product) -> Tensor:
        y = product(x, w)
        if site.name == self.name:
            self.kept.append(y.detach())
        return y
