"""fp8fx: a torch.fx compiler pass that runs PyTorch models in FP8, as a declarative recipe says.

    model --capture--> fx graph --annotate--> decisions --insert_qdq--> quantize and dequantize nodes
          --cancel--> one quantize per tensor --fuse--> fused producers, compound operators --lower--> kernels or reference

    fast = fp8fx.compile(model, recipe="hybrid")    the same model, same tensors, in FP8
    print(fp8fx.plan(model, "hybrid", example_inputs=x))

Read `fp8fx/pipeline.py` for the order of the passes and `docs/pipeline.md` for what each does to a graph.
"""

import importlib.util as _util

if _util.find_spec("fp8fx.kernels") is None:  # which lie beside this folder in a checkout, and inside of it where fp8fx is installed
    raise ImportError(
        f"fp8fx is imported from its sources, {__path__[0]}, which are not installed: start Python in another folder, or install them with "
        "`pip install -e .`"
    )

from fp8fx.autocast import autocast
from fp8fx.checkpoint import DistributedState, Restored, load, save
from fp8fx.compile import compile, invalidate, load_state_dict, plan, state_dict, step, strip, unwrap
from fp8fx.distributed import reduce_amax
from fp8fx.errors import CaptureError, CheckpointError, FormatError, FP8Error, FP8Warning, KernelError, ModelError, PassError, RecipeError
from fp8fx.functional import compute_scale, dequantize, fake_quantize, quantize
from fp8fx.loss_scaling import GradScaler
from fp8fx.plan import Plan
from fp8fx.qat import MasterWeights, qat, quantizer_parameters
from fp8fx.recipe import Recipe
from fp8fx.search import SearchResult, fold_batchnorm, recalibrate_batchnorm, search, search_format
from fp8fx.sensitivity import sensitivity
from fp8fx.show import listing
from fp8fx.statistics import Statistics

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "DistributedState",
    "FP8Error",
    "FP8Warning",
    "FormatError",
    "GradScaler",
    "KernelError",
    "MasterWeights",
    "ModelError",
    "PassError",
    "Plan",
    "Recipe",
    "RecipeError",
    "Restored",
    "SearchResult",
    "Statistics",
    "autocast",
    "compile",
    "compute_scale",
    "dequantize",
    "fake_quantize",
    "fold_batchnorm",
    "invalidate",
    "listing",
    "load",
    "load_state_dict",
    "plan",
    "qat",
    "quantize",
    "quantizer_parameters",
    "recalibrate_batchnorm",
    "reduce_amax",
    "save",
    "search",
    "search_format",
    "sensitivity",
    "state_dict",
    "step",
    "strip",
    "unwrap",
]
