"""`fp8fx demo`: trains two models on real input under several recipes and shows what FP8 costs them.

tasks (models, data) -> train -> measure (sqnr) -> results -> comparison (mean over seeds) -> report (table, PASS or FAIL, results.json)
and artifacts (curves, plans, graphs)
"""

from fp8fx.demo.runner import QUICK_STEPS, RECIPES, run

__all__ = ["QUICK_STEPS", "RECIPES", "run"]
