"""Progress bars of training and of other long computations."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from pyro_vae.core.format import Console, format_estimate, format_rounded


class Bar:
    """A progress bar with the running ELBO, its validation value and the time left."""

    EVERY = 10
    error = math.nan

    def __init__(self, progress: Progress, epochs: int, steps: int) -> None:
        self.progress, self.epochs, self.pending = progress, epochs, 0
        self.task = progress.add_task("", total=steps, done=0, epochs=epochs, elbo="…", validation="")

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.progress.console.print(sentence)

    def step(self, elbo: float) -> None:
        self.pending += 1
        if self.pending == self.EVERY:
            self.progress.update(self.task, advance=self.pending, elbo=format_rounded(elbo, self.error))
            self.pending = 0

    def resumed(self, epochs: int, steps: int) -> None:
        """Start the bar at the epochs and steps of the resumed run."""
        self.progress.update(self.task, completed=steps, done=epochs)

    def epoch(self, epoch: int, row: dict[str, float]) -> None:
        self.error = row["train_elbo_se"]
        fields: dict[str, Any] = {"done": epoch, "elbo": format_rounded(row["objective"], self.error)}
        if "validation_elbo" in row:
            validation = format_estimate(row["validation_elbo"], row["validation_elbo_se"], over="")
            fields["validation"] = f", validation {validation}"
        self.progress.update(self.task, advance=self.pending, **fields)
        self.pending = 0


@contextmanager
def display(where: str, epochs: int, steps: int, *, show: bool) -> Iterator[Bar]:
    """Print where training runs, and show its progress bar."""
    console = Console(stderr=True, quiet=not show)
    console.print(where)
    columns = (
        TextColumn("epoch {task.fields[done]}/{task.fields[epochs]}"),
        TimeRemainingColumn(table_column=Column(min_width=len("0:00:00"), no_wrap=True)),
        BarColumn(bar_width=10),
        TextColumn("ELBO {task.fields[elbo]}{task.fields[validation]} nats/datum"),
    )
    with Progress(*columns, console=console, disable=not show) as progress:
        yield Bar(progress, epochs, steps)


@contextmanager
def counting(what: str, show: bool) -> Iterator[Callable[[Iterator[Any], int], Iterator[Any]]]:
    """Show a progress bar, and yield a function that passes items on, counts them and extends the total."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True, quiet=not show), disable=not show) as progress:
        task = progress.add_task(what, total=0)

        def count(items: Iterator[Any], number: int) -> Iterator[Any]:
            progress.update(task, total=(progress.tasks[0].total or 0) + number)
            for item in items:
                yield item
                progress.advance(task)

        yield count


Ticks: TypeAlias = Callable[[], None]
"""Called after each unit of work."""


@contextmanager
def ticking(what: str, number: int, show: bool) -> Iterator[Ticks]:
    """Show a progress bar, and yield a function to call after each of ``number`` units of work."""
    with counting(what, show) as count:
        units = count(iter(range(number + 1)), number)
        next(units)
        yield lambda: next(units, None)
