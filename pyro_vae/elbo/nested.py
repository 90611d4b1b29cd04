"""The estimators inside an estimator, and the steps that they count."""

from collections.abc import Iterator
from typing import Any

from pyro.infer import ELBO
from torch import Tensor


def losses_in(root: Any) -> Iterator[Any]:
    """An estimator and those that it wraps as ``elbo``, outermost first."""
    while isinstance(root, ELBO):
        yield root
        root = getattr(root, "elbo", None)


def counters(loss: Any) -> list[Tensor]:
    """The counts of steps, ``loss.step``, of estimators that change while they train."""
    found = (getattr(owner, "step", None) for owner in losses_in(loss))
    return list({id(step): step for step in found if isinstance(step, Tensor)}.values())
