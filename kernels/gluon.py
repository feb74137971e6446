"""Whether Triton has the Gluon that kernels are written in: an experimental part, which another version may have in another form.

`SPECIALIZED` is the module of the specialized product, or None; `DESCRIPTORS` are the classes of tensor descriptors that launches may take.
"""

from __future__ import annotations

import logging
from typing import Any

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8fx.kernels.interpret import INTERPRET

LOG = logging.getLogger("fp8fx")
OTHER_VERSION = (ImportError, AttributeError, TypeError, AssertionError)  # what an interface that has changed raises
SPECIALIZED: Any = None
DESCRIPTORS: tuple[type, ...] = (TensorDescriptor,)

if not INTERPRET.value:  # the interpreter has no Gluon
    try:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        from fp8fx.kernels import scaled_mm_specialized

        SPECIALIZED, DESCRIPTORS = scaled_mm_specialized, (TensorDescriptor, GluonDescriptor)
    except OTHER_VERSION as error:
        LOG.warning(
            "fp8fx: precise and blocked products run on plain kernels, slower: Triton %s has no Gluon that is known to work (%s)",
            triton.__version__,
            error,
        )
