"""How a model is compiled, apart from the recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8fx.errors import ModelError, allowed, nearest


def in_cuda_graphs(mode: str | None) -> bool:
    """Inductor captures CUDA graphs in this mode, or whatever the mode is."""
    changes = torch._inductor.list_mode_options(mode) if mode else {}
    return bool(changes.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs))


@dataclass(frozen=True)
class Options:
    """How a model is compiled, apart from the recipe."""

    inner: str = "auto"  # auto | eager | aot_eager | inductor
    inner_mode: str | None = None  # a torch.compile mode for Inductor: reduce-overhead, max-autotune
    fullgraph: bool = False
    dynamic: bool | None = None
    capture: str = "dynamo"  # dynamo | symbolic
    on_capture_error: str = "raise"  # raise | eager
    plan_only: bool = False

    @property
    def cuda_graphs(self) -> bool:
        """Inductor puts what it compiles into CUDA graphs."""
        return self.inner in ("auto", "inductor") and in_cuda_graphs(self.inner_mode)

    def check(self) -> None:
        """Raise ModelError for a word that is none of those allowed."""
        choices: dict[str, tuple[str, ...]] = {
            "inner": ("auto", "eager", "aot_eager", "inductor"),
            "capture": ("dynamo", "symbolic"),
            "on_capture_error": ("raise", "eager"),
        }
        if self.inner_mode is not None:
            choices["inner_mode"] = tuple(torch._inductor.list_mode_options())
        for key, words in choices.items():
            value = getattr(self, key)
            if value not in words:
                close = nearest(value, words) if isinstance(value, str) else ""
                raise ModelError(f"{key}={value!r}: allowed are {allowed(words)}.{close}")
