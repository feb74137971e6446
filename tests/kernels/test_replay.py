"""Tapes, played where there is no GPU: launches are only written down, with the memory they would get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8fx.kernels import gluon, launch, replay
from fp8fx.kernels.layout import empty_transposed

KEPT = torch.ones(4)  # what a function keeps for good: no tape may make it anew


class Compiled:
    """Stands for Triton's compiled kernel: keeps the run-time arguments of its launches."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.seen.append(args[9:])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(replay, "_empty", lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype))
    return Compiled()


def gluon_descriptor(*args: Any) -> Any:
    if gluon.SPECIALIZED is None:
        pytest.skip("no Gluon: Triton's interpreter, or another version of it")
    return gluon.SPECIALIZED.described(*args)


def product(compiled: Compiled, descriptor: Any = TensorDescriptor) -> Any:
    """A function that launches once: on a descriptor of x, on a constant, and on what it makes."""

    def run(x: Tensor, number: int) -> tuple[Tensor, ...]:
        y, zeros = torch.empty(x.shape[0], 8), torch.zeros(3)
        described = descriptor(x, list(x.shape), list(x.stride()), [16, 16])
        args = (described, KEPT, y, zeros, number)
        launches = getattr(launch._RECORDING, "launches", None)
        if launches is not None:
            launches.append(launch.Launch(compiled, ("constexpr",), (7,), args))
        return y.view(-1), zeros

    return run


@pytest.mark.parametrize("descriptor", [TensorDescriptor, gluon_descriptor])
def test_a_tape_gives_each_launch_its_memory(compiled: Compiled, descriptor: Any) -> None:
    taped, xs = replay.taped(product(compiled, descriptor)), [torch.randn(32, 16) for _ in range(3)]
    outputs = [taped(x, 5) for x in xs]
    assert len(compiled.seen) == 2, "the first call records, the others play"
    for x, (y, zeros), (described, kept, into, cleared, number, tail) in zip(xs[1:], outputs[1:], compiled.seen, strict=True):
        assert described.base is x
        assert type(described) is type(descriptor(x, [32, 16], [16, 1], [16, 16]))
        assert (described.shape, described.strides, described.block_shape) == ([32, 16], [16, 1], [16, 16])
        assert kept is KEPT
        assert into.data_ptr() == y.data_ptr()
        assert y.shape == (256,)
        assert cleared is zeros
        assert zeros.tolist() == [0, 0, 0]
        assert (number, tail) == (5, "constexpr")
    assert outputs[1][0].data_ptr() != outputs[2][0].data_ptr()


def test_an_output_in_padded_rows(compiled: Compiled) -> None:
    """It is a view of what is made anew, padding included, and the kernel gets the whole."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        t = empty_transposed(x.shape, torch.uint8, x)
        launches = getattr(launch._RECORDING, "launches", None)
        if launches is not None:
            launches.append(launch.Launch(compiled, (), (1,), (x, t)))
        return (t.mT,)

    taped, xs = replay.taped(run), [torch.randn(5, 3), torch.randn(5, 3)]
    for x in xs:
        (qt,) = taped(x)
        assert (qt.shape, qt.stride()) == ((5, 3), (1, 16))
    ((_, into),) = compiled.seen
    assert into.data_ptr() == qt.data_ptr()
    assert into.untyped_storage().nbytes() == 3 * 16


def test_other_arguments_have_tapes_of_their_own(compiled: Compiled) -> None:
    taped, x = replay.taped(product(compiled)), torch.randn(32, 16)
    for number in (1, 2, 1, 2):
        taped(x, number)
    assert [args[4] for args in compiled.seen] == [1, 2]
    taped(torch.randn(64, 16), 1)
    assert len(compiled.seen) == 2


def test_what_copies_is_not_taped(compiled: Compiled) -> None:
    inner = product(compiled)
    taped, x = replay.taped(lambda x: inner(x.clone(), 1)), torch.randn(32, 16)
    for _ in range(replay.TRIES + 2):
        taped(x)
    assert not compiled.seen


def test_a_taped_function_inside_of_another_is_part_of_its_tape(compiled: Compiled) -> None:
    inner = replay.taped(product(compiled))
    inner(torch.randn(32, 16), 3)  # has a tape already
    outer = replay.taped(lambda x: (*inner(x, 3), *inner(x, 4)))
    xs = [torch.randn(32, 16) for _ in range(2)]
    outer(xs[0])
    assert not compiled.seen
    y, _, z, _ = outer(xs[1])
    assert [args[2].data_ptr() for args in compiled.seen] == [y.data_ptr(), z.data_ptr()]
    assert [args[4] for args in compiled.seen] == [3, 4]
