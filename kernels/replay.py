"""taped: the second call of a function that only launches kernels does not run it again.

    cast = taped(cast)        cast(x, spec, scale, ...) -> q, qt

What such a function does for tensors of certain shapes, strides and types, and certain other arguments, is always the same: allocate
outputs, and launch kernels on pointers to its inputs and outputs. The first call writes that down as a tape; later ones play it, at a
fraction of the host's time (checks, grids, keys, views). A function that did anything else on the device, such as copying a tensor into
another layout, is not taped for those arguments. A tape holds no tensor but constants that its function keeps anyway.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fp8fx.kernels.gluon import DESCRIPTORS
from fp8fx.kernels.launch import Launch, hooked, recorded, recording

TRIES = 4  # torch looks over an operator's shoulder in its first calls, which then do more than they will
MOST_TAPES = 4096  # of one function; sizes that change at every call would fill the memory
_HARMLESS = {"empty", "empty_strided", "new_empty", "view", "t", "transpose", "unbind", "select", "slice", "alias", "detach", "as_strided",
             "unsqueeze", "squeeze", "permute", "expand", "_unsafe_view", "split", "split_with_sizes",
             "new_empty_strided", "mT"}  # fmt: skip
_ZEROED = {"zeros", "new_zeros"}

try:  # the allocation that Inductor's own code calls: a quarter of torch.empty's time
    from torch._C._dynamo.guards import _empty_strided_cuda as _empty  # type: ignore[attr-defined]
except ImportError:

    def _empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


@dataclass(frozen=True)
class _Allocation:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    zeroed: bool

    def make(self) -> Tensor:
        made: Tensor = _empty(self.size, self.stride, self.dtype)
        return made.zero_() if self.zeroed else made


@dataclass(frozen=True)
class _Step:
    """One launch: its compiled kernel, grid and arguments, pointers left out. Those are (position, number of the tensor), or with a
    third number, bytes, point into the tensor; `described` are tensor descriptors, Triton's or Gluon's, with what they hold beside it."""

    compiled: Any
    grid: tuple[int, int, int]
    values: list[Any]
    tensors: list[tuple[int, int]]
    inside: list[tuple[int, int, int]]
    described: list[tuple[int, int, type, dict[str, Any]]]


@dataclass(frozen=True)
class _Output:
    tensor: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None  # size, stride, offset in it


@dataclass(frozen=True)
class Tape:
    """Tensors are numbered: the inputs at `inputs`, then the constants, then the allocations."""

    device: int
    inputs: list[int]
    constants: list[Tensor]
    allocations: list[_Allocation]
    steps: list[_Step]
    outputs: list[_Output | _Allocation]

    def play(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        tensors = [args[i] for i in self.inputs]
        tensors += self.constants
        tensors += [allocation.make() for allocation in self.allocations]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for step in self.steps:
            values, compiled = step.values.copy(), step.compiled
            for position, number in step.tensors:
                values[position] = tensors[number]
            for position, number, offset in step.inside:
                values[position] = tensors[number].data_ptr() + offset
            for position, number, kind, fields in step.described:
                values[position] = _descriptor(kind, tensors[number], fields)
            compiled.run(*step.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
        return tuple(self._output(output, tensors) for output in self.outputs)

    def _output(self, output: _Output | _Allocation, tensors: list[Tensor]) -> Tensor:
        if isinstance(output, _Allocation):
            return output.make()
        tensor = tensors[output.tensor]
        return tensor if output.view is None else tensor.as_strided(*output.view)


def _descriptor(kind: type, base: Tensor, fields: dict[str, Any]) -> Any:
    """A descriptor whose fields were checked when the first one of its kind was made."""
    made: Any = object.__new__(kind)
    made.__dict__.update(fields, base=base)
    return made


def taped(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`function`, with tapes. It takes positional arguments, tensors of one device among them, and returns tensors that are no inputs."""
    tapes: dict[tuple[Any, ...], Tape | int] = {}  # an int counts the calls that could not be taped
    lock = threading.Lock()

    @functools.wraps(function)
    def run(*args: Any) -> tuple[Tensor, ...]:
        if recording():  # part of another function's tape, which must see all that is made and launched
            return function(*args)
        key = _key(args)
        tape = tapes.get(key, 0)
        if isinstance(tape, Tape):
            if tape.device == torch._C._cuda_getDevice() and not hooked():
                return tape.play(args)
        elif tape < TRIES and not hooked():
            results, made = _record(function, args)
            with lock:
                if len(tapes) > MOST_TAPES:
                    tapes.clear()
                tapes[key] = tape + 1 if made is None else made
            return results
        return function(*args)

    return run


def _key(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([_class(a) if isinstance(a, Tensor) else tuple(a) if isinstance(a, list) else a for a in args])


def _class(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15


class _Watch(TorchDispatchMode):
    """What a function does with torch: whether only tensors were made and looked at, which were made, and which filled with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.harmless, self.made, self.zeroed = True, set[int](), set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if "empty" in name or name in _ZEROED:
            self.made.add(result.untyped_storage().data_ptr())
        if name in _ZEROED:
            self.zeroed.add(result.untyped_storage().data_ptr())
        elif name == "reshape":  # below an operator's autograd it is shown as it is; a copy would be taken for a constant
            self.harmless &= result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        elif name not in _HARMLESS:
            self.harmless = False
        return result


def _record(function: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Tape | None]:
    with recorded() as launches, _Watch() as watch:
        results = function(*args)
    return results, _tape(args, results, launches, watch) if watch.harmless and launches else None


def _tape(args: tuple[Any, ...], results: tuple[Tensor, ...], launches: list[Launch], watch: _Watch) -> Tape | None:
    """None for what a tape cannot say: one tensor given twice, pointers to other parts of an input's memory."""
    inputs = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.numel()]
    numbers = {args[i].data_ptr(): number for number, i in enumerate(inputs)}
    if len(numbers) != len(inputs) or 0 in numbers:
        return None
    own = {args[i].untyped_storage().data_ptr() for i in inputs}
    used = [_base(value) for launch in launches for value in launch.args if isinstance(value, (Tensor, *DESCRIPTORS))]
    others = {t.untyped_storage().data_ptr(): t for t in [*used, *(t for t in results if t.numel())]}
    others = {start: t for start, t in others.items() if start not in numbers and start not in own}
    # A storage may be made where another died inside the function; what it did not make was there before, and stays.
    constants = [t for start, t in others.items() if start not in watch.made]
    numbers |= {t.data_ptr(): len(inputs) + i for i, t in enumerate(constants)}
    made = {start: t for start, t in others.items() if start in watch.made}
    first = len(inputs) + len(constants)
    numbers |= {start: first + i for i, start in enumerate(made)}
    allocations = [_allocation(t, start in watch.zeroed) for start, t in made.items()]
    steps = [_step(launch, numbers) for launch in launches]
    if any(step is None for step in steps):
        return None
    outputs = [_output(t, numbers, allocations, first) for t in results]
    if any(output is None for output in outputs):
        return None
    return Tape(args[inputs[0]].get_device(), inputs, constants, allocations, steps, outputs)  # type: ignore[arg-type]


def _base(value: Any) -> Tensor:
    base: Tensor = value if isinstance(value, Tensor) else value.base
    return base


def _whole(tensor: Tensor) -> bool:
    return tensor.storage_offset() == 0 and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _allocation(tensor: Tensor, zeroed: bool) -> _Allocation:
    if _whole(tensor):
        return _Allocation(tuple(tensor.shape), tensor.stride(), tensor.dtype, zeroed)
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return _Allocation((count,), (1,), tensor.dtype, zeroed)


def _step(launch: Launch, numbers: dict[int, int]) -> _Step | None:
    values, tensors, inside, described = list(launch.args), [], [], []
    for position, value in enumerate(values):
        if isinstance(value, Tensor):
            start, number = value.untyped_storage().data_ptr(), numbers.get(value.data_ptr())
            if number is not None:
                tensors.append((position, number))
            elif start in numbers:
                inside.append((position, numbers[start], value.data_ptr() - start))
            else:
                return None
            values[position] = None
        elif isinstance(value, DESCRIPTORS):
            number = numbers.get(_base(value).data_ptr())
            if number is None:
                return None
            described.append((position, number, type(value), {key: field for key, field in vars(value).items() if key != "base"}))
            values[position] = None
        elif not isinstance(value, (int, float)):
            return None
    x, y, z = (*launch.grid, 1, 1)[:3]
    return _Step(launch.compiled, (x, y, z), [*values, *launch.tail], tensors, inside, described)


def _output(tensor: Tensor, numbers: dict[int, int], allocations: list[_Allocation], first: int) -> _Output | _Allocation | None:
    if not tensor.numel():
        return _Allocation(tuple(tensor.shape), tensor.stride(), tensor.dtype, False)
    number = numbers.get(tensor.untyped_storage().data_ptr(), -1) - first
    if number < 0 or allocations[number].dtype != tensor.dtype:
        return None
    made = allocations[number]
    if (made.size, made.stride) == (tuple(tensor.shape), tensor.stride()) and tensor.storage_offset() == 0:
        return _Output(number + first, None)
    return _Output(number + first, (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())))
