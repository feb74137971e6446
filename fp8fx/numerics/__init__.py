"""What FP8 numbers are and how tensors become them: rounding, codes, scales, random bits. `x ~ q * scale` everywhere.

formats -> rounding -> encoding -> tensor (codes and scale of one tensor)
           scaling, statistics, delayed (scales)   philox (random bits)   flexible (formats with a fractional bias, studies)
           specification (slow and obviously right; what the tests compare with)
"""

from fp8fx.numerics.delayed import delayed_scale, delayed_update
from fp8fx.numerics.encoding import decode, encode
from fp8fx.numerics.philox import philox_bits, producer_key
from fp8fx.numerics.rounding import round_to_format
from fp8fx.numerics.scaling import amax, compute_e8m0_scale, compute_scale, expand_scale, inverse, mean_magnitude, te_current_scale
from fp8fx.numerics.tensor import dequantize_tensor, quantize_tensor

__all__ = [
    "amax",
    "compute_e8m0_scale",
    "compute_scale",
    "decode",
    "delayed_scale",
    "delayed_update",
    "dequantize_tensor",
    "encode",
    "expand_scale",
    "inverse",
    "mean_magnitude",
    "philox_bits",
    "producer_key",
    "quantize_tensor",
    "round_to_format",
    "te_current_scale",
]
