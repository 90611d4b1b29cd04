"""Running a Pyro model against its guide, and what estimators are called."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites

from pyro_vae.errors import ModelError

Program = Callable[..., Any]
Site = dict[str, Any]
Loss: TypeAlias = ELBO | Callable[..., Any]


def traces(model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
    """The trace of the model replayed against that of the guide, and the latter, without the plates' own sites."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def samples(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace, by name."""
    return ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample")


def differentiable(loss: Loss) -> Callable[..., Any]:
    """The function of (model, guide, x, size) whose gradient ``SVI(..., loss=loss)`` would take."""
    if not isinstance(loss, ELBO):
        return loss
    if not hasattr(loss, "differentiable_loss"):
        raise ModelError(f"{loss_name(loss)} has no differentiable_loss, so it cannot be compared; leave it out")
    return loss.differentiable_loss


def loss_name(loss: Loss) -> str:
    """What a person calls an estimator."""
    function = loss.func if isinstance(loss, partial) else loss
    return getattr(function, "__name__", type(function).__name__)


def particles_of(loss: Loss) -> int:
    """How many particles an estimator draws."""
    settings = loss.keywords if isinstance(loss, partial) else vars(loss) if isinstance(loss, ELBO) else {}
    return int(settings.get("num_particles", 1))
