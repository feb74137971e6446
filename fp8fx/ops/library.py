"""How an fp8fx operator is registered: schema, reference, shapes and autograd formula in one call, one page per operator.

Operators live in `torch.library`, so Dynamo, AOTAutograd, Inductor and `opcheck` all know them, and a device adds a faster
implementation of the same schema without a graph changing. The reference is what the operator *means*; it runs on every
device that has no implementation of its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from fp8fx.errors import FP8Error

LIBRARY = torch.library.Library("fp8fx", "DEF")

# Operator name -> reference function. Tests read it to look inside an operator (which operands does it really multiply?).
REFERENCES: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    twice: bool = False,
) -> Any:
    """Register `fp8fx::<schema>` and return the callable operator.

    Without `backward` the operator is outside autograd: its outputs never require a gradient, whatever its inputs do.
    `twice`: the backward formula is itself differentiable (it is plain torch), so that a second derivative is exact.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fp8fx::{name}", fake, lib=LIBRARY)
    if setup_context is None or backward is None:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # nothing to run there, nothing to pay for it
    else:
        setup_context, backward = _with_lists(setup_context, backward, name, twice)
        torch.library.register_autograd(f"fp8fx::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    REFERENCES[name] = reference
    return getattr(torch.ops.fp8fx, name).default


def _with_lists(
    setup_context: Callable[..., None], backward: Callable[..., Any], name: str, twice: bool
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """torch wants a list of None as the gradient of a Tensor[] argument; no list of ours carries a gradient."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lengths = [len(a) if isinstance(a, list) and all(isinstance(t, torch.Tensor) for t in a) else None for a in inputs]
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not twice:
            _refuse_second_derivative(name, grads)
        results = backward(ctx, *grads)
        return tuple(r if n is None else [None] * n for r, n in zip(results, ctx.lengths, strict=True))

    return setup, run


def _refuse_second_derivative(name: str, grads: tuple[Any, ...]) -> None:
    """The backward formulas call operators outside autograd: a graph of them would silently lack these sites."""
    if torch.is_grad_enabled() and any(isinstance(grad, torch.Tensor) and grad.requires_grad for grad in grads):
        raise FP8Error(
            f"fp8fx::{name}: fp8fx operators have no second derivative, and this backward runs with create_graph=True (a gradient "
            "penalty, a Hessian). Exempt the layers it goes through (fp8fx.compile(model, exempt=[...])), or compute it on the "
            "plain model (fp8fx.unwrap)."
        )


def without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference's own fp32 arithmetic must not be cast down by an autocast region around the model."""

    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        with autocast_off(args):
            return reference(*args, **kwargs)

    return run


def autocast_off(args: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for the device of the first tensor in `args`, where it is on; otherwise nothing."""
    device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
