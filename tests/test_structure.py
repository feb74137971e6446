"""The import order holds, in one direction; modules stay readable; `import fp8fx` needs no Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "fp8fx").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
# Each may import those on the lines above, and those on its own line where the line is in PEERS.
LAYERS = """
errors
formats spec clone fastpath options
costs
kernels
numerics
arithmetic
recipe ops functional
capture
passes
pipeline show hooked
plan state scaling monitor autocast watch
entries distributed shards
records
inner
runtime graph_call
coverage tally
sinks
statistics
compile backend
sensitivity
loss_scaling checkpoint
search
qat
trainers
targets
commands
demo cli
__main__
"""
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
PEERS = {"plan", "state", "scaling", "watch", "monitor", "runtime", "graph_call", "demo", "cli", "targets"}
PASSES = {"annotate", "insert_qdq", "cancel", "fuse", "lower"}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "kernels" if relative.parts[0] == "kernels" else relative.parts[1].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names below fp8fx that a file imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"fp8fx.{alias.name}" for alias in node.names} if node.module == "fp8fx" else {node.module}
    return {name.removeprefix("fp8fx.") for name in found if name.startswith("fp8fx.")}


def parts(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} - {part_of(path)}


def test_imports_go_in_one_direction() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in SOURCES
        if (part := part_of(path)) != "__init__"
        for other in parts(path)
        if RANK[other] > RANK[part] or (RANK[other] == RANK[part] and part not in PEERS)
    ]
    assert wrong == []


def test_passes_do_not_import_each_other() -> None:
    for name in PASSES:
        assert not imports(ROOT / "fp8fx" / "passes" / f"{name}.py") & {f"passes.{other}" for other in PASSES}


def test_kernels_know_formats_and_errors_only() -> None:
    assert all(parts(path) <= {"formats", "errors"} for path in (ROOT / "kernels").rglob("*.py"))


def test_modules_are_short() -> None:
    assert {str(path): n for path in SOURCES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 350} == {}


def test_the_wheel_has_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fp8fx").rglob("__init__.py")}
    assert found <= set(listed)


def test_import_without_triton() -> None:
    # -P: the fp8fx that these tests import, and not the checkout, where fp8fx has no fp8fx.recipes.
    code = "import sys; sys.modules['triton'] = None; import fp8fx; print(fp8fx.Recipe.shipped())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
