"""Whether kernels run in Triton's interpreter, which has no PTX and cuts where a GPU rounds: read when a kernel is defined."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
