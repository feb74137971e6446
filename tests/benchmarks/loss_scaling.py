"""Direct training of the demo's GPT without and with its loss scaler.

    python tests/benchmarks/loss_scaling.py [--steps 120] [--json FILE]

Without a scaler gradients fall below E5M2's smallest number and the layers are named; with `growth_interval: 4` the scale climbs
until gradients overflow, settles there, and training succeeds. Prints a table and PASS or FAIL.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from dataclasses import asdict, dataclass, field

import torch

import fp8fx
from fp8fx.demo.tasks import TASKS


@dataclass
class Outcome:
    """`scales`: the loss scale after each step. `warned`: the layers named by the underflow warning."""

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)


def train(steps: int, scaled: bool) -> Outcome:
    """The demo's GPT under `direct`, the loss scaled by a scaler that grows every 4 steps, or not at all."""
    recipe = {"extends": "direct", "loss_scaling": {"growth_interval": 4}}
    task = TASKS["gpt"]().with_steps(steps)
    torch.manual_seed(0)
    model = fp8fx.compile(task.build(), recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
    scaler = fp8fx.GradScaler(recipe=recipe, device="cpu", enabled=scaled)
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", fp8fx.FP8Warning)
        for inputs, labels in task.batches(steps, 0):
            loss = task.loss(model(inputs), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            outcome.losses.append(loss.item())
            outcome.scales.append(scaler.get_scale())
    outcome.warned = [str(w.message).split("'")[1] for w in seen if "underflow" in str(w.message)]
    return outcome


def settled(scales: list[float]) -> bool:
    """In the second half the scale both grew and backed off, and stayed within a factor of 16."""
    half = scales[len(scales) // 2 :]
    moved = {later > earlier for earlier, later in itertools.pairwise(half) if later != earlier}
    return moved == {True, False} and max(half) / min(half) <= 16


def main() -> int:
    from benchmark_report import writable  # not above: tests import this file by its path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--json", type=writable)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bare, scaled = train(20, scaled=False), train(args.steps, scaled=True)
    print(
        f"without scaler, 20 steps: warned about {', '.join(bare.warned) or 'no layer'}; loss {bare.losses[0]:.3f} -> {bare.losses[-1]:.3f}"
    )
    exponents = " ".join(f"{torch.tensor(s).log2().item():.0f}" for s in scaled.scales[:: max(args.steps // 30, 1)])
    print(f"with scaler, {args.steps} steps: log2 of the scale {exponents}")
    print(f"loss {scaled.losses[0]:.3f} -> {sum(scaled.losses[-10:]) / 10:.3f} (mean of the last 10)")
    checks = {
        "without a scaler a layer is named": bool(bare.warned),
        "the scale settles": settled(scaled.scales),
        "training succeeds (the loss falls by a third)": sum(scaled.losses[-10:]) / 10 < 0.67 * scaled.losses[0],
    }
    for text, passed in checks.items():
        print(f"{'PASS' if passed else 'FAIL'}  {text}")
    if args.json:
        args.json.write_text(json.dumps({"bare": asdict(bare), "scaled": asdict(scaled), "checks": checks}, indent=1))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
