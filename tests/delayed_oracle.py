"""Delayed scaling beside fp8fx: the oracle with a record per (site, role) in plain Python, and its own rule for the next scale.

Shares no arithmetic with fp8fx: amax in numpy, exponents by math.frexp, rounding by ml_dtypes (tests/oracle.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from oracle import Oracle
from oracle_rounding import LARGEST, Method, Role
from torch import Tensor, nn

import fp8fx

ROLES = ("input", "weight", "output", "grad_output", "grad_input", "grad_weight")
FORMATS = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@dataclass
class Record:
    scale: float = 1.0
    history: list[float] = field(default_factory=list)  # newest first
    amax: float | None = None  # of this step


@dataclass(frozen=True)
class Kept:
    """A role whose scale is kept, or (`record` None) follows from this tensor, as powers of two where `power_of_two`."""

    format: Any
    saturate: bool
    power_of_two: bool
    record: Record | None

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = self.codes(x)
        return codes * scale

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.detach().to(torch.float32).numpy()
        amax = float(np.abs(values).max()) if values.size else 0.0
        if self.record is None:
            scale = _scale(self.format, max(amax, 1e-12), self.power_of_two)
        else:
            scale = self.record.scale
            self.record.amax = max(amax, self.record.amax or 0.0)
        largest = np.float32(LARGEST[self.format])
        with np.errstate(all="ignore"):
            scaled = values * (np.float32(1) / np.float32(scale))
            if self.saturate:
                scaled = np.clip(scaled, -largest, largest)
            codes = scaled.astype(self.format).astype(np.float32)
        return torch.from_numpy(codes).to(x.dtype), torch.tensor(scale, dtype=x.dtype)


def _scale(format: Any, amax: float, power_of_two: bool, margin: int = 0) -> float:
    """The multiplier that brings codes back."""
    quotient = np.float32(LARGEST[format]) / np.float32(amax)
    if power_of_two:
        return 2.0 ** (margin - (math.frexp(float(quotient))[1] - 1))
    return float(np.float32(1) / np.float32(quotient * np.float32(2.0**-margin)))


class DelayedOracle(Oracle):
    """`model` under a recipe with delayed roles. `end_step()` where fp8fx would begin the next step."""

    def __init__(self, model: nn.Module, recipe: Any, decisions: Any, dtype: torch.dtype | None = torch.float64) -> None:
        super().__init__(model, recipe, decisions, dtype)
        self.recipe = fp8fx.Recipe.load(recipe)
        self.records: dict[tuple[str, str], Record] = {}

    def _method(self, op: str, weight: Tensor) -> Method | None:
        if super()._method(op, weight) is None:
            return None
        name = self.seen[-1]
        assert self.rows is not None
        rows = next(self.rows[alias] for alias in self._aliases(name) if alias in self.rows)
        spec = next((row for row in rows if row.op == op), rows[0]).spec
        return Method(**{role: self._role(name, role, getattr(spec, role)) for role in ROLES})

    def _role(self, name: str, role: str, spec: Any) -> Role | None:
        if spec is None:
            return None
        record = self.records.setdefault((name, role), Record()) if spec.scaling == "delayed" else None
        return Kept(FORMATS[spec.format], spec.overflow == "saturate", spec.power_of_two, record)  # type: ignore[return-value]

    def end_step(self) -> None:
        rule, power_of_two = self.recipe.delayed, self.recipe.scale.power_of_two
        rows = [row for same in (self.rows or {}).values() for row in same if row.spec]
        formats = {
            (row.name, role): getattr(row.spec, role).format for row in rows for role in ROLES if getattr(row.spec, role) is not None
        }
        for key, record in self.records.items():
            if record.amax is None:
                continue
            rolled = [record.amax, *record.history][: rule.history]
            read = rolled if rule.order == "before" else record.history
            record.history, record.amax = rolled, None
            chosen = (max(read) if rule.algorithm == "max" else read[0]) if read else 0.0
            if 0 < chosen < math.inf:
                record.scale = _scale(FORMATS[formats[key]], chosen, power_of_two, rule.margin)
