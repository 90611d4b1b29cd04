"""Recover from a divergence: report where it came from, and let a callback roll back."""

from typing import TYPE_CHECKING

from torch import Tensor

from pyro_vae.core.rows import Rows
from pyro_vae.errors import DivergenceError
from pyro_vae.train.divergence_report import NOT_REPRODUCED, broken_weights, origin

if TYPE_CHECKING:
    from pyro_vae.train.run import Run


class NotFiniteError(DivergenceError):
    """A loss or a weight is not finite, and its origin has not been searched for yet."""


def recover(run: "Run", error: DivergenceError) -> None:
    """Let a callback recover from a divergence, or end with the last good weights.

    Raises:
        DivergenceError: if no callback recovers.
    """
    failed = run.step
    run.load(run.good)
    if isinstance(error, NotFiniteError):
        error = DivergenceError(f"{error}{_where(run, failed)}")
        run.load(run.good)
    if any(callback.diverged(run, error) for callback in run.callbacks):
        return
    which = f"the weights after epoch {len(run.epochs)}" if run.epochs else "its initial weights"
    final = DivergenceError(f"{error}; the VAE now has {which}; lower the learning rate")
    final.history = run.history()
    raise final


def _where(run: "Run", failed: int) -> str:
    """Repeat the steps since the last good state up to the failed one, and inspect its batch."""
    for window, feed, segment in run.segments():
        again = segment[: (failed - 1 - run.step) * run.batch_size]
        for losses in run.stepping.steps_over(feed, again):
            run.step += len(losses)
        if len(again) == len(segment):
            run.call_step_hooks()
            continue
        if any(run.group.all_gather(broken_weights(run.vae))) and run.step > run.good["progress"]["step"]:
            run.load(run.good)  # the step before broke the weights, though its loss was finite
            return _where(run, failed - 1)
        index = segment[len(again) :][: run.batch_size]
        numbers = index if window.numbers is None else window.numbers[index]
        return f": at step {failed} {_origin_on_all(run, feed.rows, index, numbers)}"
    return ""


def _origin_on_all(run: "Run", rows: Rows, index: Tensor, numbers: Tensor) -> str:
    """Find the origin: each process searches its part of the batch with its own noise."""
    part, numbers = run.group.part(index), run.group.part(numbers)
    found = ""
    if len(part):
        found = origin(run.vae, run.loss, rows.take(part), size=len(run.source), numbers=numbers.tolist())
    every = [each for each in run.group.all_gather(found) if each]
    return next((each for each in every if each != NOT_REPRODUCED), NOT_REPRODUCED)
