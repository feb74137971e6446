"""Reading a file: all of it is in memory and verified before anything is made of it. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8fx.checkpoint import format
from fp8fx.checkpoint.format import MANIFEST, SEAL
from fp8fx.checkpoint.tree import decode
from fp8fx.errors import CheckpointError

ATTEMPTS = 5  # a file that is replaced while it is read is read again
OF_TORCH = "If it is a state_dict: model.load_state_dict(torch.load(path, weights_only=True))"
FOREIGN = (
    (b"PK\x03\x04", f"a zip file, as torch.save and numpy.savez write. {OF_TORCH}"),
    (b"\x80", f"a pickle, as older torch.save wrote. {OF_TORCH}"),
    (b"\x93NUMPY", "a file of numpy.save"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"{", "text, perhaps JSON"),
)


@dataclass
class Contents:
    """A checkpoint's parts with their tensors in place (on the CPU, owned by nobody else), and what its manifest says."""

    path: str
    parts: dict[str, Any]
    about: dict[str, Any]


def read(path: Any) -> Contents:
    """The verified contents of a file that fp8fx.save wrote. Raises CheckpointError with the reason for any other."""
    try:
        name = os.fsdecode(os.fspath(path))
    except TypeError:
        raise CheckpointError(f"fp8fx.load(model, path): path is a {type(path).__name__}, expected a str or a pathlib.Path") from None
    for attempt in range(ATTEMPTS):
        before = _state_of(name)
        try:
            return _read(name)
        except CheckpointError:
            if attempt == ATTEMPTS - 1 or _state_of(name) == before:
                raise
    raise AssertionError("unreachable")


def _state_of(name: str) -> tuple[int, int, int]:
    """Which file is there now."""
    try:
        found = os.stat(name)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {name!r}{_neighbours(name)}") from None
    except OSError as error:
        raise CheckpointError(f"{name!r} cannot be read: {error.strerror}") from error
    if os.path.isdir(name):
        inside = "it holds a checkpoint of torch.distributed.checkpoint: load it with that and fp8fx.DistributedState"
        other = "fp8fx.save writes one file: name that" + _neighbours(os.path.join(name, ""))
        raise CheckpointError(f"{name!r} is a directory; {inside if os.path.exists(os.path.join(name, '.metadata')) else other}")
    return found.st_ino, found.st_mtime_ns, found.st_size


def _neighbours(name: str) -> str:
    directory = os.path.dirname(name) or "."
    try:
        found = sorted(entry for entry in os.listdir(directory) if entry.endswith(".safetensors") and not entry.startswith("."))
    except OSError:
        return f": the directory {directory!r} does not exist either" if not os.path.isdir(directory) else ""
    shown = ", ".join(map(repr, found[:4])) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return f"; in {directory!r} there is {shown}" if found else f"; in {directory!r} there is no .safetensors file"


def _read(name: str) -> Contents:
    head = _head(name)
    try:
        with safe_open(name, framework="pt") as file:
            _check_origin(name, file.metadata() or {}, len(file.keys()))
            stored = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping. clone: not the mapped file
    except CheckpointError:  # a ValueError too; the file is whole, and of somebody else
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _foreign(name, head) or _damaged(name, f"as safetensors: {error}") from error
    if MANIFEST not in stored or SEAL not in stored:
        raise _damaged(name, "it has no manifest")
    manifest, seal = (bytes(stored.pop(key).numpy().data) for key in (MANIFEST, SEAL))
    if seal != format.seal(head, manifest):
        raise _damaged(name, "the digest over its header and manifest is wrong")
    try:
        about = json.loads(manifest)
        tensors = _verified(name, stored, about.pop("tensors"))
        return Contents(name, decode(about.pop("parts"), tensors), about)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # whoever sealed this was not fp8fx.save
        raise _damaged(name, f"its manifest is not of this form: {error!r}") from error


def _head(name: str) -> bytes:
    """The length of the header and the header."""
    try:
        with open(name, "rb") as file:
            start = file.read(8)
            length, size = int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size
            if len(start) < 8 or length > size - 8:
                short = f"it has {size} bytes, fewer than its header alone needs" if size else "it is empty"
                raise _foreign(name, start) or _damaged(name, short)
            return start + file.read(length)
    except OSError as error:
        raise CheckpointError(f"{name!r} cannot be read: {error.strerror}") from error


def _foreign(name: str, start: bytes) -> CheckpointError | None:
    """Asked only of what is no safetensors file: the length of a header may look like anything."""
    what = next((what for magic, what in FOREIGN if start.startswith(magic)), None)
    return CheckpointError(f"{name!r} is no checkpoint of fp8fx.save: it is {what}") if what else None


def _check_origin(name: str, metadata: dict[str, str], count: int) -> None:
    version = metadata.get("fp8fx")
    if version is None:
        raise CheckpointError(
            f"{name!r} is a safetensors file of {count} tensors that fp8fx.save did not write. If it holds a model's weights: "
            "model.load_state_dict(safetensors.torch.load_file(path))"
        )
    if version != str(format.VERSION):
        raise CheckpointError(
            f"{name!r} has version {version!r} of the format, and this fp8fx reads version {format.VERSION}: install a newer fp8fx (or the "
            "file is damaged there). The weights alone can be read with safetensors.torch.load_file and fp8fx.strip"
        )


def _verified(name: str, stored: dict[str, Tensor], table: dict[str, list[Any]]) -> dict[str, Tensor]:
    if stored.keys() != table.keys():
        raise _damaged(name, f"its tensors are not those of its manifest: {sorted(stored.keys() ^ table.keys())[:3]}")
    tensors = {}
    for key, (dtype, shape, wanted) in table.items():
        data = format.raw(stored.pop(key))
        if format.digest(key, dtype, tuple(shape), data) != wanted:
            raise _damaged(name, f"the digest of {key!r} is wrong")
        try:
            tensors[key] = format.restored(data, dtype, shape)
        except (ValueError, RuntimeError) as error:
            raise _damaged(name, f"{key!r}: {error}") from None
    return tensors


def _damaged(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{name!r} is damaged ({why}). Nothing was loaded; take an earlier checkpoint")
