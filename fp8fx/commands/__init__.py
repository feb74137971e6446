"""Commands of the command line that are too long for `fp8fx.cli`: one module each, a function that typer reads."""
