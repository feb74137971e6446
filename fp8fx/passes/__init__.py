"""The passes, one module each; `fp8fx/pipeline.py` says their order and `contract.py` what every pass keeps.

    annotate -> insert_qdq -> cancel -> fuse -> lower

Passes do not import each other. They name the operators as `torch.ops.fp8fx.*`, so those are registered first.
"""

import fp8fx.ops  # noqa: F401
