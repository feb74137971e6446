"""How an operator of ours enters autograd: a `torch.autograd.Function` of its own, at the dispatcher's key for it.

What `torch.library.register_autograd` makes serves every operator, lists of tensors with gradients included: it flattens the arguments
four times a call and reads the schema's defaults anew, some 0.2 ms of the host's time for one linear layer. Ours are simpler: no list
carries a gradient, so an argument is passed on as it came, and defaults are read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8fx.errors import FP8Error

Setup = Callable[[Any, tuple[Any, ...], Any], None]
BELOW = torch._C._AutoDispatchBelowAutograd
AFTER = torch._C._after_autograd_keyset


def autograd_kernel(op: Any, setup_context: Setup, backward: Callable[..., Any], twice: bool) -> Callable[..., Any]:
    """The kernel of `op` for the key Autograd, to be registered with its keyset.

    setup_context(ctx, inputs, output) and backward(ctx, *grads) as for `register_autograd`, with None as the gradient of a list.
    twice: `backward` is itself differentiable; otherwise a second derivative raises FP8Error.
    """
    # The dispatcher leaves out arguments at the end that equal their defaults.
    defaults = tuple(argument.default_value if argument.has_default_value() else None for argument in op._schema.arguments)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *given, keyset = args
            with BELOW():
                result = op.redispatch(keyset & AFTER, *given)
                setup_context(ctx, (*given, *defaults[len(given) :]), result)
            ctx.count = len(given)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if not twice:
                _refuse_second_derivative(op._opname, grads)
            found = backward(ctx, *grads)
            found = found if isinstance(found, tuple) else (found,)
            return (*found[: ctx.count], None)

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return Gradient.apply(*args, keyset)  # type: ignore[no-untyped-call]
        with BELOW():
            return op.redispatch(keyset & AFTER, *args)

    Gradient.__name__ = Gradient.__qualname__ = f"fp8fx_{op._opname}"  # autograd's graph and anomaly mode show it
    return run


def _refuse_second_derivative(name: str, grads: tuple[Any, ...]) -> None:
    """The backward formulas call operators outside autograd: a graph of them would silently lack these sites."""
    if torch.is_grad_enabled() and any(isinstance(grad, Tensor) and grad.requires_grad for grad in grads):
        raise FP8Error(
            f"fp8fx::{name}: fp8fx operators have no second derivative, and this backward runs with create_graph=True (a gradient "
            "penalty, a Hessian). Exempt the layers it goes through (fp8fx.compile(model, exempt=[...])), or compute it on the "
            "plain model (fp8fx.unwrap)."
        )
