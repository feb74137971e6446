"""State never crosses: models that share a process end where each ends alone in a process of its own, bit for bit.

The recipes round stochastically, so that the position in the random stream is state, or scale by earlier steps: one call too many of
another model shows.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from semantics.harness import ENTRIES, STATEFUL
from semantics.isolation import build, finish, gradients, in_flight, training, weights
from torch import Tensor

SEEDS = (1, 2)
Alone = dict[int, dict[str, dict[str, dict[str, Tensor]]]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """seed -> "recipe/entry" -> scenario -> tensors, each seed from a process of its own."""
    folder, tests = tmp_path_factory.mktemp("alone"), Path(__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(tests)!r}); import runpy; runpy.run_module('semantics.isolation', run_name='__main__')"
    started = {
        seed: subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(seed), str(folder / f"{seed}.pt")], stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for seed in SEEDS
    }
    for process in started.values():
        _, problems = process.communicate(timeout=600)
        assert process.returncode == 0, problems.decode()
    return {seed: torch.load(folder / f"{seed}.pt", weights_only=True) for seed in SEEDS}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes: sums are split by threads, and their last bits with them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


pytestmark = [pytest.mark.parametrize("recipe", STATEFUL), pytest.mark.parametrize("entry", ENTRIES)]


def test_two_instances_in_turns(processes: Alone, recipe: str, entry: str) -> None:
    models = {seed: build(recipe, entry, seed) for seed in SEEDS}
    finish(*(training(model, seed) for seed, model in models.items()))
    for seed, model in models.items():
        assert equal(weights(model), processes[seed][f"{recipe}/{entry}"]["trained"]), seed


def test_a_model_and_its_deep_copy_in_turns(processes: Alone, recipe: str, entry: str) -> None:
    first = build(recipe, entry, seed=1)
    finish(training(first, 9, steps=1))
    models = {1: first, 2: copy.deepcopy(first)}
    finish(*(training(model, seed) for seed, model in models.items()))
    for seed, model in models.items():
        assert equal(weights(model), processes[seed][f"{recipe}/{entry}"]["copied"]), seed


def test_two_deep_copies_in_turns(processes: Alone, recipe: str, entry: str) -> None:
    """Both copies go on where the first was, which itself goes on too."""
    first = build(recipe, entry, seed=1)
    finish(training(first, 9, steps=1))
    copies = [copy.deepcopy(first), copy.deepcopy(first)]
    finish(training(copies[0], 2), training(copies[1], 2), training(first, 1))
    for copied in copies:
        assert equal(weights(copied), processes[2][f"{recipe}/{entry}"]["copied"])
    assert equal(weights(first), processes[1][f"{recipe}/{entry}"]["copied"])


def test_two_threads(processes: Alone, recipe: str, entry: str) -> None:
    """Captured, run and differentiated at the same time."""
    models = {seed: build(recipe, entry, seed) for seed in SEEDS}  # here: the generator they are drawn from is the process's
    found: dict[int, Any] = {}
    together = threading.Barrier(len(SEEDS))

    def work(seed: int) -> None:
        torch.set_num_threads(1)  # OpenMP's setting is one per thread
        try:
            together.wait()
            finish(training(models[seed], seed))
            found[seed] = weights(models[seed])
        except BaseException as error:
            found[seed] = error
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in SEEDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in SEEDS:
        assert isinstance(found[seed], dict), found[seed]
        assert equal(found[seed], processes[seed][f"{recipe}/{entry}"]["trained"]), seed


def test_forwards_in_flight(processes: Alone, recipe: str, entry: str) -> None:
    """Four forwards of two models before the first backward; the backwards come in another order."""
    models = {seed: build(recipe, entry, seed) for seed in SEEDS}
    finish(*(in_flight(model, seed) for seed, model in models.items()))
    for seed, model in models.items():
        assert equal(gradients(model), processes[seed][f"{recipe}/{entry}"]["in flight"]), seed


def test_the_recipes_carry_state(processes: Alone, recipe: str, entry: str) -> None:
    """A model that has made one call before ends elsewhere: without this the tests above could not fail."""
    model = build(recipe, entry, seed=1)
    model(torch.full((4, 16), 50.0))  # one position of the stream, and an amax that a history remembers
    finish(training(model, 1))
    assert not equal(weights(model), processes[1][f"{recipe}/{entry}"]["trained"])
