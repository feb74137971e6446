"""The Triton kernels (one of them in Gluon) that *lower* calls on a CUDA device; installed as `fp8fx.kernels`.

    cast, cast_block            codes in both layouts, with one scale per tensor, row, column or block; amax in the same pass
    activation_cast             the same from what produces the tensor: ReLU, GELU, SiLU, GeGLU, SwiGLU and their backwards
    activation_amax             the amax of what that would write: the first pass of current scaling
    norm_cast, add_norm         the same from LayerNorm and RMSNorm; with a residual added first
    norm_backward               their backwards, with the gradients of weight and bias
    amax, scale, delayed        amax alone; current scaling from it; the update of delayed scaling for all slots at once
    scaled_mm                   the FP8 matrix product, every pairing of e4m3fn and e5m2; activation, FP8 output and its amax. `_launch`
                                chooses among `_kernels`, where all warps do the same, and `_specialized`; `_configs` has their tiles
    records, column_sums        what a cast tells of its tensor: amax, counts of zeros; sums over the rows (bias gradients)
    results                     how fused kernels end: one result, its scale, codes in both layouts, record and sums
    codes, stochastic           what these share: float32 to codes and back; stochastic rounding, by the bits of `random_bits`
    quarters, layout            likewise tiles and shapes; `rounding`, `launch`, `replay`, `gluon` and `interpret` too

A kernel implements what an operator's reference in `fp8fx.ops` defines, imports nothing of fp8fx but formats and errors, and is tested
against the reference byte for byte, products within a derived bound. Public functions take tensors of any strides on one device,
never wait for it, and may be captured into CUDA graphs. Importing this package imports no Triton; importing its modules does.
"""
