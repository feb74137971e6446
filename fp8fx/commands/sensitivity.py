"""`fp8fx sensitivity`: which layers FP8 hurts, as a table, JSON and a page, and a recipe that meets a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fp8fx.errors import ModelError
from fp8fx.targets import load_data, load_model, load_object, sample_inputs

if TYPE_CHECKING:
    from fp8fx.sensitivity import Sensitivity


def sensitivity(
    target: Annotated[
        str, typer.Argument(help="The model: package.module:name or file.py:name, a module, or a class or function without arguments.")
    ],
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="The batches: module:name of an iterable, or of a function that returns one.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="Instead of --data, random inputs as in `fp8fx plan`, for a model that returns its loss."),
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="module:name of a function of model and batch that returns a scalar. Default: the model's.")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A shipped recipe's name, or the path of a YAML file.")] = "hybrid",
    exempt: Annotated[list[str] | None, typer.Option("--exempt", help="A pattern of layers to leave in high precision.")] = None,
    batches: Annotated[int | None, typer.Option("--batches", min=1, help="How many batches of the data are used; default all.")] = None,
    gradients: Annotated[bool, typer.Option(help="Look at the gradient roles too.")] = True,
    switch_off: Annotated[bool, typer.Option(help="Also measure the loss with all layers but one in FP8, for each.")] = True,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Allowed increase of the loss: relative, such as 1%, or absolute, such as 0.02.")
    ] = None,
    suggest: Annotated[Path | None, typer.Option("--suggest", help="Write a recipe that meets --budget to this YAML file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with pictures to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON to this file.")] = None,
    high: Annotated[int, typer.Option("--high", min=0, help="Integer inputs of --input are drawn from 0 to this number.")] = 9,
    seed: Annotated[int, typer.Option("--seed", help="Of the model's random weights and of random inputs.")] = 0,
) -> None:
    """Measure what FP8 does to each layer and to the loss, one layer at a time, and suggest which to exempt."""
    import torch

    import fp8fx
    from fp8fx.sensitivity.budget import Budget
    from fp8fx.sensitivity.files import check_place

    if bool(data) == bool(inputs):
        raise ModelError("the loss is measured on data: give either --data module:name, or --input for random inputs (and not both)")
    if suggest is not None and budget is None:
        raise ModelError("--suggest needs to know how much the loss may rise: give --budget, e.g. --budget 1%")
    wanted = None if budget is None else Budget.parse(budget)
    for path in (suggest, html_file, json_file):
        if path is not None:
            check_place(path)
    torch.manual_seed(seed)
    model = load_model(target)
    given = load_data(data) if data else [_one_batch(sample_inputs(inputs or (), model, high, seed))]
    result = fp8fx.sensitivity(
        model,
        given,
        recipe,
        loss=load_object(loss) if loss else None,
        batches=batches,
        gradients=gradients,
        switch_off=switch_off,
        exempt=exempt or (),
        progress=Console(stderr=True).is_terminal,
    )
    try:
        if wanted is not None:
            result.suggest(wanted)
    finally:  # a budget that cannot be met is an error, but what was measured is shown and kept
        _show(result, html_file, json_file)
    if suggest is not None:
        result.save_suggestion(suggest)
        typer.echo(f"the suggested recipe is in {suggest}")


def _one_batch(given: tuple[Any, ...] | dict[str, Any]) -> Any:
    """As the default loss takes it: one argument by itself, several by name or as inputs without a target."""
    if isinstance(given, dict):
        return given
    if len(given) > 1:
        raise ModelError("several inputs of a model that returns its loss are given by name: --input NAME=SHAPE[:dtype] for each")
    return given[0]


def _show(result: Sensitivity, html_file: Path | None, json_file: Path | None) -> None:
    console = Console()
    if console.is_terminal:
        console.print(result.table())
        for line in result.totals():
            console.print(line, highlight=False, markup=False)
    else:
        typer.echo(str(result), nl=False)
    if json_file is not None:
        result.to_json(json_file)
    if html_file is not None:
        result.to_html(html_file)
        typer.echo(f"pictures are in {html_file}")
