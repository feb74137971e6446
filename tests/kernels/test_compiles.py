"""Every launcher compiles for Hopper on any machine, with the instructions it is made for and without spilling registers."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

from fp8fx import formats
from fp8fx.kernels import scaled_mm as mm
from fp8fx.kernels import scaled_mm_launch
from fp8fx.kernels.activation_amax import activation_amax, activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.activation_keep import activation_keep
from fp8fx.kernels.activations import Kept
from fp8fx.kernels.add_norm import add_norm_cast
from fp8fx.kernels.amax import amax, amax_each
from fp8fx.kernels.arithmetic_mm import Grid, arithmetic_mm
from fp8fx.kernels.cast import Rounding, cast, cast_current
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.delayed import delayed_update
from fp8fx.kernels.norm_backward import norm_backward_cast
from fp8fx.kernels.norm_cast import norm_cast
from fp8fx.kernels.round_values import round_values
from fp8fx.kernels.scale import compute_scale
from fp8fx.kernels.scaled_mm_configs import CONFIGS

Compiled = Callable[[], list[Any]]
ONE = torch.ones(())
X = torch.empty(256, 512, dtype=torch.bfloat16)
TWICE = torch.empty(512, 512, dtype=torch.bfloat16)
CODES = torch.empty(512, 512, dtype=torch.float8_e4m3fn)
RECORD, PARTS = torch.zeros(3), torch.ones(512)
COLUMN = torch.ones(256, 1)
LONG = torch.empty(64, 10000, dtype=torch.bfloat16)
STOCHASTIC = Rounding("stochastic", "nonfinite", torch.zeros(3, dtype=torch.int64), 7)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

ELEMENTWISE: dict[str, Callable[[], Any]] = {
    "amax": lambda: amax(X),
    "amax row and column": lambda: amax_each(X, ("row", "column")),
    "scale": lambda: compute_scale(torch.ones(7), "e4m3fn", True),
    "delayed": lambda: delayed_update(torch.ones(3, 16), torch.ones(3), torch.ones(3), torch.ones(3)),
    "cast": lambda: cast(X, "e4m3fn", ONE),
    "cast both": lambda: cast(X, "e5m2", ONE, layout="both", amax=ONE),
    "cast odd": lambda: cast(X[:101, :77], "e4m3fn", ONE, layout="both"),
    "cast 100 columns": lambda: cast(X[:, :100], "e5m2", ONE, layout="both", amax=ONE),
    "cast stochastic": lambda: cast(X, "e5m2", ONE, layout="both", how=STOCHASTIC),
    "cast current": lambda: cast_current(X, "e4m3fn", "row", "column", "both", power_of_two=True),
    "cast rows": lambda: cast_current(torch.empty(64, 14336, dtype=torch.bfloat16), "e4m3fn", "row"),
    "cast few columns by rows": lambda: cast_current(X, "e5m2", "row", how=STOCHASTIC, record=RECORD),
    "cast block": lambda: cast_block(X, "e4m3fn", layout="both"),
    "cast block, powers of two": lambda: cast_block(X, "e4m3fn", layout="both", power_of_two=True),
    "cast block, stochastic": lambda: cast_block(X, "e4m3fn", layout="both", how=STOCHASTIC, power_of_two=True),
    "cast square block": lambda: cast_block(X, "e4m3fn", (128, 128), layout="both"),
    "swiglu": lambda: activation_cast(X, X, "silu", "e4m3fn", ONE, amax=ONE),
    "swiglu backward": lambda: activation_backward_cast(X, X, X, "silu", "e5m2", ONE, ONE, amax=ONE, amax_u=ONE),
    "rms norm": lambda: norm_cast(X, X[0], None, "e4m3fn", "rms", 1e-6, ONE, amax=ONE),
    "layer norm": lambda: norm_cast(X, X[0], X[1], "e4m3fn", "layer", 1e-6, ONE),
    "gelu": lambda: activation_cast(X, None, "gelu", "e4m3fn", ONE),
    "relu": lambda: activation_cast(X, None, "relu", "e4m3fn", ONE, record=RECORD, counts=True),
    "geglu": lambda: activation_cast(X, X, "gelu_tanh", "e4m3fn", ONE, amax=ONE),
    "silu backward": lambda: activation_backward_cast(X, X, None, "silu", "e5m2", ONE, amax=ONE, bias_grad=X[0]),
    "cast counts": lambda: cast(X, "e4m3fn", ONE, layout="both", record=RECORD, counts=True, bias_grad=X[0].float()),
    "cast stochastic, counts and sums": lambda: cast(
        X, "e5m2", ONE, layout="both", how=STOCHASTIC, record=RECORD, counts=True, bias_grad=X[0]
    ),
    "cast current, sums": lambda: cast_current(X, "e5m2", layout="both", record=RECORD, counts=True, bias_grad=X[0]),
    "cast current with counts": lambda: cast_current(X, "e5m2", layout="both", record=RECORD, counts=True),
    "cast row counts": lambda: cast_current(X, "e5m2", "row", "column", "both", record=RECORD, counts=True, bias_grad=X[0]),
    "swiglu amax": lambda: activation_amax(X, X, "silu"),
    "swiglu backward amax": lambda: activation_backward_amax(X, X, X, "silu", ONE, ONE),
    "swiglu current": lambda: activation_cast(X, X, "silu", "e4m3fn", PARTS, record=RECORD, counts=True, from_amax=True, made_scale=ONE),
    "geglu backward": lambda: activation_backward_cast(
        *(X, X, X, "gelu", "e5m2", PARTS, PARTS),
        **{"record": RECORD, "record_u": RECORD, "counts": True, "bias_grad": X[0], "bias_grad_u": X[0]},
        **{"from_amax": True, "made_scale": ONE, "made_scale_u": ONE},
    ),
    "swiglu keeps": lambda: activation_cast(X, X, "silu", "e4m3fn", ONE, record=RECORD, kept=(Kept.empty(X), Kept.empty(X))),
    "swiglu in place": lambda: activation_keep(X.clone(), X, "silu", (Kept.empty(X), Kept.empty(X))),
    "swiglu by rows": lambda: activation_cast(
        X, X, "silu", "e4m3fn", ONE, record=RECORD, kept=(Kept.empty(TWICE), Kept.empty(TWICE)), into=(CODES, CODES.view(512, 512), 256)
    ),
    "gelu keeps": lambda: activation_cast(X, None, "gelu", "e4m3fn", ONE, layout="rows", kept=(Kept.empty(X), None)),
    "swiglu backward, kept": lambda: activation_backward_cast(
        X, Kept.empty(X), Kept.empty(X), "silu", "e5m2", ONE, ONE, record=RECORD, record_u=RECORD, counts=True
    ),
    "swiglu backward, kept amax": lambda: activation_backward_amax(X, Kept.empty(X), Kept.empty(X), "silu"),
    "dh of swiglu": lambda: activation_backward_cast(X, X, X, "silu", "e5m2", ONE, record=RECORD, counts=True, only=True),
    "dh of swiglu, kept": lambda: activation_backward_cast(X, Kept.empty(X), Kept.empty(X), "silu", "e5m2", ONE, record=RECORD, only=True),
    "du of swiglu, kept": lambda: activation_cast(
        Kept.empty(X), X, "silu", "e5m2", PARTS, record=RECORD, counts=True, from_amax=True, made_scale=ONE, bias_grad=X[0]
    ),
    "layer norm current": lambda: norm_cast(
        X, X[0], X[1], "e4m3fn", "layer", record=RECORD, counts=True, current=True, made_scale=torch.ones(2)
    ),
    "add norm": lambda: add_norm_cast(X, X, X[0], X[1], "e4m3fn", "layer", scale=ONE, record=RECORD, counts=True),
    "add rms norm": lambda: add_norm_cast(X, X, X[0], None, "e4m3fn", scale=ONE, record=RECORD, counts=True, round_first=True),
    "add norm current": lambda: add_norm_cast(X, X, X[0], X[1], "e4m3fn", "layer", current=True, made_scale=ONE),
    "rms norm backward": lambda: norm_backward_cast(X, X, X[0], None, COLUMN, "e5m2", ONE, weight_grad=X[0], record=RECORD, counts=True),
    "layer norm backward": lambda: norm_backward_cast(
        *(X, X, X[0], COLUMN, COLUMN, "e5m2"),
        **{"add": X, "write": True, "weight_grad": X[0], "bias_grad": X[1], "row_sum": X[2], "record": RECORD, "counts": True},
        **{"current": True, "made_scale": ONE},
    ),
    "long layer norm backward": lambda: norm_backward_cast(
        LONG, LONG, None, COLUMN[:64], COLUMN[:64], "e5m2", current=True, made_scale=ONE, how=STOCHASTIC
    ),
    "round values": lambda: round_values(torch.empty(64, 4096), "e5m2", how=STOCHASTIC, record=ONE),
    "round values current": lambda: round_values(X, "e4m3fn", record=ONE, current=True),
    "long rms norm current": lambda: norm_cast(LONG, None, None, "e4m3fn", current=True, made_scale=ONE),
}


def spills(kernel: Any, tmp_path: Path) -> int:
    """Bytes of local memory per thread, from the compiled kernel."""
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found, usage
    return int(found[1])


def registers(tmp_path: Path) -> int:
    """Of a thread, in the kernel that `spills` has written."""
    usage = subprocess.run([CUOBJDUMP, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    return int(found[1])


def loops_over_k(tmp_path: Path) -> list[list[str]]:
    """The instructions of each innermost loop with FP8 products, in the kernel that `spills` has written."""
    text = subprocess.run([CUOBJDUMP, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    lines = [(int(found[1], 16), found[2]) for found in re.finditer(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)]
    ends = [(at, int(found[1], 16)) for at, line in lines if (found := re.search(r"\bBRA (0x[0-9a-f]+)", line))]
    loops = [(start, end) for end, start in ends if start < end]
    bodies = {(start, end): [line for at, line in lines if start <= at <= end] for start, end in loops}
    products = {loop: sum("QGMMA" in line for line in body) for loop, body in bodies.items()}
    inner = [
        loop
        for loop, count in products.items()
        if count and not any(products[other] and other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    return [bodies[loop] for loop in inner]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_memory_bound_kernels(name: str, compiled: Compiled, tmp_path: Path) -> None:
    ELEMENTWISE[name]()
    kernels = compiled()
    assert kernels
    for kernel in kernels:
        assert spills(kernel, tmp_path) == 0
        ptx = kernel.asm["ptx"]
        if kernel.metadata.name in ("cast_kernel", "_cast_block_kernel", "_activation_kernel", "_norm_cast_kernel"):
            assert "satfinite.e4m3x2" in ptx or "satfinite.e5m2x2" in ptx
        if name in ("cast", "cast both", "swiglu"):
            assert "ld.global.v4" in ptx, "loads are 16 bytes wide"
            assert "st.global.v4" in ptx, "stores are 16 bytes wide"


def test_casts_of_blocks_share_a_multiprocessor(compiled: Compiled, tmp_path: Path) -> None:
    """Both layouts in one read of x, as `blockwise` has them: eight warps of 128 registers are half of one."""
    cast_block(X, "e4m3fn", layout="both", power_of_two=True)
    (kernel,) = compiled()
    assert spills(kernel, tmp_path) == 0
    assert registers(tmp_path) <= 128


ODD = torch.empty(1001, 512, dtype=torch.bfloat16)
TRANSPOSES: dict[str, Callable[[], Any]] = {
    "cast": lambda: cast(ODD, "e4m3fn", ONE, layout="transposed"),
    "cast block": lambda: cast_block(ODD, "e4m3fn", layout="transposed"),
    "swiglu": lambda: activation_cast(ODD, ODD, "silu", "e4m3fn", ONE, layout="transposed"),
    "layer norm": lambda: norm_cast(ODD, ODD[0], ODD[1], "e4m3fn", "layer", scale=ONE, layout="transposed"),
}


@pytest.mark.parametrize("name", TRANSPOSES)
def test_transposes_of_odd_matrices_are_stored_by_words(name: str, compiled: Compiled) -> None:
    TRANSPOSES[name]()
    ptx = compiled()[-1].asm["ptx"]
    assert "st.global.v4.b32" in ptx
    assert "st.global.b8" not in ptx


WIDE = formats.Format("bfloat16", 8, 7, 127, 3.3895313892515355e38, True, "ieee")
STUDIES: dict[str, Callable[[], Any]] = {
    "products": lambda: arithmetic_mm(F, None, F, None, None, "exact", Grid(formats.get("e5m2")), Grid(WIDE)),
    "saturated": lambda: arithmetic_mm(F, None, F, None, None, "exact", Grid(formats.get("e4m3fn"), "up", "saturate"), Grid(WIDE, "down")),
    "hopper": lambda: arithmetic_mm(F, F, F, F, None, "exact", Grid(FLOAT), Grid(FLOAT), hopper=True),
    "mitchell": lambda: arithmetic_mm(F, F, F, F, None, "mitchell", Grid(FLOAT), Grid(WIDE)),
    "table": lambda: arithmetic_mm(F, F.long(), F, F.long(), torch.ones(8, 8), "table", Grid(WIDE), Grid(FLOAT)),
}
F, FLOAT = torch.zeros(256, 256), formats.Format("float32", 8, 23, 127, torch.finfo(torch.float32).max, True, "ieee")


@pytest.mark.parametrize("name", STUDIES)
def test_arithmetic_mm(name: str, compiled: Compiled, tmp_path: Path) -> None:
    STUDIES[name]()
    (kernel,) = compiled()
    assert spills(kernel, tmp_path) == 0
    assert "mma" not in kernel.asm["ptx"], "products that are studied do not run on the matrix unit"


def codes(rows: int, columns: int, name: str) -> torch.Tensor:
    return torch.empty(rows, columns, dtype={"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name])


PAIRS = [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"), ("e5m2", "e5m2")]


def accumulation(config: str) -> str:
    return "precise" if config in ("precise", "specialized") else "fast"


@pytest.mark.parametrize(
    ("config", "pair"),
    [("large", pair) for pair in PAIRS] + [(config, PAIRS[3]) for config in CONFIGS if "blocked" not in config and config != "large"],
)
def test_scaled_mm(config: str, pair: tuple[str, str], compiled: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaled_mm_launch, "multiprocessors", lambda device: 132)
    a, b = codes(512, 1024, pair[0]), codes(768, 1024, pair[1]).t()
    rows, columns = torch.ones(512, 1), torch.ones(1, 768)
    for scale_a, scale_b in ((ONE, ONE), (rows, columns)):
        mm.scaled_mm(a, b, scale_a, scale_b, torch.ones(768), accumulate=accumulation(config), config=CONFIGS[config])
        (kernel,) = compiled()
        assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.{pair[0]}\.{pair[1]}", kernel.asm["ptx"])
        assert "cp.async.bulk.tensor.2d.shared" in kernel.asm["ptx"], "operands come through the copy engine"
        assert "cp.async.bulk.tensor.2d.global" in kernel.asm["ptx"], "the output leaves through the copy engine"
        assert ("setmaxnreg" in kernel.asm["ptx"]) == CONFIGS[config].specialized, "warps have as many registers as their work asks for"
        assert spills(kernel, tmp_path) == 0
        assert kernel.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("config", CONFIGS)
def test_float32_output_fits(config: str, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gradients that are rounded once more are accumulated into: a tile twice as large beside the operands."""
    monkeypatch.setattr(scaled_mm_launch, "multiprocessors", lambda device: 132)
    blocks: dict[str, Any] = {"block_a": (1, 128), "block_b": (128, 128)} if "blocked" in config else {}
    scales = (torch.ones(512, 8), torch.ones(8, 6)) if blocks else (ONE, ONE)
    a, b = codes(512, 1024, "e5m2"), codes(768, 1024, "e5m2").t()
    mm.scaled_mm(a, b, *scales, None, torch.float32, accumulation(config), config=CONFIGS[config], **blocks)
    (kernel,) = compiled()
    assert kernel.metadata.shared * CONFIGS[config].per_multiprocessor <= 227 * 1024


def test_random_bits_fit_beside_a_float32_output(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm_launch, "multiprocessors", lambda device: 132)
    a, b = codes(512, 64, "e5m2"), codes(768, 64, "e5m2").t()
    mm.scaled_mm(a, b, ONE, ONE, None, torch.float32, config=CONFIGS["large"], round_to="e5m2", how=STOCHASTIC)
    (kernel,) = compiled()
    assert kernel.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("blocks", [((1, 128), (128, 128)), ((1, 128), (128, 1)), ((1, 128), (128, 32))], ids=str)
def test_blocked_mm(
    blocks: tuple[tuple[int, int], tuple[int, int]], compiled: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scaled_mm_launch, "multiprocessors", lambda device: 132)
    (rows_a, k_a), (k_b, columns_b) = blocks
    scale_a, scale_b = torch.ones(2048 // rows_a, 1024 // k_a), torch.ones(1024 // k_b, 1536 // columns_b)
    mm.scaled_mm(codes(2048, 1024, "e4m3"), codes(1536, 1024, "e5m2").t(), scale_a, scale_b, block_a=blocks[0], block_b=blocks[1])
    (kernel,) = compiled()
    assert kernel.metadata.name == ("blocked_mm_kernel" if columns_b == 32 else "specialized_mm_kernel")
    assert re.search(r"wgmma\.mma_async.*e4m3\.e5m2", kernel.asm["ptx"])
    assert "cp.async.bulk.tensor.2d.shared" in kernel.asm["ptx"]
    assert spills(kernel, tmp_path) == 0


def test_odd_sizes_and_few_rows(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored through pointers, and the exchange of operands that few rows ask for."""
    monkeypatch.setattr(scaled_mm_launch, "multiprocessors", lambda device: 132)
    mm.scaled_mm(codes(1000, 1001, "e4m3"), codes(999, 1001, "e4m3").t(), ONE, ONE)
    mm.scaled_mm(codes(3, 4096, "e5m2"), codes(4096, 4096, "e4m3").t(), ONE, ONE)
    odd, few = compiled()
    assert "cp.async.bulk.tensor.2d.global" not in odd.asm["ptx"]
    assert "m64n16k32.f32.e4m3.e5m2" in few.asm["ptx"]


ENDS: dict[str, dict[str, Any]] = {
    "activation": {"activation": "gelu", "record": ONE},
    "codes": {"out_format": "e4m3fn", "out_scale": ONE, "record": ONE},
    "rounded": {"round_to": "e5m2", "how": STOCHASTIC},
    "everything": {"out_format": "e5m2", "out_scale": ONE, "record": ONE, "how": STOCHASTIC, "activation": "silu"},
}


# Of all pairs; each takes up to 20 s to compile. Blocks in warps with different work have a test of their own.
SOME_ENDS = [
    ("activation", "small"),
    ("codes", "large"),
    ("codes", "blocked"),
    ("codes", "decode_64"),
    ("rounded", "large"),
    ("rounded", "precise"),
    ("rounded", "specialized"),
    ("activation", "specialized"),
    ("everything", "decode"),
]


@pytest.mark.parametrize(("end", "config"), SOME_ENDS)
def test_scaled_mm_ends(end: str, config: str, compiled: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaled_mm_launch, "multiprocessors", lambda device: 132)
    a, b = codes(512, 1024, "e5m2"), codes(768, 1024, "e4m3").t()
    blocks: dict[str, Any] = {"block_a": (1, 128), "block_b": (128, 128)} if "blocked" in config else {}
    scales = (torch.ones(512, 8), torch.ones(8, 6)) if blocks else (ONE, ONE)
    mm.scaled_mm(a, b, *scales, torch.ones(768), accumulate=accumulation(config), config=CONFIGS[config], **blocks, **ENDS[end])
    (kernel,) = compiled()
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "cp.async.bulk.tensor.2d.global" in kernel.asm["ptx"], "the output leaves through the copy engine"
    # Rounded stochastically, a value is on the grid without a detour over its code.
    assert ("satfinite.e" in kernel.asm["ptx"]) == (end in ("codes", "everything"))
    # Those of warps with different work may spill a few words, once a tile: not in the loop over K.
    assert spills(kernel, tmp_path) <= (24 if CONFIGS[config].specialized else 0)
    loops = loops_over_k(tmp_path)
    assert len(loops) >= (CONFIGS[config].block_m // 64 if CONFIGS[config].specialized else 1)
    assert not [line for body in loops for line in body if re.search(r"\b(STL|LDL)\b", line)]
    assert kernel.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("width", [128, 1])
@pytest.mark.parametrize("end", ["codes", "rounded", "everything"])
def test_ends_of_specialized_blocks(end: str, width: int, compiled: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may spill a few words, also in a loop over K. No recipe has them; `test_blocked_mm` has what recipes have."""
    monkeypatch.setattr(scaled_mm_launch, "multiprocessors", lambda device: 132)
    a, b, scales = codes(512, 1024, "e5m2"), codes(768, 1024, "e4m3").t(), (torch.ones(512, 8), torch.ones(8, 768 // width))
    blocks: dict[str, Any] = {"block_a": (1, 128), "block_b": (128, width)}
    mm.scaled_mm(a, b, *scales, torch.ones(768), config=CONFIGS["specialized_blocked"], **blocks, **ENDS[end])
    (kernel,) = compiled()
    assert kernel.metadata.name == "specialized_mm_kernel"
    assert re.search(r"wgmma\.mma_async.*e5m2\.e4m3", kernel.asm["ptx"])
    assert ("satfinite.e" in kernel.asm["ptx"]) == (end != "rounded")
    assert spills(kernel, tmp_path) <= 40
    assert kernel.metadata.shared <= 227 * 1024
