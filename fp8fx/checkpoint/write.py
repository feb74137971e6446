"""Writing a file so that its name always leads to a whole one: a temporary file beside it, fsync, rename, fsync of the directory.

Tensors are brought to the CPU, digested and written one by one, so that a model on a GPU is never in the host's memory as a whole.

A process that is killed leaves its temporary file `.<name>.<random>.tmp` behind. Its writer holds a lock on it (flock), which the system
takes back however the writer ends: the next save under that name removes temporary files that nobody has locked.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from torch import Tensor

from fp8fx.checkpoint import format
from fp8fx.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows: a killed process' temporary files stay there
    fcntl = None  # type: ignore[assignment]

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")


def target_of(path: Any) -> str:
    """Where the file goes: links are followed, as torch.save does. Raises CheckpointError for what cannot be written to."""
    try:
        name = os.fsdecode(os.fspath(path))
    except TypeError:
        raise CheckpointError(f"fp8fx.save(model, path): path is a {type(path).__name__}, expected a str or a pathlib.Path") from None
    target = os.path.realpath(name)
    directory = os.path.dirname(target)
    if not name or os.path.isdir(target) or name.endswith(os.sep):
        raise CheckpointError(f"fp8fx.save writes one file, and {name!r} is a directory: name a file in it, such as 'step100.safetensors'")
    if os.path.lexists(target) and not stat.S_ISREG(os.stat(target).st_mode):
        raise CheckpointError(f"{name!r} is no regular file, and fp8fx.save replaces what is there: name another")
    if not os.path.isdir(directory):
        raise CheckpointError(f"the directory of {name!r} does not exist: make it with os.makedirs({directory!r}, exist_ok=True)")
    if name.lower().endswith(PICKLES):
        ending = os.path.splitext(name)[1]
        raise CheckpointError(f"{name!r}: {ending} promises a file of torch.save, and fp8fx.save writes safetensors; call it .safetensors")
    return target


def write(target: str, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the checkpoint. If anything goes wrong, what was at `target` is there still, whole."""
    try:
        remove_abandoned(target)
        with _temporary(target) as (name, file):
            _fill(file, parts, tensors)
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, target)
        _sync_directory(os.path.dirname(target))
    except OSError as error:
        raise CheckpointError(_explain(target, error)) from error


def _fill(file: BinaryIO, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    names = format.order(tensors)
    length = len(format.manifest(parts, tensors, dict.fromkeys(tensors, "0" * format.DIGEST_CHARS)))
    head = format.head(tensors, names, length)
    file.write(head)
    digests = {}
    for name in names:
        data = format.raw(tensors[name])
        digests[name] = format.digest(name, format.dtype_name(tensors[name].dtype), tuple(tensors[name].shape), data)
        file.write(data.numpy().data)
    manifest = format.manifest(parts, tensors, digests)
    file.write(manifest)
    file.write(format.seal(head, manifest))


@contextlib.contextmanager
def _temporary(target: str) -> Iterator[tuple[str, BinaryIO]]:
    """A new locked file beside `target`, which is gone afterwards unless it was renamed."""
    directory, base = os.path.split(target)
    mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else 0o666
    while True:
        name = os.path.join(directory, f".{base}.{secrets.token_hex(6)}.tmp")
        file = os.fdopen(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode), "wb", 1 << 20)
        if _lock(file.fileno()) and os.fstat(file.fileno()).st_nlink:  # else another save took it for abandoned before it was locked
            break
        file.close()
    try:
        with file:
            yield name, file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # a file system without locks: nobody removes files there either
    return True


def remove_abandoned(target: str) -> None:
    """Remove temporary files of `target` whose writer is gone."""
    if fcntl is None:
        return
    directory, base = os.path.split(target)
    for name in glob.glob(os.path.join(glob.escape(directory), f".{glob.escape(base)}.{'[0-9a-f]' * 12}.tmp")):
        with contextlib.suppress(OSError):  # another process may remove it at the same time, or own it
            descriptor = os.open(name, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name)
            finally:
                os.close(descriptor)


def _sync_directory(directory: str) -> None:
    """The rename itself must reach the disk. Some systems cannot sync a directory, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explain(target: str, error: OSError) -> str:
    advice = {
        errno.ENOSPC: "The disk is full: free space or save elsewhere; optimizer.zero_grad() before saving leaves gradients out.",
        errno.EDQUOT: "Your quota is used up: free space or save elsewhere.",
        errno.EFBIG: "A limit on the size of files (ulimit -f, or the file system's) is below what the checkpoint needs.",
        errno.EACCES: "You may not write to that directory.",
        errno.EPERM: "You may not write to that directory.",
        errno.EROFS: "The file system is read-only.",
    }.get(error.errno or 0, "")
    kept = "The checkpoint that was there is unharmed." if os.path.exists(target) else "No file was left there."
    return f"{target!r} could not be written: {error.strerror or error}. {advice} {kept}".replace("  ", " ")
