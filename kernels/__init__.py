"""The Triton kernels that *lower* calls on a CUDA device; installed as `fp8fx.kernels`. There are none yet.

Until a kernel is here, every operator runs its reference in `fp8fx.ops`, on a GPU too: exact, and slower than high precision. A kernel
implements the schema of an operator, imports nothing of fp8fx but formats and errors, and is tested against the reference byte for byte.
"""
