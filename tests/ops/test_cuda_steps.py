"""Training steps on a GPU: inside CUDA graphs, without a wait of the host for the GPU, and after running out of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8fx

pytestmark = pytest.mark.gpu
EMULATE = {"when_not_faster": "emulate"}
RECIPES = ["hybrid", "delayed", "direct", "rowwise", "blockwise"]


@pytest.fixture(autouse=True)
def _alone() -> None:
    torch._dynamo.reset()


class Model(nn.Module):
    """An MLP and a gated one, with a norm, biases and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(128), nn.Linear(128, 256), nn.Linear(256, 128)
        self.gate, self.up, self.down = nn.Linear(128, 256, bias=False), nn.Linear(128, 256, bias=False), nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + self.two(nn.functional.gelu(self.one(x), approximate="tanh"))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().bfloat16().cuda()


def batch(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


# torch begins each tree of graphs with an empty one, and looks over the warning only where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize(
    ("recipe", "rows", "options"),
    [
        *((recipe, 128, {}) for recipe in RECIPES),
        ("hybrid", 97, {}),
        ("direct", 97, {}),
        ("hybrid", 128, {"save_activation_inputs": "fp8"}),
        ("delayed", 128, {"weight_transpose": "keep"}),
    ],
    ids=str,
)
def test_cuda_graphs_give_what_launches_give(recipe: str, rows: int, options: dict[str, Any]) -> None:
    """Six steps: outputs, gradients, and the scales that follow from what replays measure.

    (One backward a step: to add gradients up, a graph's own outputs must be copied first, as under torch.compile alone.)
    """
    changes = {"extends": recipe, "defaults": EMULATE | options, "scale": {"power_of_two": True}}
    found = []
    for mode in (None, "reduce-overhead"):
        plain = model()
        fast = fp8fx.compile(plain, changes, inner="inductor", inner_mode=mode)
        for seed in range(6):
            plain.zero_grad()
            y = fast(batch(rows, seed) * (1 + seed))
            y.float().square().sum().backward()
            fp8fx.step(fast)
        state = {key: value.float().cpu() for key, value in fp8fx.state_dict(fast).items() if value.is_floating_point()}
        found.append((y.detach().float().cpu(), [p.grad.float().cpu() for p in plain.parameters() if p.grad is not None], state))
    (y, gradients, state), (y_graphs, gradients_graphs, state_graphs) = found
    assert torch.equal(y, y_graphs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_graphs, strict=True))
    assert state.keys() == state_graphs.keys()
    assert all(torch.equal(state[key], state_graphs[key]) for key in state)
    assert recipe != "delayed" or any(float(value.max()) > 0 for key, value in state.items() if key.endswith("history"))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty", "ignore:Synchronization debug mode")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("how", [("eager", None), ("inductor", None), ("inductor", "reduce-overhead")], ids=["eager", "inductor", "graphs"])
def test_the_host_never_waits_for_the_gpu(recipe: str, how: tuple[str, str | None]) -> None:
    """In a step: forward, backward, optimizer, and what the next step's scales need. torch raises where one would synchronize."""
    plain = model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-6)
    fast = fp8fx.compile(plain, {"extends": recipe, "defaults": EMULATE}, inner=how[0], inner_mode=how[1])
    batches = [batch(128, seed) for seed in range(8)]
    try:
        for i, x in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if i >= 5 else "default")  # what compiles and records graphs may wait
            optimizer.zero_grad()
            fast(x).float().square().sum().backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(p.isfinite().all()) for p in plain.parameters())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_random_bits_are_not_captured_for_good() -> None:
    """In a graph of the user's own every replay would draw the same ones."""
    fast = fp8fx.compile(model(), {"extends": "direct", "defaults": EMULATE})
    x = batch(128, 0)
    fast(x)
    with pytest.raises(fp8fx.ModelError, match="every replay would draw the same bits"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fast(x)


@pytest.mark.parametrize("recipe", ["delayed", "hybrid"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_training_goes_on_after_running_out_of_memory(recipe: str, inner: str) -> None:
    """A step that dies in forward or backward leaves scales that are sane; the next one gives what it gives a model that never died."""
    changes = {"extends": recipe, "defaults": EMULATE, "scale": {"power_of_two": True}}
    x = batch(65536, 1)
    found = []
    for dies in (False, True):
        plain = model()
        fast = fp8fx.compile(plain, changes, inner=inner)
        for step in range(4):
            plain.zero_grad()
            if dies and step == 2:
                torch.cuda.empty_cache()
                room = torch.cuda.memory_reserved() + x.numel() * x.element_size()
                torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
                try:
                    with pytest.raises(torch.OutOfMemoryError):
                        fast(x).float().square().mean().backward()
                finally:
                    torch.cuda.set_per_process_memory_fraction(1.0)
                plain.zero_grad()
            fast(x).float().square().mean().backward()
            fp8fx.step(fast)
        found.append([p.grad.float() for p in plain.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    assert all(bool(b.isfinite().all()) and torch.equal(a, b) for a, b in zip(*found, strict=True))
