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
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fp8fx

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.checkpoint_damages import DAMAGES, Damage
from benchmarks.checkpoint_run import KILLED_WIDTH, Run

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
