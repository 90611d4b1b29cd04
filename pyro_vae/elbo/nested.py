"""Nested estimators and their step counters."""

from collections.abc import Iterator
from typing import Any

from pyro.infer import ELBO
from torch import Tensor


def losses_in(root: Any) -> Iterator[Any]:
    """Iterate over an estimator and the estimators that it wraps as ``elbo``, outermost first."""
    while isinstance(root, ELBO):
        yield root
        root = getattr(root, "elbo", None)


def counters(loss: Any) -> list[Tensor]:
    """Return the step counters, ``loss.step``, of estimators that change during training."""
    found = (getattr(owner, "step", None) for owner in losses_in(loss))
    return list({id(step): step for step in found if isinstance(step, Tensor)}.values())
