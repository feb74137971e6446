"""A progress bar per training run on a terminal; a few plain lines where the output goes to a file or a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 4  # plain lines per run


@contextmanager
def progress(console: Console, title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Yields what the training loop calls after each step, with the step's number and loss."""
    if not console.is_terminal:
        yield _plain(console, title, steps)
        return
    text = TextColumn("{task.description}  loss {task.fields[loss]}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(f"{title:<25}", total=steps, loss="   -  ")
        yield lambda step, loss: bar.update(task, completed=step + 1, loss=f"{loss:.4f}")


def _plain(console: Console, title: str, steps: int) -> Callable[[int, float], None]:
    every = max(steps // LINES, 1)

    def on_step(step: int, loss: float) -> None:
        if (step + 1) % every == 0 or step + 1 == steps:
            console.print(f"{title:<25} step {step + 1:>4}/{steps}  loss {loss:.4f}", highlight=False)

    return on_step
