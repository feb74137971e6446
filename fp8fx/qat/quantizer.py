"""The learned parameters of one role of one layer, and all of those of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp8fx import formats, numerics
from fp8fx.errors import CheckpointError
from fp8fx.qat.relaxed import learned_round, with_mantissa
from fp8fx.search.result import role_entry
from fp8fx.spec import TensorSpec


class LearnedQuantizer(nn.Module):
    """Rounds matrices of rows to a grid with a learned largest value and, if asked for, learned mantissa bits.

    log2_max: float32 (). One scale per tensor: log2 of the largest value. Scales per row or block: log2 of the factor between it and the
    row's own largest magnitude. A logarithm, so that one learning rate suits tensors of every size, and the value stays positive.
    mantissa_bits: float32 (), or None.
    """

    mantissa_bits: nn.Parameter | None

    def __init__(self, base: TensorSpec, largest: float, learn_mantissa: bool) -> None:
        """base: what the recipe says of the role. largest: the first largest value, or factor."""
        super().__init__()
        self.base = base
        self.format = formats.get(base.format)
        self.granularity = base.granularity
        self.log2_max = nn.Parameter(torch.tensor(largest, dtype=torch.float32).log2())
        start = nn.Parameter(torch.tensor(float(self.format.mantissa_bits), dtype=torch.float32)) if learn_mantissa else None
        self.register_parameter("mantissa_bits", start)

    @property
    def max_value(self) -> Tensor:
        """The largest value, or the factor on each row's (block's) own: float32 ()."""
        return self.log2_max.exp2()

    @property
    def learned_format(self) -> str:
        """The name of the format as it is now."""
        bits = None if self.mantissa_bits is None else float(self.mantissa_bits.detach())
        return self.format.name if bits is None or not math.isfinite(bits) else with_mantissa(self.format, round(bits)).name

    def forward(self, rows: Tensor) -> Tensor:
        """`rows` [R, K] on the grid; same dtype."""
        top = torch.where(self.log2_max > -math.inf, self.max_value.float(), math.nan)  # 0 would do as the largest of zeros
        if self.granularity != "tensor":
            statistic = numerics.amax(rows.detach(), self.granularity)
            top = top * numerics.expand_scale(statistic, self.granularity, tuple(rows.shape))
        return learned_round(rows, top, self.format, self.mantissa_bits)

    @property
    def finite(self) -> bool:
        """Whether what is learned is a number still. It is not once a loss was NaN or inf, and then every output is NaN."""
        return all(bool(parameter.isfinite()) for parameter in self.parameters()) and 0.0 < float(self.max_value.detach()) < math.inf

    def entry(self) -> dict[str, Any]:
        """This role as a recipe writes it: the same float32 numbers, in their shortest decimal form."""
        value = float(np.format_float_scientific(np.float32(self.max_value.detach().float().item())))
        return role_entry(
            self.learned_format, self.granularity, ("max_value" if self.granularity == "tensor" else "clip", value), self.base
        )

    def get_extra_state(self) -> Tensor:
        """Format and granularity as UTF-8, uint8 [64]: what the parameters were learned for. A tensor, as all of a state_dict is."""
        return torch.tensor(list(self._form().ljust(64).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """CheckpointError for the parameters of another format or granularity."""
        saved = bytes(state.tolist()).decode(errors="replace").rstrip()
        if saved != self._form():
            raise CheckpointError(
                f"this state was learned for {saved}, and here is {self._form()}. Call fp8fx.qat with the recipe that it was trained with, "
                "or load fp8fx.strip(state_dict) into the model, which leaves away what was learned. Nothing was loaded"
            )

    def _form(self) -> str:
        block = self.granularity
        return f"{self.format.name}, granularity {block if isinstance(block, str) else list(block)}"

    def extra_repr(self) -> str:
        return f"{self.learned_format}, {self.granularity}, max_value={self.max_value.item():g}"


class Quantizers(nn.Module):
    """The LearnedQuantizers of a model by site and role; their names in a state_dict are `<site, / for .>/<role>`."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict()

    def forward(self, x: Any) -> Any:
        """`x`: an nn.Sequential calls all its children, and this one changes nothing."""
        return x

    @staticmethod
    def key(site: str, role: str) -> str:
        return f"{site.replace('.', '/')}/{role}"

    def add(self, site: str, role: str, quantizer: LearnedQuantizer) -> None:
        self.by_name[self.key(site, role)] = quantizer

    def get(self, site: str, role: str) -> LearnedQuantizer | None:
        found = self.by_name._modules.get(self.key(site, role))
        assert found is None or isinstance(found, LearnedQuantizer)
        return found

    def check_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """CheckpointError, naming the layer, where `state` was learned for other formats; before anything of it is loaded."""
        for site, role, quantizer in self.items():
            saved = state.get(f"{prefix}by_name.{self.key(site, role)}._extra_state")
            if saved is None:
                continue
            try:
                quantizer.set_extra_state(saved)
            except CheckpointError as error:
                raise CheckpointError(f"the {role} of layer {site!r}: {error}") from None

    def items(self) -> Iterator[tuple[str, str, LearnedQuantizer]]:
        """(site, role, quantizer), in execution order."""
        for key, quantizer in self.by_name.items():
            path, _, role = key.rpartition("/")
            assert isinstance(quantizer, LearnedQuantizer)
            yield path.replace("/", "."), role, quantizer
