"""The command line: `fp8fx plan | recipe list, show, check, schema | sensitivity | demo`.

A mistake of the user's (any FP8Error) is one red message on stderr and exit code 2; `fp8fx --debug ...` shows the traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from fp8fx.commands.mistakes import advice, check_folder, running
from fp8fx.commands.sensitivity import sensitivity
from fp8fx.errors import FP8Error, FP8Warning, ModelError
from fp8fx.targets import load_model, sample_inputs

if TYPE_CHECKING:
    from torch import nn

WIDTH = 160  # of tables that go to a file or a pipe


class Capture(StrEnum):
    dynamo = "dynamo"
    symbolic = "symbolic"


class DemoModel(StrEnum):
    gpt = "gpt"
    digits = "digits"


class _Group(TyperGroup):
    """The top group: where an FP8Error of any command becomes a message."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("always", FP8Warning)
            try:
                return super().invoke(ctx)
            except FP8Error as error:
                if ctx.params.get("debug"):
                    raise
                _stderr().print(f"error: {error}{advice(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
                raise typer.Exit(2) from None


def _stderr() -> Console:
    return Console(stderr=True)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    """An FP8Warning as one yellow line; others as Python prints them."""
    if issubclass(category, FP8Warning):
        _stderr().print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


app = typer.Typer(
    cls=_Group,
    help="FP8 for PyTorch models, as a declarative recipe says.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")


def main() -> None:
    """The entry point `fp8fx`."""
    # torch logs the traceback of every operation that fails on shapes; the error it becomes is told in one message (`--debug`: all).
    if "--debug" not in sys.argv:
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    app(prog_name="fp8fx")


@app.callback()
def top(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the versions of fp8fx and what it runs on.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        typer.echo(_versions())
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _versions() -> str:
    import torch

    import fp8fx

    try:
        triton = str(importlib.import_module("triton").__version__)
    except ImportError:
        triton = "not installed"
    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
    found = {
        "fp8fx": fp8fx.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "device": device,
    }
    return "\n".join(f"{name:<7} {value}" for name, value in found.items())


# -- plan -----------------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    target: Annotated[
        str, typer.Argument(help="The model: package.module:name or file.py:name, a module, or a class or function without arguments.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A shipped recipe's name, or the path of a YAML file.")] = "hybrid",
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="An input as [name=]SHAPE[:dtype], e.g. 2x3x224x224, 2x16:int64, mask=2x16:bool."),
    ] = None,
    exempt: Annotated[list[str] | None, typer.Option("--exempt", help="A pattern of layers to leave in high precision.")] = None,
    output_fused: Annotated[
        list[str] | None, typer.Option("--output-fused", help="A pattern of layers whose output stays in high precision.")
    ] = None,
    capture: Annotated[
        Capture | None, typer.Option("--capture", help="The front end. Default: dynamo with --input, symbolic without.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan as JSON to this file.")] = None,
    graph: Annotated[
        str | None, typer.Option("--graph", help="Print the graph after a stage: capture, annotate, insert_qdq, cancel, fuse, lower.")
    ] = None,
    save_graphs: Annotated[Path | None, typer.Option("--save-graphs", help="Write the graph after every stage to this folder.")] = None,
    high: Annotated[int, typer.Option("--high", min=0, help="Integer inputs are drawn from 0 to this number.")] = 9,
    seed: Annotated[int, typer.Option("--seed", help="Of the random inputs.")] = 0,
) -> None:
    """Show what a recipe does to a model: one row per layer, with formats and reason, and totals."""
    import fp8fx

    if graph is not None:
        from fp8fx.pipeline import check_stage

        check_stage(graph)
    if (graph or save_graphs) and not inputs:
        raise ModelError("--graph and --save-graphs show captured graphs, which need inputs: give --input, e.g. --input 2x3x224x224")
    if save_graphs is not None:
        check_folder("--save-graphs", save_graphs)
    model = load_model(target)
    front_end = capture.value if capture is not None else None
    changes: dict[str, Any] = {"exempt": exempt or (), "output_fused": output_fused or ()}
    given = sample_inputs(inputs, model, high, seed) if inputs else None
    with running(model, given):
        if given is None or not (graph or save_graphs):
            made = fp8fx.plan(model, recipe, example_inputs=given, capture=front_end, **changes)
            runtime = None
        else:
            runtime = _run_once(fp8fx.compile(model, recipe, capture=front_end or "dynamo", **changes), given)
            made = runtime.plan()
    _print_plan(made)
    if json_file is not None:
        with _writing(json_file):
            json_file.write_text(made.to_json() + "\n", encoding="utf-8")
    if runtime is not None:
        _graphs(runtime, graph, save_graphs)


def _run_once(fast: nn.Module, given: tuple[Any, ...] | dict[str, Any]) -> Any:
    """Capture the model by one call; its Runtime holds the plan and the graphs."""
    from fp8fx.clone import runtime_of

    fast(**given) if isinstance(given, dict) else fast(*given)
    return runtime_of(fast)


# -- output ---------------------------------------------------------------------------------------------------------------


def _print_plan(made: Any) -> None:
    console = Console()
    if not console.is_terminal:
        typer.echo(str(made), nl=False)
        return
    console.print(made.table())
    for line in made.totals():
        console.print(line, highlight=False, markup=False)


def _graphs(runtime: Any, stage: str | None, folder: Path | None) -> None:
    """Print the graphs after `stage`, and write those after every stage: `graph-0-2-insert_qdq.txt`."""
    from fp8fx.pipeline import STAGES

    numbers = range(len(runtime.graphs))
    if stage is not None:
        for index in numbers:
            typer.echo(f"\n# graph {index} of {len(numbers)}, after {stage}\n{_text(runtime.stage(stage, index))}")
    if folder is not None:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for index in numbers:
                for position, name in enumerate(STAGES):
                    file = folder / f"graph-{index}-{position}-{name}.txt"
                    file.write_text(_text(runtime.stage(name, index)) + "\n", encoding="utf-8")
        typer.echo(f"graphs after every stage are in {folder}")


def _text(module: Any) -> str:
    """The graph as a listing, one line per call; after annotate with the decision under each site."""
    from fp8fx.show import listing

    return listing(module).strip()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FP8Error(f"{path}: cannot be written: {error.strerror or error}") from error


# -- recipe ---------------------------------------------------------------------------------------------------------------


@recipes.command("list")
def recipe_list() -> None:
    """The recipes that come with fp8fx."""
    from fp8fx.recipe import Recipe
    from fp8fx.recipe.load import SHIPPED

    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "what it does"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "recipe")
    for name in Recipe.shipped():
        table.add_row(name, _introduction((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")))
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def _introduction(text: str) -> str:
    """The comment a recipe file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


@recipes.command("show")
def recipe_show(name: Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.")]) -> None:
    """Print a recipe with every key written out and `extends` merged in. What it prints is a recipe too."""
    import yaml

    recipe = _load(name)
    typer.echo(f"# {recipe.name}: every key written out, `extends` merged in.")
    typer.echo(yaml.safe_dump(recipe.to_dict(), sort_keys=False, default_flow_style=None, width=130, allow_unicode=True), nl=False)


@recipes.command("check")
def recipe_check(
    file: Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe's name.")],
    model: Annotated[str | None, typer.Option("--model", help="A model, as in `fp8fx plan`: its layer names are checked too.")] = None,
) -> None:
    """Read a recipe and report its mistakes, with file, line and key."""
    recipe = _load(file)
    if model is None:
        typer.echo(f"{file}: ok, {_kind(recipe)}")
        return
    from fp8fx.capture.layers import module_types

    recipe.check_names(module_types(load_model(model)))
    typer.echo(f"{file}: ok for {model}, {_kind(recipe)}")


def _kind(recipe: Any) -> str:
    """`hybrid, 1 rule, 2 exempt`: what the Recipe's repr says after its name."""
    return repr(recipe).removeprefix(f"<Recipe {recipe.name}: ").removesuffix(">")


@recipes.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of a recipe file."""
    from fp8fx.recipe import Recipe

    typer.echo(json.dumps(Recipe.schema(), indent=2))


def _load(name: str) -> Any:
    """A recipe by name or path. Where no recipe ships under the name but a file has it, the file is meant."""
    from fp8fx.recipe import Recipe

    if name not in Recipe.shipped() and Path(name).is_file():
        return Recipe.load(Path(name))
    return Recipe.load(name)


app.command()(sensitivity)

# -- demo -----------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for curves, plans, graphs and results.json.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, to see that everything runs; quality is not judged.")] = False,
    model: Annotated[list[DemoModel] | None, typer.Option("--model", "-m", help="Only this model; may be repeated.")] = None,
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", help="Only this recipe; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="This many steps; quality is not judged.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the first run: weights, order of the data, fold of the digits.")] = 0,
) -> None:
    """Train a byte-level GPT and a small ResNet with and without FP8, and compare. Exit code 1 if a bar is missed."""
    from fp8fx.demo import RECIPES, run

    models = tuple(m.value for m in model) if model else tuple(m.value for m in DemoModel)
    with _writing(out):
        chosen = tuple(recipe) if recipe else RECIPES
        code = run(out=out, quick=quick, recipes=chosen, models=models, steps=steps, seed=seed, processes=os.cpu_count() or 1)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
