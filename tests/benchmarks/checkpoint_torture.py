"""Kills and corruptions: the last completed save always loads, and a damaged file never half-loads a model.

    python tests/benchmarks/checkpoint_torture.py [--kills 50] [--corruptions 200] [--seed 0]

kills         a process trains and saves every step to one file, and is killed (SIGKILL) at a random moment; the next one goes on from
              the file. Each time the file must load, hold a step no older than the last save that returned, and be bit for bit the
              state (model, FP8 state, gradients, optimizer, loss scaler) of a run that nobody interrupted.
corruptions   bits flipped, files cut short, tensors swapped, shapes and dtypes changed, files of others, files of other models: each
              must be refused with a CheckpointError that leaves everything bit for bit as it was, or load the very state that was saved.

The exit status is 0 if all did. tests/checkpoint/test_torture.py runs a few of each.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import fp8fx

RECIPE = {"extends": "delayed", "defaults": {"grad_output": {"rounding": "stochastic"}}}
WIDTH, KILLED_WIDTH = 64, 512  # of the model; the larger one's file, 10 MB, takes about as long to write as a step to train


class Run:
    """A small training run whose step n depends on nothing but the state and n; step() leaves gradients of a started accumulation."""

    def __init__(
        self, seed: int = 0, width: int = WIDTH, recipe: Any = None, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    ) -> None:
        torch.manual_seed(seed)
        self.width = width
        self.fast = fp8fx.compile(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)), recipe or RECIPE)
        self.optimizer = optimizer(self.fast.parameters(), lr=1e-3)
        self.scaler = fp8fx.GradScaler("direct", device="cpu", init_scale=1024.0, growth_interval=3)
        self.steps = 0

    def backward(self, number: int) -> None:
        x = torch.randn(8, self.width, generator=torch.Generator().manual_seed(number))
        self.scaler.scale((self.fast(x) - x).square().mean()).backward()

    def step(self) -> None:
        self.steps += 1
        self.backward(2 * self.steps)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.backward(2 * self.steps + 1)  # half of the next step: gradients, and amax of the step so far

    def save(self, path: Path) -> None:
        fp8fx.save(self.fast, path, optimizer=self.optimizer, scaler=self.scaler, extra={"steps": self.steps})

    def load(self, path: Path) -> None:
        self.steps = fp8fx.load(path, self.fast, optimizer=self.optimizer, scaler=self.scaler).extra["steps"]

    def fingerprint(self) -> str:
        """SHA-256 of everything that counts."""
        found = hashlib.sha256()
        grads = {name: parameter.grad for name, parameter in self.fast.named_parameters()}
        for part in (self.fast.state_dict(), grads, self.optimizer.state_dict(), self.scaler.state_dict(), self.steps):
            _feed(found, part)
        return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            found.update(repr(key).encode())
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _feed(found, item)
    else:
        found.update(repr(value).encode())


# -- kills ----------------------------------------------------------------------------------------------------------------


def _train_and_save(run: Run, path: Path, report: int) -> None:
    """The process that gets killed."""
    if path.exists():
        run.load(path)
    while True:
        run.step()
        run.save(path)
        os.write(report, run.steps.to_bytes(4, "little"))


def kills(count: int, directory: Path, seed: int = 0, say: Callable[[str], None] = print) -> list[str]:
    """What went wrong, which should be nothing."""
    path, generator = directory / "run.safetensors", random.Random(seed)
    worker, reader, reference = Run(width=KILLED_WIDTH), Run(1, KILLED_WIDTH), Run(width=KILLED_WIDTH)
    problems: list[str] = []
    writing = last = 0
    for number in range(count):
        reported, died_writing = _kill_one(worker, path, generator.uniform(0.0, 0.3))
        writing += died_writing
        try:
            reader.load(path)
        except fp8fx.FP8Error as error:
            problems.append(f"kill {number}: the file does not load: {error}")
            continue
        while reference.steps < reader.steps:
            reference.step()
        if reader.steps < max(reported, last):
            problems.append(f"kill {number}: step {reader.steps} was loaded, step {max(reported, last)} was saved")
        elif reader.steps == reference.steps and reader.fingerprint() != reference.fingerprint():
            problems.append(f"kill {number}: step {reader.steps} is not that of the uninterrupted run")
        last = reader.steps
    fp8fx.save(worker.fast, path)
    left = [name for name in os.listdir(directory) if name.endswith(".tmp")]
    problems += [f"temporary files are left after another save: {left}"] if left else []
    say(f"{count} kills, {writing} of them while a file was written; {last} steps in all; {len(problems)} problems")
    return problems


def _kill_one(worker: Run, path: Path, delay: float) -> tuple[int, bool]:
    """Fork a worker, kill it `delay` seconds after its first save. The last step it reported, and whether it left a temporary file."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _train_and_save(worker, path, writing)
        finally:
            os._exit(1)
    os.close(writing)
    steps = os.read(reading, 4)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 4):
        steps = more
    os.close(reading)
    return int.from_bytes(steps, "little"), any(path.parent.glob(f".{path.name}.*.tmp"))


# -- corruptions ----------------------------------------------------------------------------------------------------------

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


def corruptions(count: int, directory: Path, seed: int = 0, say: Callable[[str], None] = print) -> list[str]:
    """What went wrong, which should be nothing."""
    generator, path = random.Random(seed), directory / "corrupt.safetensors"
    source, target = Run(), Run(seed=7)
    for _ in range(2):
        source.step()
    for _ in range(3):
        target.step()
    source.save(path)
    whole, saved = path.read_bytes(), source.fingerprint()
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    for number, damage in zip(range(count), _endless(DAMAGES), strict=False):
        data, before = damage(whole, generator), target.fingerprint()
        path.write_bytes(data)
        try:
            target.load(path)
        except fp8fx.CheckpointError:
            outcomes["refused"] += 1
            if target.fingerprint() != before:
                problems.append(f"{number}: {damage.__name__} was refused, and something changed")
        except Exception as error:
            problems.append(f"{number}: {damage.__name__} raised {type(error).__name__}: {error}")
        else:
            outcomes["loaded identical"] += 1
            if target.fingerprint() != saved:
                problems.append(f"{number}: {damage.__name__} was loaded, and is not what was saved")
            target.step()  # so that the next damage meets another state
    problems += ["a pickle was unpickled"] if os.environ.pop("FP8FX_TORTURE_EXECUTED", None) else []
    path.write_bytes(whole)
    target.load(path)
    problems += ["the whole file does not load"] if target.fingerprint() != saved else []
    say(f"{count} corruptions: {', '.join(f'{n} {what}' for what, n in outcomes.items())}; {len(problems)} problems")
    return problems


def _endless(items: tuple[Damage, ...]) -> Iterator[Damage]:
    while True:
        yield from items


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        problems = kills(options.kills, Path(directory), options.seed)
        problems += corruptions(options.corruptions, Path(directory), options.seed)
        print(f"{time.perf_counter() - start:.1f} s")
    for problem in problems:
        print("FAIL", problem)
    print("PASS" if not problems else f"FAIL: {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
