"""The plan: one row per layer, what it does and why, and totals. Prints as a table, saves as JSON."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from fp8fx.hooked import HOOKED, QUANTIZABLE
from fp8fx.passes.contract import Skip
from fp8fx.pipeline import Annotated
from fp8fx.recipe import Recipe, Unmatched
from fp8fx.spec import ROLES, SiteSpec, TensorSpec


@dataclass(frozen=True)
class SiteRow:
    """One layer. `decision` is fp8, exempt, high_precision or not_captured; `flops` is the forward GEMM's, over all calls."""

    name: str
    op: str
    shape: str
    decision: str
    formats: str
    reason: str
    flops: int
    calls: int = 1
    spec: SiteSpec | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a row of its own: a tied table is an embedding and a linear layer, under one name."""
        return self.name, self.op, self.decision

    @property
    def grad_format(self) -> str:
        return self.spec.grad_output.format if self.spec is not None and self.spec.grad_output is not None else ""

    @property
    def fp8_flops(self) -> float:
        """FLOPs in FP8: of three equal GEMMs, those the recipe runs in FP8 with two quantized operands."""
        if self.decision != "fp8" or self.spec is None:
            return 0.0
        s = self.spec
        operands = {"output": (s.input, s.weight), "grad_input": (s.grad_output, s.weight), "grad_weight": (s.grad_output, s.input)}
        return self.flops * sum(gemm in s.gemms and None not in operands[gemm] for gemm in operands) / 3


def formats_of(spec: SiteSpec | None, op: str = "") -> str:
    """`e4m3fn x e4m3fn, grad e5m2`: input x weight, then what else is rounded. Scales finer than one per tensor: `e4m3fn/1x128`; made
    otherwise than from amax: `int8/row/mse`, `int8/max 6`.

    `delayed` where any role's scale is.
    """
    if spec is None:
        return ""
    named = {role: _format_of(tensor) for role in ROLES if (tensor := getattr(spec, role)) is not None}
    roles = ("weight",) if op == "embedding" else ("input", "weight")
    operands = " x ".join(named.get(role, "high precision") for role in roles) if named.keys() & set(roles) else ""
    output = [f"output {named['output']}"] if "output" in named else []
    grad = [f"grad {named['grad_output']}"] if "grad_output" in named else []
    high = [g for g in ("output", "grad_input", "grad_weight") if g not in spec.gemms]
    kept = [f"{', '.join(high)} GEMM in high precision"] if high and named.keys() >= {"input", "weight"} else []
    delayed = ["delayed"] if any(tensor is not None and tensor.scaling == "delayed" for tensor in map(spec.__getattribute__, ROLES)) else []
    study = [] if spec.arithmetic is None else [f"arithmetic {spec.arithmetic}"]
    return ", ".join([*([operands] if operands else []), *output, *grad, *delayed, *kept, *study])


def _format_of(spec: TensorSpec) -> str:
    parts = [spec.format] if spec.granularity == "tensor" else [spec.format, spec.text.split("/")[2]]
    parts += [f"max {spec.max_value:g}"] if spec.max_value is not None else []
    parts += [f"p{spec.percentile:g}" if spec.statistic == "percentile" else spec.statistic] if spec.statistic != "max" else []
    parts += [f"clip {spec.clip:g}"] if spec.clip != 1.0 else []
    parts += ["e8m0"] if spec.scale_format == "e8m0" else []
    return "/".join(parts)


def site_rows(annotated: Iterable[Annotated]) -> list[SiteRow]:
    """Rows of one graph; a layer called several times is one row, if every call does the same operation and is decided alike."""
    rows: dict[tuple[str, str, str], SiteRow] = {}
    for site in annotated:
        made = site.decision
        row = SiteRow(made.name, made.op, site.shape, made.mode, formats_of(made.spec, made.op), made.reason, site.flops, 1, made.spec)
        old = rows.get(row.key)
        rows[row.key] = row if old is None else replace(old, flops=old.flops + row.flops, calls=old.calls + 1)
    return list(rows.values())


def build_plan(
    graphs: Sequence[list[SiteRow]],
    skips: Sequence[list[Skip]],
    root: nn.Module,
    recipe: Recipe,
    notes: Sequence[str] = (),
    hooked: Collection[str] = (),
) -> Plan:
    """Rows of all graphs in the order of capture. A graph captured again (other shapes, no_grad) adds no row twice.

    hooked: layers that have left the graphs since they got a backward hook.
    """
    rows: dict[tuple[str, str, str], SiteRow] = {}
    for graph in graphs:
        for row in graph:
            if row.name in hooked:
                row = replace(row, decision="not_captured", formats="", reason=HOOKED, spec=None)
            rows.setdefault(row.key, row)
    said = [[skip.reason for skip in group if skip.rule == "recipe"] for group in skips]
    of_graphs = [note for group in said for note in group if not isinstance(note, Unmatched) or all(note in other for other in said)]
    notes = list(dict.fromkeys([*of_graphs, *notes]))
    left = list(dict.fromkeys(f"{skip.node}: {skip.rule}: {skip.reason}" for group in skips for skip in group if skip.rule != "recipe"))
    return Plan(
        recipe.name, [*rows.values(), *_not_captured(root, {row.name for row in rows.values()}, hooked)], notes, left, captured=bool(graphs)
    )


def _not_captured(root: nn.Module, rows: set[str], hooked: Collection[str]) -> list[SiteRow]:
    """Layers of the model that no captured graph holds: not called, or called where capture could not follow."""
    names: dict[int, list[str]] = {}
    modules = dict(root.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, QUANTIZABLE):
            names.setdefault(id(module), []).append(name)
    found = []
    layers = [f"{name!r}, {type(module).__name__}" for name, module in modules.items() if isinstance(module, nn.RNNBase)]
    recurrent = f"; TorchDynamo leaves a forward alone that calls a recurrent layer ({layers[0]})" if layers else ""
    for aliases in names.values():
        inside = any(not name or row == name or row.startswith(name + ".") for name in aliases for row in rows)
        of_attention = any(isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention) for name in aliases)
        if not inside and not of_attention:
            module = modules[aliases[0]]
            reason = HOOKED if aliases[0] in hooked else f"not called so far, or called outside every captured graph{recurrent}"
            found.append(SiteRow(aliases[0], type(module).__name__, "", "not_captured", "", reason, 0))
    return found


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a model. `notes` come from the recipe, `skips` from passes that left something alone."""

    recipe: str
    rows: list[SiteRow]
    notes: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    captured: bool = True

    def __getitem__(self, name: str) -> SiteRow:
        """The row of one layer, by name; the first, where it has several."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def of(self, decision: str) -> list[SiteRow]:
        return [row for row in self.rows if row.decision == decision]

    @property
    def fp8(self) -> list[SiteRow]:
        return self.of("fp8")

    @property
    def exempt(self) -> list[SiteRow]:
        return self.of("exempt")

    @property
    def not_captured(self) -> list[SiteRow]:
        return self.of("not_captured")

    @property
    def flops(self) -> int:
        """Forward FLOPs of all linear, convolution, matmul and bmm sites; fused attention is counted apart."""
        return sum(row.flops for row in self.rows if row.op != "attention")

    @property
    def attention_flops(self) -> int:
        return sum(row.flops for row in self.rows if row.op == "attention")

    @property
    def exempt_flops(self) -> int:
        return sum(row.flops for row in self.exempt if row.op != "attention")

    @property
    def fp8_flops_share(self) -> float:
        """Share of the non-exempt FLOPs that run in FP8, 0 to 1; 0 if there are none."""
        rest = self.flops - self.exempt_flops
        return sum(row.fp8_flops for row in self.rows if row.op != "attention") / rest if rest else 0.0

    @property
    def summary(self) -> str:
        """`224 of 226 layers, 98.7% of FLOPs in FP8; 2 exempt; 0 fell back`."""
        fell_back, missing = len(self.of("high_precision")), len(self.not_captured)
        layers = f"{len(self.fp8)} of {len(self.rows)} layers"
        counted = "captured non-exempt" if missing else "non-exempt"  # what was not captured has no FLOPs here
        share = f", {self.fp8_flops_share:.1%} of {counted} FLOPs in FP8" if self.flops else " in FP8, FLOPs not known"
        text = f"{layers}{share}; "
        text += f"{len(self.exempt)} exempt; {fell_back} fell back"
        return text + (f"; {missing} not captured" if missing else "")

    def table(self) -> Table:
        table = Table(title=f"fp8fx plan, recipe {self.recipe}", title_justify="left", box=None, pad_edge=False)
        for heading, justify in (("layer", "left"), ("op", "left"), ("shape", "left"), ("decision", "left"), ("formats", "left")):
            table.add_column(heading, justify=justify, no_wrap=heading == "layer", overflow="fold")  # type: ignore[arg-type]
        table.add_column("FLOPs", justify="right")
        table.add_column("reason", overflow="fold")
        total = self.flops or 1
        for row in self.rows:
            calls = f" (x{row.calls})" if row.calls > 1 else ""
            share = f"{row.flops / total:.1%}" if row.flops and row.op != "attention" else ""
            table.add_row(row.name, row.op, row.shape + calls, row.decision, row.formats, share, row.reason)
        return table

    def totals(self) -> list[str]:
        total = self.flops or 1
        lines = [self.summary]
        if self.flops:
            lines.append(f"FLOPs per forward: {self.flops:,}; exempt {self.exempt_flops / total:.1%}")
        if self.attention_flops:
            lines.append(f"fused attention, listed apart: {self.attention_flops:,} FLOPs")
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=160, no_color=True)
        console.print(self.table())
        for line in self.totals():
            console.print(line, highlight=False, markup=False)
        return out.getvalue()

    def to_json(self) -> str:
        rows = [{**asdict(row), "spec": None if row.spec is None else _spec_json(row.spec)} for row in self.rows]
        totals = {
            "layers": len(self.rows),
            "fp8_layers": len(self.fp8),
            "exempt_layers": len(self.exempt),
            "not_captured_layers": len(self.not_captured),
            "flops": self.flops,
            "exempt_flops": self.exempt_flops,
            "attention_flops": self.attention_flops,
            "fp8_flops_share": self.fp8_flops_share,
        }
        return json.dumps({"recipe": self.recipe, "totals": totals, "rows": rows, "notes": self.notes, "skips": self.skips}, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON if `path` ends in .json, else the printed table."""
        Path(path).write_text(self.to_json() if str(path).endswith(".json") else str(self), encoding="utf-8")


def _spec_json(spec: SiteSpec) -> dict[str, object]:
    roles = {role: getattr(spec, role).text for role in ROLES if getattr(spec, role) is not None}
    study = {} if spec.arithmetic is None else {"arithmetic": spec.arithmetic}
    return {**roles, "gemms": list(spec.gemms), **study}
