"""What is done when a training diverges: where it came from is told, and a callback may put it right."""

from typing import TYPE_CHECKING

from torch import Tensor

from pyro_vae.core.rows import Rows
from pyro_vae.errors import DivergenceError
from pyro_vae.train.divergence_report import NOT_AGAIN, broken_weights, origin

if TYPE_CHECKING:
    from pyro_vae.train.run import Run


class NotFiniteError(DivergenceError):
    """A loss that is no finite number, or what a step made of the weights; where it came from is not looked for yet."""


def put_right(run: "Run", error: DivergenceError) -> None:
    """Have a callback mend it, or end with the last good weights.

    Raises:
        DivergenceError: if no callback puts it right.
    """
    failed = run.step
    run.load(run.good)
    if isinstance(error, NotFiniteError):
        error = DivergenceError(f"{error}{_where(run, failed)}")
        run.load(run.good)
    if any(callback.diverged(run, error) for callback in run.callbacks):
        return
    kept = f"those after epoch {len(run.epochs)}" if run.epochs else "the initial ones"
    final = DivergenceError(f"{error}; the weights kept are {kept}; lower the learning rate")
    final.history = run.history()
    raise final


def _where(run: "Run", failed: int) -> str:
    """Take the steps since the last good state again, up to the one that failed, and look at its data."""
    for window, feed, segment in run.segments():
        again = segment[: (failed - 1 - run.step) * run.batch_size]
        for losses in run.stepping.along(feed, again):
            run.step += len(losses)
        if len(again) == len(segment):
            run.tell_of_steps()
            continue
        if any(run.group.gathered(broken_weights(run.vae))) and run.step > run.good["progress"]["step"]:
            run.load(run.good)  # the step before it has broken them, at a loss that was finite
            return _where(run, failed - 1)
        index = segment[len(again) :][: run.batch_size]
        numbers = index if window.numbers is None else window.numbers[index]
        return f": at step {failed} {_origin_on_all(run, feed.rows, index, numbers)}"
    return ""


def _origin_on_all(run: "Run", rows: Rows, index: Tensor, numbers: Tensor) -> str:
    """Where it came from, looked for by each process in its part of the batch, with its noise."""
    own, numbers = run.group.part(index), run.group.part(numbers)
    found = ""
    if len(own):
        found = origin(run.vae, run.loss, rows.take(own), size=len(run.source), numbers=numbers.tolist())
    every = [each for each in run.group.gathered(found) if each]
    return next((each for each in every if each != NOT_AGAIN), NOT_AGAIN)
