"""The operators of a rewritten graph, `torch.ops.fp8fx.*`: one page each, with schema, reference and autograd formula.

    quantize, dequantize, round_values, round_gradient, meter_row      quantize.py
    cast, cast_current, cast_amax                                      casts.py       (made by lower)
    scaled_mm; rounded_mm; stochastic_mm                               scaled_mm.py, rounded_mm.py, stochastic_mm.py
    linear, matmul, conv, embedding                                    one page each
    grouped_mm, scaled_grouped_mm                                      grouped.py
    layer_norm_quantize, linear_quantize                               producers.py   (made by fuse)
    mlp                                                                mlp.py         (made by fuse)
    act                                                                act.py         (made by insert_qdq)
    act_linear                                                         act_linear.py  (made by lower)
    act_backward_cast, act_backward_gate, act_backward_up              act_gradients.py
    norm_cast, norm_backward                                           norms.py       (made by lower)

Importing this package registers all of them.
"""

from fp8fx.ops import (
    act,
    act_gradients,
    act_linear,
    casts,
    conv,
    embedding,
    grouped,
    linear,
    matmul,
    mlp,
    norms,
    producers,
    quantize,
    rounded_mm,
    scaled_mm,
    stochastic_mm,
)

__all__ = [
    "act",
    "act_gradients",
    "act_linear",
    "casts",
    "conv",
    "embedding",
    "grouped",
    "linear",
    "matmul",
    "mlp",
    "norms",
    "producers",
    "quantize",
    "rounded_mm",
    "scaled_mm",
    "stochastic_mm",
]
