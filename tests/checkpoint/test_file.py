"""The file itself: what other programs see, what may be in it, how it is written, and what cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import fp8fx
from fp8fx.checkpoint import write
from fp8fx.checkpoint.read import read


def make(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def compiled(seed: int = 0, recipe: Any = "hybrid") -> nn.Module:
    return fp8fx.compile(make(seed), recipe, capture="symbolic")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.embed(index))


# -- what other programs see ----------------------------------------------------------------------------------------------


def test_the_weights_are_plain_safetensors(tmp_path: Path) -> None:
    """Under their own names, aligned, with the metadata transformers asks for; strip leaves exactly the model's."""
    fast = compiled(recipe="delayed")
    fast(torch.randn(2, 8)).sum().backward()
    fp8fx.save(fast, tmp_path / "a.safetensors", extra=torch.ones(3, dtype=torch.float16))
    found = load_file(tmp_path / "a.safetensors")
    make(5).load_state_dict(fp8fx.strip(found), strict=True)
    assert all(torch.equal(value, found[key]) for key, value in fast.state_dict().items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "fp8fx": "1"}
    assert all(value.data_ptr() % value.element_size() == 0 for value in found.values())


def test_a_tied_tensor_is_in_the_file_once(tmp_path: Path) -> None:
    fast = fp8fx.compile(Tied(), "hybrid", capture="symbolic")
    fp8fx.save(fast, tmp_path / "a.safetensors")
    assert [name for name in load_file(tmp_path / "a.safetensors") if "_fp8fx" not in name] == ["embed.weight"]
    other = fp8fx.compile(Tied(), "hybrid", capture="symbolic")
    fp8fx.load(tmp_path / "a.safetensors", other)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, fast.embed.weight)


def test_extra_comes_back_as_it_was(tmp_path: Path) -> None:
    extra = {
        "epoch": 3,
        "numbers": [0.1, 1e300, -0.0, float("inf"), 2**70, True, None, 1 + 2j],
        "text": "straße \x00 \ud800",
        "bytes": b"\x00\xff",
        1: {"1": torch.ones(1), 1: torch.zeros(1)},
        ("a", 2): (torch.float8_e4m3fn, torch.device("cpu"), torch.Size([2])),
        "counter": Counter({30: 1}),
        "ordered": OrderedDict([("b", []), ("a", ())]),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "scalar": np.float32(1.5),
        "rng": torch.get_rng_state(),
        "tensors": [
            torch.rand(2, 3).t(),
            torch.empty(0, 4),
            torch.tensor(7),
            torch.rand(3, dtype=torch.complex128).conj(),
            torch.rand(4)[::2],
        ],
        "dtypes": [torch.zeros(3, dtype=d) for d in (torch.bool, torch.uint16, torch.complex64, torch.float8_e5m2, torch.float8_e4m3fnuz)],
    }
    fp8fx.save(compiled(), tmp_path / "a.safetensors", extra=extra)
    back = fp8fx.load(tmp_path / "a.safetensors", compiled()).extra
    assert back.keys() == extra.keys()
    for key in ("epoch", "numbers", "text", "bytes", "counter", "ordered"):
        assert back[key] == extra[key]
        assert type(back[key]) is type(extra[key])
    assert str(back["numbers"][2]) == "-0.0"
    assert back[("a", 2)] == (torch.float8_e4m3fn, torch.device("cpu"), (2,))
    assert (back[1]["1"].item(), back[1][1].item()) == (1.0, 0.0)
    assert back["array"].dtype == np.uint32
    assert np.array_equal(back["array"], extra["array"])
    assert back["scalar"] == 1.5
    for ours, theirs in zip(
        [*back["tensors"], *back["dtypes"], back["rng"]], [*extra["tensors"], *extra["dtypes"], extra["rng"]], strict=True
    ):  # type: ignore[misc]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(
            ours.view(torch.uint8) if ours.dtype.itemsize == 1 else ours, theirs.view(torch.uint8) if ours.dtype.itemsize == 1 else theirs
        )


def nested() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"config": Path("x")}, r"extra/config is a pathlib\.PosixPath.*without pickle.*str\(x\)"),
        ([1, {2, 3}], "extra/1 is a builtins.set"),
        ({"f": print}, "extra/f is a builtins.builtin_function"),
        (nested(), "nested more than 100 deep; does it hold itself"),
        ({"meta": torch.empty(2, device="meta")}, "'_fp8fx./extra/meta' is on the meta device"),
        ({"sparse": torch.ones(2, 2).to_sparse()}, r"torch\.sparse_coo: fp8fx\.save writes dense.*zero_grad"),
    ],
)
def test_what_cannot_be_in_it_is_named(extra: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(fp8fx.CheckpointError, match=message):
        fp8fx.save(compiled(), tmp_path / "a.safetensors", extra=extra)
    assert list(tmp_path.iterdir()) == []


class Extra(nn.Linear):
    """A module that keeps more than tensors."""

    calls = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "mask": torch.ones(2)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def test_a_module_s_extra_state(tmp_path: Path) -> None:
    fast, other = (fp8fx.compile(nn.Sequential(Extra(8, 8)), "hybrid", capture="symbolic") for _ in range(2))
    fast[0].calls = 5
    fp8fx.save(fast, tmp_path / "a.safetensors")
    fp8fx.load(tmp_path / "a.safetensors", other)
    assert other[0].calls == 5


# -- how it is written ----------------------------------------------------------------------------------------------------


def test_links_are_followed_and_modes_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.safetensors", tmp_path / "latest.safetensors"
    link.symlink_to(target)
    fp8fx.save(compiled(), link)
    target.chmod(0o640)
    fp8fx.save(compiled(1), link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    fp8fx.load(target, compiled(2))
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["a.safetensors"]


def test_a_relative_path_and_no_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fp8fx.save(compiled(), "model")
    fp8fx.load("model", compiled(1))


def test_abandoned_temporary_files_go_and_live_ones_stay(tmp_path: Path) -> None:
    target = tmp_path / "[a].safetensors"
    dead, other = tmp_path / ".[a].safetensors.0123456789ab.tmp", tmp_path / ".b.safetensors.0123456789ab.tmp"
    dead.write_bytes(b"half")
    other.write_bytes(b"of another")
    with write._temporary(str(target)) as (live, _):
        fp8fx.save(compiled(), target)
        assert Path(live).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.safetensors.0123456789ab.tmp", "[a].safetensors"]


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, by the system's own hand."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 500, 3000])
def test_a_write_that_fails_leaves_the_earlier_file(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fp8fx.save(compiled(), path)
    before = path.read_bytes()
    assert len(before) > 3000
    with file_size_limit(limit), pytest.raises(fp8fx.CheckpointError, match=r"limit on the size.*that was there is unharmed"):
        fp8fx.save(compiled(1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "disk is full: free space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "may not write"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_every_system_call_may_fail(call: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(write.os, call, fails)
    with pytest.raises(fp8fx.CheckpointError, match=rf"'.*a\.safetensors' could not be written: .*{message}.*No file was left there"):
        fp8fx.save(compiled(), path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    fp8fx.save(compiled(), path)
    before = path.read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fp8fx.save(compiled(1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_and_its_directory_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync before the rename, or a crash may leave an empty file under the name; fsync of the directory after it."""
    seen: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        kind = "directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        seen.append(f"fsync {kind}")
        sync(descriptor)

    def rename(source: str, target: str) -> None:
        seen.append("rename")
        replace(source, target)

    monkeypatch.setattr(write.os, "fsync", fsync)
    monkeypatch.setattr(write.os, "replace", rename)
    fp8fx.save(compiled(), tmp_path / "a.safetensors")
    assert seen == ["fsync file", "rename", "fsync directory"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is a directory"),
        (".", "is a directory: name a file in it"),
        ("sub/", "is a directory"),
        ("nowhere/a.safetensors", r"directory of .* does not exist: make it with os\.makedirs"),
        ("a.pt", r"\.pt promises a file of torch\.save.*\.safetensors"),
        ("/dev/null", "no regular file"),
        (3, "path is a int, expected a str"),
        (None, "path is a NoneType"),
    ],
)
def test_paths_that_cannot_be_written(path: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fp8fx.CheckpointError, match=message):
        fp8fx.save(compiled(), path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    fp8fx.save(compiled(), path, extra=1)
    from fp8fx.checkpoint import read as reading

    head = reading._head

    def late(name: str) -> bytes:
        found = head(name)
        if read_times.append(1) or len(read_times) == 1:  # type: ignore[func-returns-value]
            fp8fx.save(compiled(1, "delayed"), path, extra=2)  # between the first and the second look
        return found

    read_times: list[int] = []
    monkeypatch.setattr(reading, "_head", late)
    assert read(path).parts["extra"] == 2


def test_every_byte_counts(tmp_path: Path) -> None:
    """One bit of one byte, at 400 places all over the file, and at each byte of a number in the manifest."""
    path, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    fp8fx.save(compiled(), path, extra=98765)
    data = path.read_bytes()
    number = data.rindex(b"98765")
    for position in [*range(0, len(data), len(data) // 400), *range(number, number + 5), len(data) - 1]:
        changed = bytearray(data)
        changed[position] ^= 1 << position % 5
        target.write_bytes(changed)
        with pytest.raises(fp8fx.CheckpointError):
            read(target)
    path.write_bytes(data)
    assert read(path).parts["extra"] == 98765
