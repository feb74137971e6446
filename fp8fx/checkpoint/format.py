"""The file: safetensors, whose last two tensors vouch for all bytes before them.

    8 bytes            length of the header (little-endian)
    header             JSON: __metadata__ {"format": "pt", "fp8fx": "1"}, then name -> dtype, shape, offsets
    tensors            the model's entries under their own names, everything else under `_fp8fx.`; larger items first: all are aligned
    _fp8fx./manifest   uint8: JSON with the parts of the checkpoint and, for each tensor, dtype, shape and digest
    _fp8fx./seal       uint8 [32]: SHA-256 of the length, the header and the manifest

So any program that reads safetensors can read the weights, and no bit of the file can change unnoticed. A digest is SHA-256 of the tensor's
name, dtype, shape and bytes: swapped tensors are noticed too. The digests are no signature: whoever can write the file can write them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fp8fx.clone import PREFIX

VERSION = 1
ADDED = f"{PREFIX}/"  # of names that are no state_dict's: no module's name starts so
MANIFEST, SEAL = f"{ADDED}manifest", f"{ADDED}seal"
SEAL_BYTES, DIGEST_CHARS = 32, 64

# Those that safetensors 0.4 knows; others are written as their bytes (U8), and the manifest says what they are.
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def raw(value: Tensor) -> Tensor:
    """The bytes of `value` in row-major order: uint8 [n] on the CPU."""
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8) if dense.numel() else torch.empty(0, dtype=torch.uint8)


def digest(name: str, dtype: str, shape: tuple[int, ...], data: Tensor) -> str:
    """SHA-256 of one tensor, `data` being its `raw` bytes."""
    found = hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode())
    found.update(data.numpy().data)
    return found.hexdigest()


def seal(head: bytes, manifest: bytes) -> bytes:
    """head: the length of the header and the header, as they are in the file."""
    return hashlib.sha256(head + manifest).digest()


def stored(value: Tensor) -> tuple[str, list[int]]:
    """dtype and shape of `value` in the header."""
    code = CODES.get(value.dtype)
    return (code, list(value.shape)) if code else ("U8", [value.numel() * value.element_size()])


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names by falling size of an item: every offset is then a multiple of it."""
    size = {name: value.element_size() if value.dtype in CODES else 1 for name, value in tensors.items()}
    return sorted(tensors, key=lambda name: (-size[name], name))


def manifest(parts: Mapping[str, Any], tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> bytes:
    """Its length does not depend on the digests."""
    table = {name: [dtype_name(value.dtype), list(value.shape), digests[name]] for name, value in tensors.items()}
    return json.dumps({"version": VERSION, **parts, "tensors": table}, allow_nan=False).encode()


def head(tensors: Mapping[str, Tensor], names: list[str], manifest_bytes: int) -> bytes:
    """The length of the header and the header, padded with spaces to a multiple of 8 bytes, as safetensors does."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "fp8fx": str(VERSION)}}
    position = 0
    forms = [(name, *stored(tensors[name]), tensors[name].numel() * tensors[name].element_size()) for name in names]
    forms += [(MANIFEST, "U8", [manifest_bytes], manifest_bytes), (SEAL, "U8", [SEAL_BYTES], SEAL_BYTES)]
    for name, code, shape, size in forms:
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def restored(data: Tensor, dtype: str, shape: list[int]) -> Tensor:
    """The tensor whose `raw` bytes are `data`. Raises ValueError where they cannot be."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{dtype} {shape} is no form of a tensor")
    if math.prod(shape) * kind.itemsize != data.numel():
        raise ValueError(f"{dtype} {shape} has not {data.numel()} bytes")
    if not data.numel():
        return torch.empty(shape, dtype=kind)
    # No view of the bytes: autograd keeps a view's base, and a gradient that has a uint8 base cannot be captured after model.half().
    return torch.empty(0, dtype=kind).set_(data.untyped_storage(), 0, shape, torch.empty(shape, device="meta").stride())
