"""Writes the listings of docs/pipeline.md:  python tests/docs/generate_pipeline.py

A listing stands between `<!-- MODEL RECIPE STAGE -->` and `<!-- end -->`; the source of a model between `<!-- source MODEL -->` and
`<!-- end -->`. Everything else of the page is written by hand. tests/docs/test_pages.py fails while the page differs.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.show import listing

PAGE = Path(__file__).parents[2] / "docs" / "pipeline.md"
_MARKED = re.compile(r"<!-- (?!end)([\w -]+) -->\n.*?<!-- end -->", re.DOTALL)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        mixed = self.q(n) * self.k(n) + self.v(n)
        return self.down(F.gelu(self.up(self.norm2(mixed))))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


MODELS: dict[str, type[nn.Module]] = {"Block": Block, "Chain": Chain}


def listings(model: str, recipe: str) -> dict[str, str]:
    """stage -> listing of the model's graph after it."""
    torch.manual_seed(0)
    fast = fp8fx.compile(MODELS[model](), recipe, fullgraph=True)
    fast(torch.randn(4, 16))
    return {stage: listing(fast.graph(stage)) for stage in fp8fx.pipeline.STAGES}  # type: ignore[operator]


def generate(page: str) -> str:
    """`page` with every marked part written again."""
    made: dict[tuple[str, str], dict[str, str]] = {}

    def replace(match: re.Match[str]) -> str:
        words = match.group(1).split()
        if words[0] == "source":
            text, language = inspect.getsource(MODELS[words[1]]), "python"
        else:
            model, recipe, stage = words
            if (model, recipe) not in made:
                made[model, recipe] = listings(model, recipe)
            text, language = made[model, recipe][stage], ""
        return f"<!-- {match.group(1)} -->\n```{language}\n{text.rstrip()}\n```\n<!-- end -->"

    return _MARKED.sub(replace, page)


if __name__ == "__main__":
    PAGE.write_text(generate(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
