"""Quantization-aware training: largest values and mantissa bits learned with the weights; master weights in 16 bits.

search.taps (operands of every site) -> quantizer (parameters) -> relaxed (rounding and its gradients) -> model (qat, the learned recipe)
master (an optimizer's weights on a 16-bit grid, rounded stochastically)
"""

from fp8fx.qat.master import MasterWeights
from fp8fx.qat.model import qat, quantizer_parameters

__all__ = ["MasterWeights", "qat", "quantizer_parameters"]
