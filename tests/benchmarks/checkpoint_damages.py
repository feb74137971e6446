"""What may happen to a checkpoint's file: bits, lengths, tensors, files of others. Each damage takes the file's bytes and gives others."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from benchmarks.checkpoint_run import Run
from torch import Tensor

Damage = Callable[[bytes, random.Random], bytes]


def _header(data: bytes) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


def _flipped(data: bytes, low: int, high: int, generator: random.Random, bits: int = 1) -> bytes:
    made = bytearray(data)
    for _ in range(bits):
        made[generator.randrange(low, high)] ^= 1 << generator.randrange(8)
    return bytes(made)


def flip(data: bytes, generator: random.Random) -> bytes:
    return _flipped(data, 0, len(data), generator)


def flip_header(data: bytes, generator: random.Random) -> bytes:
    return _flipped(data, 0, _header(data)[0], generator)


def flip_end(data: bytes, generator: random.Random) -> bytes:
    """The manifest and the seal."""
    start, entries = _header(data)
    return _flipped(data, start + entries["_fp8fx./manifest"]["data_offsets"][0], len(data), generator)


def flip_many(data: bytes, generator: random.Random) -> bytes:
    return _flipped(data, 0, len(data), generator, 100)


def cut(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data))]


def cut_a_little(data: bytes, generator: random.Random) -> bytes:
    return data[: -generator.randrange(1, 64)]


def longer(data: bytes, generator: random.Random) -> bytes:
    return data + generator.randbytes(generator.randrange(1, 4096))


def zeros(data: bytes, generator: random.Random) -> bytes:
    """A block that the disk never got."""
    start = generator.randrange(0, len(data) - 512)
    return data[:start] + bytes(min(4096, len(data) - start)) + data[start + 4096 :]


def swap_data(data: bytes, generator: random.Random) -> bytes:
    """Two tensors of one size change places, the header stays."""
    start, entries = _header(data)
    del entries["__metadata__"]
    spans = [tuple(entry["data_offsets"]) for entry in entries.values()]
    pairs = [(a, b) for a in spans for b in spans if a < b and a[1] - a[0] == b[1] - b[0] > 4]
    (a, b), (c, d) = generator.choice(pairs)
    made = bytearray(data)
    made[start + a : start + b], made[start + c : start + d] = data[start + c : start + d], data[start + a : start + b]
    return bytes(made)


def _edited(data: bytes, edit: Callable[[dict[str, Tensor]], None]) -> bytes:
    """By another program, which keeps all entries: a whole safetensors file, with fp8fx's metadata."""
    tensors = safetensors.torch.load(data)
    edit(tensors)
    return safetensors.torch.save(tensors, _header(data)[1]["__metadata__"])


def swap_names(data: bytes, generator: random.Random) -> bytes:
    def edit(tensors: dict[str, Tensor]) -> None:
        one, other = generator.sample([name for name in tensors if name.endswith(("weight", "exp_avg", "exp_avg_sq", "scale"))], 2)
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return _edited(data, edit)


def other_shape(data: bytes, generator: random.Random) -> bytes:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = generator.choice([name for name, value in tensors.items() if value.dim() == 2])
        tensors[name] = generator.choice([tensors[name].t().contiguous(), tensors[name][:-1], tensors[name].reshape(-1)]).clone()

    return _edited(data, edit)


def other_dtype(data: bytes, generator: random.Random) -> bytes:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = generator.choice([name for name, value in tensors.items() if value.dtype == torch.float32])
        tensors[name] = tensors[name].view(torch.int32) if generator.random() < 0.5 else tensors[name].bfloat16()

    return _edited(data, edit)


def fewer(data: bytes, generator: random.Random) -> bytes:
    return _edited(data, lambda tensors: tensors.__delitem__(generator.choice(list(tensors))))


def more(data: bytes, generator: random.Random) -> bytes:
    return _edited(data, lambda tensors: tensors.update({f"extra.{generator.random()}": torch.rand(3)}))


def newer(data: bytes, generator: random.Random) -> bytes:
    metadata = {"format": "pt", "fp8fx": str(generator.randrange(2, 100))}
    return safetensors.torch.save(safetensors.torch.load(data), metadata)


def foreign(data: bytes, generator: random.Random) -> bytes:
    """Files of other programs, among them pickles that run code when they are unpickled."""
    buffer, kind = io.BytesIO(), generator.randrange(8)
    tensors = safetensors.torch.load(data)
    if kind == 0:
        torch.save(tensors, buffer)
    elif kind == 1:
        torch.save(tensors, buffer, _use_new_zipfile_serialization=False)
    elif kind == 2:
        np.savez(buffer, a=np.ones(3))
    elif kind == 3:
        buffer.write(pickle.dumps(Executed()))
    elif kind == 4:
        buffer.write(safetensors.torch.save(tensors))
    elif kind == 5:
        buffer.write(b"" if generator.random() < 0.5 else b'{"weights": [1, 2]}')
    elif kind == 6:
        buffer.write(generator.randbytes(1000))
    else:
        torch.save({"model": Executed()}, buffer)
    return buffer.getvalue()


class Executed:
    """Unpickling it is noticed."""

    def __reduce__(self) -> Any:
        return exec, ("import os; os.environ['FP8FX_TORTURE_EXECUTED'] = 'yes'",)


def other_model(data: bytes, generator: random.Random) -> bytes:
    """Whole files of fp8fx.save, of runs that are not this one."""
    return _of_other_model(generator.randrange(len(OTHERS)))


OTHERS: tuple[dict[str, Any], ...] = ({"width": 32}, {"optimizer": torch.optim.SGD}, {"recipe": "hybrid"}, {})


@functools.cache
def _of_other_model(kind: int) -> bytes:
    other = Run(**OTHERS[kind])
    if not OTHERS[kind]:
        other.optimizer.param_groups[0]["params"].pop()
    with tempfile.TemporaryDirectory() as directory:
        other.save(Path(directory) / "other.safetensors")
        return (Path(directory) / "other.safetensors").read_bytes()


DAMAGES: tuple[Damage, ...] = (
    *(flip, flip, flip, flip_header, flip_end, flip_many, cut, cut, cut_a_little, longer, zeros, swap_data, swap_names),
    *(other_shape, other_dtype, fewer, more, newer, foreign, foreign, other_model),
)
