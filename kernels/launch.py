"""launch: run a Triton kernel without what Triton's own launch does again at every call.

    launch(kernel, grid, args, constexprs, num_warps, num_stages)      =  kernel[grid](*args, **constexprs, num_warps=..., num_stages=...)

Triton looks at every argument and makes text of what it finds, to choose among the compiled forms of a kernel: 50 us and more for a
kernel with many arguments. The same choice is a tuple here: type and alignment of each pointer, and for each integer whether it is 1
or a multiple of 16, which Triton compiles for. What the tuple leads to is Triton's own compiled kernel, made by its own launch.

A kernel that does not compile is a KernelError that names it; the operators fall back on their reference then (fp8fx.ops.cuda).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fp8fx.errors import FP8Warning, KernelError
from fp8fx.kernels.interpret import INTERPRET

# key -> the compiled kernel with the values of its compile-time parameters, which its launcher skips.
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_FAILED: dict[tuple[Any, ...], str] = {}  # key -> what went wrong: compiling takes long, and would fail again
# kernel -> for each run-time argument, whether Triton compiles for its value (of a pointer: its alignment).
_SPECIALIZED: dict[int, tuple[bool, ...]] = {}

NO_GPU = "its tensors are not on a GPU, and kernels run on CUDA GPUs only: fp8fx.quantize, torch.ops.fp8fx and compiled models run anywhere"
_RECORDING = threading.local()

_ONE, _WHOLE, _ANY = 1, 16, 0  # what an integer is: 1, a multiple of 16, neither
_INT32 = 2**31


class KernelCompileError(KernelError):
    """A kernel does not compile, or does not fit on this device: its operator runs the reference instead."""


class Launch(NamedTuple):
    """A launch that was made: compiled kernel, values of its compile-time parameters, grid, run-time arguments."""

    compiled: Any
    tail: tuple[Any, ...]
    grid: tuple[int, ...]
    args: tuple[Any, ...]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constexprs: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> None:
    """Run `kernel` over `grid` (1 to 3 sizes) on the device of its first tensor, on that device's current stream.

    args: every run-time argument, in order; constexprs: every compile-time one, always in the same order for one kernel. maxnreg: the most
    registers of a thread, where the compiler would take more than lets two programs share a multiprocessor. Raises
    KernelError for a kernel that does not compile or fit on the device, and for tensors on several devices.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if INTERPRET.value:
        kernel[grid](*args, **constexprs, **options)
        return
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    key, device = _key(kernel, args, constexprs, options)
    if device < 0:
        _without_a_gpu(kernel, grid, args, constexprs, options)
        return
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, grid, args, constexprs, num_warps, num_stages, maxnreg)
        return
    found = _COMPILED.get(key)
    if found is None or hooked():
        found = _first(key, kernel, grid, args, dict(constexprs), options)
    else:
        compiled, tail = found
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *tail)
    launches = getattr(_RECORDING, "launches", None)
    if launches is not None and found is not None:
        launches.append(Launch(*found, grid, args))


def hooked() -> bool:
    """A profiler wants to see Triton's own launches."""
    hook: Any = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def recording() -> bool:
    """This thread is inside `recorded`."""
    return getattr(_RECORDING, "launches", None) is not None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of this thread inside."""
    before, made = getattr(_RECORDING, "launches", None), list[Launch]()
    _RECORDING.launches = made
    try:
        yield made
    finally:
        _RECORDING.launches = before


def _key(kernel: Any, args: tuple[Any, ...], constexprs: Mapping[str, Any], options: Mapping[str, int]) -> tuple[tuple[Any, ...], int]:
    """What chooses the compiled form, and the index of the device."""
    specialized = _SPECIALIZED.get(id(kernel)) or _describe(kernel, len(args))
    device: int | None = None
    classes: list[Any] = []
    for value, special in zip(args, specialized, strict=True):
        if isinstance(value, Tensor):
            there = value.get_device()  # -1 on a CPU
            if device is None:
                device = there
            elif there != device:
                raise _devices(kernel, args)
            classes.append((value.dtype, not special or value.data_ptr() & 15 == 0))
        elif isinstance(value, int):
            wide = not -_INT32 <= value < _INT32
            classes.append((wide, (_ONE if value == 1 else _WHOLE if value & 15 == 0 else _ANY) if special else _ANY))
        elif isinstance(value, float):
            classes.append(float)
        else:  # a tensor descriptor
            there = value.base.get_device()
            if device is None:
                device = there
            elif there != device:
                raise _devices(kernel, args)
            classes.append((value.base.dtype, tuple(value.block_shape)))
    device = -1 if device is None else device
    return (id(kernel), device, *options.values(), len(options), *constexprs.values(), *classes), device


def _without_a_gpu(kernel: Any, *_: Any) -> None:
    """Tests put a compilation for Hopper here."""
    raise KernelError(f"{kernel.__name__}: {NO_GPU}")


def _describe(kernel: Any, count: int) -> tuple[bool, ...]:
    found = tuple(not (p.do_not_specialize or p.do_not_specialize_on_alignment) for p in kernel.params[:count])
    _SPECIALIZED[id(kernel)] = found
    return found


def _devices(kernel: Any, args: tuple[Any, ...]) -> KernelError:
    tensors = (value if isinstance(value, Tensor) else getattr(value, "base", None) for value in args)
    where = sorted({str(value.device) for value in tensors if isinstance(value, Tensor)})
    return KernelError(
        f"{kernel.__name__}: its tensors are on {' and '.join(where)}. Move the model and its inputs to one device (model.to(...), "
        "x.to(...)): FP8 kernels run on one GPU at a time"
    )


def _first(
    key: tuple[Any, ...],
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constexprs: dict[str, Any],
    options: Mapping[str, int],
) -> tuple[Any, tuple[Any, ...]] | None:
    """Compile by Triton's own launch, and remember what it gives."""
    if key in _FAILED:
        raise KernelCompileError(_FAILED[key])
    try:
        compiled = kernel[grid](*args, **constexprs, **options)
    except (torch.OutOfMemoryError, KernelError):
        raise
    except Exception as error:
        if "CUDA error" in str(error) or "Error [CUDA]" in str(
            error
        ):  # the device is lost, or a launch before this one failed: not ours to hide
            raise
        _FAILED[key] = _failed(kernel, error)
        raise KernelCompileError(_FAILED[key]) from error
    if compiled is None or not _launches_directly(compiled):
        return None
    _COMPILED[key] = (compiled, tuple(constexprs[name] for name in kernel.arg_names[len(args) :]))
    return _COMPILED[key]


def _launches_directly(compiled: Any) -> bool:
    """Triton's launcher takes what `launch` gives it: so in 3.6, and with four of the arguments named in 3.7 and 3.8. No part of Triton's
    interface: where it has changed, kernels are launched by Triton, and nothing is taped."""
    try:
        *first, rest = inspect.signature(compiled.run).parameters.values()
        known = rest.kind is rest.VAR_POSITIONAL and len(first) in (5, 9) and first[4].name == "function"
        known = known and hasattr(compiled, "function") and hasattr(compiled, "packed_metadata")
    except (AttributeError, TypeError, ValueError):
        known = False
    if not known:
        _warn_of_another_triton()
    return known


@functools.cache
def _warn_of_another_triton() -> None:
    warnings.warn(
        f"fp8fx: Triton {triton.__version__} launches kernels otherwise than the versions that are known here (3.6 to 3.8): its own launch "
        "is used, which takes the host some 50 us a kernel. constraints.txt has a version that is known to work",
        FP8Warning,
        stacklevel=2,
    )


def _failed(kernel: Any, error: Exception) -> str:
    while isinstance(error.__cause__, triton.CompilationError):  # in a function that the kernel calls
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or [type(error).__name__]
    # Triton's own errors begin with a place in the kernel, and end with the reason, or with the line.
    first = (lines[-1] if lines[0].startswith("at ") else lines[0]).rstrip(".")
    return (
        f"{kernel.__name__} does not compile here (Triton {triton.__version__}, {torch.cuda.get_device_name()}): {first}. "
        "The reference runs instead, slower; versions that are known to work are in constraints.txt"
    )
