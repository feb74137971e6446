"""How surely fp8fx.sensitivity finds a planted outlier layer, and whether its suggestion meets the budget.

    python tests/benchmarks/sensitivity.py [--seeds 10] [--tiny]        exit code 1 if one is missed

The models are those of tests/sensitivity/planted.py: random MLPs of 3 to 9 layers and transformers of 1 or 2 blocks, one of whose layers
has an outlier channel in its input or weight. The budget is a quarter of what FP8 adds to the loss, so that something must be exempt.
Bar: the planted layer has the largest effect in all models, and every suggestion meets its budget.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "sensitivity"))  # the folder itself: this file has the name of that package

from planted import planted

import fp8fx


def main(seeds: int, rows: int) -> int:
    print(f"{'seed':<5}{'found':<7}{'its effect':<12}{'next one':<11}{'exempt':<8}{'budget':<8}{'CPU s':<7}model")
    missed = 0
    for seed in range(seeds):
        start, case = time.process_time(), planted(seed, rows)
        result = fp8fx.sensitivity(case.model, case.batches, case.recipe, loss=case.loss, gradients=False, switch_off=False)
        budget = 0.25 * (result.full - result.high)
        result.suggest(budget)
        made, first, second = result.suggestion, *result.ranking[:2]
        assert made is not None
        found, met = first.name == case.layer, made.loss - result.high <= budget
        missed += not (found and met)
        numbers = (
            f"{result.effect(first):<12.3g}{result.effect(second):<11.2g}{len(made.exempt)}/{made.layers:<6}{'met' if met else 'MISSED':<8}"
        )
        print(f"{seed:<5}{'yes' if found else 'NO':<7}{numbers}{time.process_time() - start:<7.1f}{case.about}, {case.layer}", flush=True)
    print(f"{seeds - missed} of {seeds}: found, and the suggestion meets its budget")
    return 1 if missed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="two models, fewer rows of data")
    options = parser.parse_args()
    sys.exit(main(2 if options.tiny else options.seeds, 64 if options.tiny else 256))
