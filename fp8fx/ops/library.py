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

from fp8fx.ops.autograd import autograd_kernel

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
        kernel = autograd_kernel(getattr(torch.ops.fp8fx, name).default, setup_context, backward, twice)
        LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    REFERENCES[name] = reference
    return getattr(torch.ops.fp8fx, name).default


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
