"""CUDA graphs without a GPU: what Inductor would capture runs as it is, after every input that is not static has been copied.

That is what a CUDA graph does at each call, so what a kernel writes into such an input is lost. An operator that cannot be captured cuts
forward and backward into two graphs each.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor import cudagraph_utils, output_code, scheduler
from torch.nn import functional as F

import fp8fx
from fp8fx.ops import inductor
from fp8fx.passes.contract import Context

SETTINGS = {"defaults": {"when_not_faster": "emulate"}}


@contextlib.contextmanager
def uncapturable() -> Iterator[Any]:
    """fp8fx_test::between(x), which is x, but an operator that no CUDA graph may hold."""
    with torch.library._scoped_library("fp8fx_test", "FRAGMENT") as library:
        library.define("between(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
        library.impl("between", torch.clone, "CompositeExplicitAutograd")
        torch.library.register_fake("fp8fx_test::between", torch.empty_like, lib=library)
        between = torch.ops.fp8fx_test.between
        torch.library.register_autograd("fp8fx_test::between", lambda ctx, grad: between(grad), lib=library)
        yield between


class Net(nn.Module):
    """Two layers that become one `act_linear`, and one before the cut."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.first, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 48)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(self.between(self.first(self.norm(x))))))
        return y


class Graphs:
    """Stands for Inductor's capture: `parts` counts forward's and backward's graphs, `copied` what they copy at each call."""

    def __init__(self) -> None:
        self.parts, self.copied = [0, 0], 0

    def __call__(self, example_inputs: Any, compiled: Any, *rest: Any) -> None:
        static = set(compiled.fx_kwargs["static_input_idxs"] or ())
        self.parts[compiled.fx_kwargs["is_backward"]] += len(compiled.partition_maps)
        compiled.recursively_apply_fns([self.captured(part.input_index_mapping, static) for part in compiled.partition_maps])

    def captured(self, origin: list[int | None], static: set[int]) -> Callable[..., Any]:
        """origin: for each input of the part, which input of the whole it is, if any."""

        def capture(model: Callable[..., Any]) -> Callable[..., Any]:
            def run(inputs: list[Any]) -> Any:
                for place, x in enumerate(inputs):
                    if isinstance(x, Tensor) and origin[place] not in static:
                        inputs[place] = x.clone()
                        self.copied += 1
                return model(inputs)

            return run

        return capture


@contextlib.contextmanager
def as_on_a_gpu(graphs: Graphs) -> Iterator[None]:

    def on_gpu(context: Context, device: torch.device, trains: bool) -> Context:
        return dataclasses.replace(context, device="cuda", weights_inside=True)

    with (
        mock.patch.object(Context, "on", on_gpu),
        mock.patch.object(inductor, "on_gpu", return_value=True),
        mock.patch.object(output_code, "cudagraph_partition_post_compile", graphs),
        mock.patch.object(scheduler.BaseSchedulerNode, "is_gpu", return_value=True),
        mock.patch.object(cudagraph_utils, "check_lowering_disable_cudagraph", return_value=None),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def measured(between: Callable[[Tensor], Tensor], graphs: Graphs, mode: str | None) -> list[Tensor]:
    """What one forward and backward leave in the records: amax of the casts, and amax and counts of the gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with as_on_a_gpu(graphs):
        fast = fp8fx.compile(Net(between).bfloat16(), {"extends": "delayed", **SETTINGS}, inner="inductor", inner_mode=mode)
        fast(torch.randn(96, 64).bfloat16()).float().square().sum().backward()
    (records,) = fast._fp8fx_runtime.records
    return list(records._pairs[0])


@pytest.mark.parametrize("how", ["mode", "config"])
def test_kernels_measure_into_the_records_where_cuda_graphs_are_cut(how: str) -> None:
    with uncapturable() as between:
        plain, graphs = Graphs(), Graphs()
        casts, sites = measured(between, plain, None)
        with torch._inductor.config.patch({"triton.cudagraphs": how == "config"}):
            casts_in_graphs, sites_in_graphs = measured(between, graphs, "reduce-overhead" if how == "mode" else None)
    assert plain.parts == [0, 0]
    assert graphs.parts == [2, 2]
    assert graphs.copied > 0
    assert (casts[:, 0] > 0).all()
    assert (sites[:, 0, 0] > 0).all()
    assert torch.equal(casts, casts_in_graphs)
    assert torch.equal(sites, sites_in_graphs)
