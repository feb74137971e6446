"""The measured cost model: what a linear layer takes in bf16 and in FP8 on a GPU, from a table shipped as data.

    costs.speedup(m, k, n, training=True, scaling="current", granularity="tensor", dtype=torch.bfloat16)      one layer on its own
    costs.choose([costs.Layer(...), ...])                                                   which layers of one graph to run in FP8

`python tests/benchmarks/measure_costs.py --write` makes the table of the GPU it runs on, `<device>.json` beside this file.
"""

from fp8fx.costs.model import Cost, Layer, choose, cost, speedup
from fp8fx.costs.own import own_is_faster
from fp8fx.costs.table import Table, load, table_name

__all__ = ["Cost", "Layer", "Table", "choose", "cost", "load", "own_is_faster", "speedup", "table_name"]
