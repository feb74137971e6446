"""A model with one output of each kind that a recipe can round, for tests of qat and of search."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """Outputs of a convolution, of a layer that another one reads, of a product without a module, and of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up, self.head = nn.Linear(36, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.conv(x).flatten(2))  # [B, 4, 8]
        return self.head((y @ y.mT) @ y).mean(1)
