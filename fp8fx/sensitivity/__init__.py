"""Which layers FP8 hurts: what each quantization loses, what each layer alone does to the loss, and a recipe that meets a budget.

    result = fp8fx.sensitivity(model, batches, "hybrid", loss=loss)
    print(result); result.to_html("sensitivity.html")
    recipe = result.suggest("1%"); result.save_suggestion("mine.yaml")

batches (data, losses) -> study (the model with any choice of layers in FP8) -> figures (one tensor) -> measure -> result
    result -> suggest (the recipe), table, charts, page (HTML), files (written whole or not at all)
"""

from fp8fx.sensitivity.budget import Budget
from fp8fx.sensitivity.measure import sensitivity
from fp8fx.sensitivity.result import LayerResult, RoleResult, Sensitivity
from fp8fx.sensitivity.suggest import Suggestion

__all__ = ["Budget", "LayerResult", "RoleResult", "Sensitivity", "Suggestion", "sensitivity"]
