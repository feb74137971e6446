"""Tries the installed wheel, outside the checkout: import, compile a small model, train one step, read the plan."""

import sys
from pathlib import Path

import torch
from torch import nn

import fp8fx
from fp8fx import kernels, recipes

for package in (fp8fx, kernels, recipes):
    where = Path(package.__path__[0]).resolve()
    if not where.is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"smoke: {package.__name__} was imported from {where}, not from the wheel in {sys.prefix}")

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
fast = fp8fx.compile(model, recipe="hybrid")
optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
before = model[0].weight.detach().clone()
loss = fast(torch.randn(8, 32)).square().mean()
loss.backward()
optimizer.step()
if not torch.isfinite(loss) or torch.equal(before, model[0].weight):
    sys.exit("smoke: one training step did not change the weights")
print(fast.plan())
print(f"smoke: fp8fx from {Path(fp8fx.__file__).parent} compiles and trains")
