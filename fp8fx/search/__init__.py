"""Post-training search: formats, largest values and granularities by the error they make on calibration data.

data (batches, checked) -> taps (sites of the captured graph, held in high precision) -> measure (samples, errors of outputs)
    -> candidates (errors of tensors) -> result (a table, a recipe)                       batchnorm (folding, re-estimation)
"""

from fp8fx.search.batchnorm import fold_batchnorm, recalibrate_batchnorm
from fp8fx.search.candidates import FormatSearch, search_format
from fp8fx.search.result import SearchResult
from fp8fx.search.run import search

__all__ = ["FormatSearch", "SearchResult", "fold_batchnorm", "recalibrate_batchnorm", "search", "search_format"]
