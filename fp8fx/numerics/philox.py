"""Random bits for stochastic rounding: Philox4x32-10 (Salmon et al., SC 2011), the same on every device and at every tiling.

    key      (seed mod 2^32, producer_key xor (seed >> 32))
    counter  (i >> 2 low word, i >> 2 high word, step, call)       i: logical row-major index of the element
    element i takes word i & 3 of its block of four

One block serves four neighbours. Words are int64 tensors with values in [0, 2^32), since torch has no full uint32 arithmetic;
`seed`, `step` and `call` may be ints or int64 tensors of shape (), which are read on their device, without a host sync.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fp8fx.numerics.eager import tracing

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 16384  # blocks per piece of the eager CPU path: six int64 buffers of it stay in a core's L2 cache

Word = int | Tensor


def producer_key(name: str, role: str) -> int:
    """A 32-bit hash of who asks for random bits: the canonical name of the producer and the role. Stable across processes."""
    return int.from_bytes(hashlib.blake2s(f"{name}\0{role}".encode(), digest_size=4).digest(), "little")


def philox_block(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds of Philox4x32 on words in [0, 2^32), ints or int64 tensors that broadcast; four words in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product may wrap below zero: its bits are right, and the mask after the shift takes the copies of the sign away.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1 & _MASK, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_bits(
    shape: tuple[int, ...] | torch.Size,
    seed: Word,
    key: int,
    step: Word = 0,
    call: Word = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """32 random bits per element of `shape`: int64 in [0, 2^32), on `device` (default: that of a tensor among the arguments, else the CPU).

    seed: 64 bits. key: `producer_key`. step, call: counters, their low 32 bits count.
    """
    words = (seed, step, call)
    if device is None:
        device = next((word.device for word in words if isinstance(word, Tensor)), torch.device("cpu"))
    count = 1
    for size in shape:
        count = count * size
    keys = (seed & _MASK, ((seed >> 32) ^ key) & _MASK)
    tail = (step & _MASK, call & _MASK)
    blocks = (count + 3) // 4
    if torch.device(device).type == "cpu" and not tracing() and not any(_functional(word) for word in words):
        lanes = _lanes_cpu(blocks, tuple(map(int, keys)), tuple(map(int, tail)))
    else:
        index = torch.arange(blocks, dtype=torch.int64, device=device)
        lanes = torch.stack([torch.zeros_like(index) + word for word in philox_block((index & _MASK, index >> 32, *tail), keys)], dim=-1)
    return lanes.reshape(-1)[:count].reshape(shape)


def _functional(word: Word) -> bool:
    return isinstance(word, Tensor) and type(word) is not Tensor


def _lanes_cpu(blocks: int, key: tuple[int, ...], tail: tuple[int, ...]) -> Tensor:
    """[blocks, 4] words, made piece by piece in place: the same integers as `philox_block`, without its passes through memory."""
    out = torch.empty((blocks, 4), dtype=torch.int64, device="cpu")
    size = min(blocks, _CHUNK)
    buffers = torch.empty((5, size), dtype=torch.int64, device="cpu")
    for start in range(0, blocks, _CHUNK):
        stop = min(start + _CHUNK, blocks)
        _piece(out[start:stop], buffers[:, : stop - start], start, key, tail)
    return out


def _piece(out: Tensor, buffers: Tensor, start: int, key: tuple[int, ...], tail: tuple[int, ...]) -> None:
    """Ten rounds for blocks [start, start + n). Words 1 and 3 keep wrong upper halves until the last round: only xors read them."""
    c0, c1, c2, c3, p = buffers.unbind()
    torch.arange(start, start + c0.numel(), device="cpu", out=c0)
    torch.bitwise_right_shift(c0, 32, out=c1)
    c0.bitwise_and_(_MASK)
    c2.fill_(tail[0])
    c3.fill_(tail[1])
    k0, k1 = key
    for _ in range(10):
        torch.mul(c2, _MULTIPLIER[1], out=p)  # p1
        c0.mul_(_MULTIPLIER[0])  # p0
        torch.bitwise_right_shift(c0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        torch.bitwise_right_shift(p, 32, out=c3)
        c3.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c0, c1, c3, p = c3, p, c0, c1
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    for lane, word in enumerate((c0, c1, c2, c3)):
        torch.bitwise_and(word, _MASK, out=out[:, lane])
