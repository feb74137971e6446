"""compute-sanitizer finds no access out of bounds (memcheck) and no race in shared memory (racecheck) in a set of launches.

racecheck is not run on `joins`: in a sum over lanes several threads write one float32 to one place, equal but for the order of their
terms, which the tool reports and nothing depends on (triton-lang/triton#7264).

Where warps have different work, racecheck also reports how Triton tells them which: all warps meet at a barrier, read a byte each, and
meet again before it is written anew. The tool does not follow that barrier, whose two sides lie in different places of the code. Those
reports, and no others, name the kernel's first line and those that divide the warps.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

RUNS = [("memcheck", "casts"), ("memcheck", "joins"), ("memcheck", "products"), ("racecheck", "casts"), ("racecheck", "products"),
        ("memcheck", "specialized"), ("racecheck", "specialized"), ("memcheck", "forms")]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("tool", "group"), RUNS)
def test_clean(tool: str, group: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    script = str(Path(__file__).parent / "sanitize.py")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-P", script, group]
    plain = subprocess.run(command[5:], capture_output=True, text=True, check=False, timeout=300)  # compiles the kernels, without the tool
    assert plain.returncode == 0, plain.stderr[-4000:]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if (tool, group) == ("racecheck", "specialized") and done.returncode == 9 and not _of_our_own(done.stdout):
        done.returncode = 0
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"launched {group}" in done.stdout


def _of_our_own(report: str) -> list[str]:
    """Accesses in racecheck's report that Triton's division of the warps does not make."""
    from fp8fx.kernels import scaled_mm_specialized

    source = Path(scaled_mm_specialized.__file__)
    divides = _dividing_lines(source)
    found = re.findall(r"(?:Read|Write) access at .* in (\S+):(\d+)", report)
    assert found, report[-6000:]
    return [f"{name}:{line}" for name, line in found if name != source.name or int(line) not in divides]


def _dividing_lines(source: Path) -> list[int]:
    """The first line of the kernel, and those from where it divides its warps to its end."""
    lines = source.read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.startswith("def specialized_mm_kernel"))
    return [first, *range(next(i for i, line in enumerate(lines, 1) if line.startswith("    if WARPGROUPS")), len(lines) + 1)]


def test_reports_are_told_apart() -> None:
    """Without a GPU: a report of Triton's own accesses, and one of the kernel's."""
    from fp8fx.kernels import scaled_mm_specialized

    source = Path(scaled_mm_specialized.__file__)
    first, divides, *_ = _dividing_lines(source)
    stores = next(i for i, line in enumerate(source.read_text().splitlines(), 1) if "room.store" in line)
    report = f"Race reported between Read access at k+0x1a0 in {source.name}:{{}}\n and Write access at k+0x7f60 in {source.name}:{{}}"
    assert not _of_our_own(report.format(first, divides))
    assert _of_our_own(report.format(divides, stores)) == [f"{source.name}:{stores}"]
