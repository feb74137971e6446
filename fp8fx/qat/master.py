"""Master weights in 16 bits with stochastic rounding: the storage of the FP8 emulation toolkit's training methods, for any optimizer.

    w <- SR_16(step(w))        SR(v) = one of v's two neighbours on the 16-bit grid, the nearer one more often, so that E[SR(v)] = v

Rounded to nearest, an update below half a step of the grid is lost, every time; rounded stochastically it arrives on the average.
(Mellempudi et al., "Mixed Precision Training With 8-bit Floating Point", arXiv 1905.12334: fp16 master weights with stochastic rounding.)

Random bits are Philox words (fp8fx.numerics.philox) of seed, parameter, element and step: the same on every device and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fp8fx import numerics
from fp8fx.errors import CheckpointError, ModelError, allowed
from fp8fx.formats import Format
from fp8fx.spec import ROUNDINGS

STATE = "fp8fx_master_weights"  # key in the optimizer's state_dict
_MARK = "_fp8fx_master_weights"
_FLOAT16 = Format("float16", 5, 10, 15, 65504.0, True, "ieee")
_DTYPES = (torch.float16, torch.bfloat16)


class MasterWeights:
    """Keeps the parameters of `optimizer` on the grid of `dtype` from now on: after every step each is rounded there.

    float32 parameters stay float32 tensors and hold values of `dtype`: the model computes as before, and `p.to(dtype)` is exact.
    Parameters of `dtype` itself are widened to float32 for the step, with their gradients and the optimizer's state, so that the update is
    rounded once, from float32. Other dtypes are refused. Steps that a GradScaler skips round nothing.

    rounding: stochastic, or any other of the roundings. Values beyond the largest of float16 become the largest.
    It is part of the optimizer's state_dict (seed and step), so that a resumed run ends with the same bits; `remove()` ends it.
    Raises ModelError for arguments it cannot take.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float16, rounding: str = "stochastic", seed: int = 0
    ) -> None:
        self.optimizer, self.dtype, self.rounding, self.seed = _checked(optimizer, dtype, rounding), dtype, rounding, int(seed)
        self.steps = 0
        self._widened: list[nn.Parameter] = []
        for _, parameter in self._parameters():
            _check_dtype(parameter, dtype)
            if parameter.dtype != dtype:
                _write(parameter, nearest(parameter.detach(), dtype))
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        setattr(optimizer, _MARK, self)

    def remove(self) -> None:
        """Leave the optimizer as it was; the weights stay where they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if getattr(self.optimizer, _MARK, None) is self:
            delattr(self.optimizer, _MARK)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter with a name that a resumed run gives it too: the optimizer's, where it was given names, else its position."""
        for number, group in enumerate(self.optimizer.param_groups):
            names = group.get("param_names", [f"{number}.{place}" for place in range(len(group["params"]))])
            yield from zip(names, group["params"], strict=True)

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Widen parameters of `dtype` with their gradients: the optimizer then makes its state in float32 as well."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is not None and any(parameter.dtype == self.dtype for _, parameter in self._parameters()):
            raise ModelError(
                f"fp8fx.MasterWeights: a closure runs the model within optimizer.step(), while its {_name(self.dtype)} parameters are "
                "float32 for the step. Keep the parameters in float32 (their values are rounded all the same), or step without a closure"
            )
        for _, parameter in self._parameters():
            _check_dtype(parameter, self.dtype)
            if parameter.dtype == self.dtype:
                gradient = parameter.grad
                parameter.grad = None
                parameter.data = parameter.data.float()
                parameter.grad = None if gradient is None else gradient.float()
                self._widened.append(parameter)

    @torch.no_grad()
    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        widened, self._widened = self._widened, []
        narrow = {id(parameter) for parameter in widened}
        for name, parameter in self._parameters():
            if parameter.grad is None:  # the optimizer left it alone
                if id(parameter) in narrow:
                    parameter.data = parameter.data.to(self.dtype)
                continue
            bits = None
            if self.rounding == "stochastic":
                key = numerics.producer_key(name, "master")
                bits = numerics.philox_bits(parameter.shape, self.seed, key, self.steps, 0, parameter.device)
            values = round_to(parameter.detach(), self.dtype, self.rounding, bits)
            if id(parameter) in narrow:
                gradient = parameter.grad
                parameter.grad = None
                parameter.data = values.to(self.dtype)
                parameter.grad = gradient.to(self.dtype)
            else:
                _write(parameter, values)
        self.steps += 1

    def _save(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE: {"dtype": _name(self.dtype), "rounding": self.rounding, "seed": self.seed, "steps": self.steps}}

    def _load(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        kept = dict(state)
        ours = kept.pop(STATE, None)
        if ours is not None:
            if (ours["dtype"], ours["rounding"]) != (_name(self.dtype), self.rounding):
                raise CheckpointError(
                    f"this optimizer state was saved with master weights in {ours['dtype']}, rounding {ours['rounding']}, here they are "
                    f"in {_name(self.dtype)}, rounding {self.rounding}. Make fp8fx.MasterWeights as it was, or drop {STATE!r} from it"
                )
            self.seed, self.steps = int(ours["seed"]), int(ours["steps"])
        return kept


def _checked(optimizer: Any, dtype: Any, rounding: Any) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(f"fp8fx.MasterWeights takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if getattr(optimizer, _MARK, None) is not None:
        raise ModelError("this optimizer has fp8fx.MasterWeights already: call its remove() first")
    if dtype not in _DTYPES:
        raise ModelError(f"fp8fx.MasterWeights(dtype={dtype!r}): allowed are {allowed(map(str, _DTYPES))}")
    if rounding not in ROUNDINGS:
        raise ModelError(f"fp8fx.MasterWeights(rounding={rounding!r}): allowed are {allowed(ROUNDINGS)}")
    return optimizer


def _check_dtype(parameter: Tensor, dtype: torch.dtype) -> None:
    if parameter.dtype not in (torch.float32, dtype):
        raise ModelError(
            f"fp8fx.MasterWeights: a parameter of shape {tuple(parameter.shape)} is {_name(parameter.dtype)}; allowed are float32 and "
            f"{_name(dtype)}. Convert the model before the optimizer is made, or leave the parameter to another optimizer"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(parameter: nn.Parameter, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values of `dtype` next to `x`."""
    return round_to(x, dtype, "nearest_even", None)


def round_to(x: Tensor, dtype: torch.dtype, rounding: str, bits: Tensor | None) -> Tensor:
    """float32 `x` on the grid of float16 or bfloat16, as float32; bits: int64, 32 random bits per element, for `stochastic`."""
    if dtype == torch.float16:
        return numerics.round_to_format(x, _FLOAT16, rounding, "saturate", bits)
    return _to_bfloat16(x.float(), rounding, bits)


def _to_bfloat16(x: Tensor, rounding: str, bits: Tensor | None) -> Tensor:
    """bfloat16 is the upper half of a float32, subnormals included: to round is to add below the cut, and to cut."""
    raw = x.view(torch.int32).to(torch.int64)
    magnitude, negative = raw & 0x7FFFFFFF, raw < 0
    if rounding == "stochastic":
        assert bits is not None  # drawn by whoever asks for it
        add: Tensor | int = bits & 0xFFFF
    elif rounding == "nearest_even":
        add = 0x7FFF + ((magnitude >> 16) & 1)
    else:
        toward: dict[str, Tensor | int] = {
            "nearest_away": 0x8000,
            "toward_zero": 0,
            "up": torch.where(negative, 0, 0xFFFF),
            "down": torch.where(negative, 0xFFFF, 0),
        }
        add = toward[rounding]
    cut = ((magnitude + add) & ~0xFFFF).clamp(max=0x7F7F0000)  # overflow becomes the largest
    cut = torch.where(magnitude > 0x7F800000, magnitude, cut)  # NaN stays
    return torch.where(negative, cut - 0x80000000, cut).to(torch.int32).view(torch.float32)
