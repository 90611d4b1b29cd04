"""Validate that the components of a VAE fit each other and the data."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.core.component import Distribution, as_encoded, distribution, evaluating
from pyro_vae.errors import ModelError, PyroVAEError

if TYPE_CHECKING:
    from pyro_vae.core.vae import VAE


def check(vae: "VAE", x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> None:
    """Validate that the components of a VAE fit each other and the data.

    :meth:`pyro_vae.VAE.check` describes the arguments and the errors.

    Example:
        >>> import pyro_vae as pv
        >>> check(pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae(), torch.zeros(3, 4), None)
    """
    if context is not None and (context.dim() != 2 or len(context) != len(x)):
        raise ModelError(f"the context has shape {tuple(context.shape)} for {len(x)} data; give (datum, c)")
    row = vae.like(x[:2])
    seen = row.isfinite() if mask is None else row.isfinite() & mask[:2].to(row.device)
    row = as_encoded(vae.encoder, row, None if bool(seen.all()) else seen)
    given = () if context is None else (vae.like(context[:2]),)
    with torch.random.fork_rng(devices=[row.device] if row.is_cuda else []), evaluating(vae, len(row)):
        q = called("encoder", vae.encoder, row, *given)
        if tuple(q.batch_shape) != (len(row),):
            raise ModelError(
                f"the encoder gives batch shape {tuple(q.batch_shape)} for {len(row)} rows of shape "
                f"{tuple(x.shape[1:])}; make it give one distribution per row, or flatten the rows"
            )
        p = called("prior", vae.prior, *given)
        if q.event_shape != p.event_shape:
            raise ModelError(
                f"the encoder gives latents of shape {tuple(q.event_shape)}, "
                f"the prior has shape {tuple(p.event_shape)}; make them equal"
            )
        validate_support(p, q)
        likelihood = called("decoder", vae.decoder, drawn("encoder", q), *given)
    if likelihood.event_shape != x.shape[1:]:
        raise ModelError(
            f"the decoder describes data of shape {tuple(likelihood.event_shape)}, "
            f"a row of the data has shape {tuple(x.shape[1:])}; make them equal"
        )


BOUNDED = (
    constraints.greater_than,
    constraints.greater_than_eq,
    constraints.interval,
    constraints.half_open_interval,
    constraints.less_than,
)


def validate_support(p: Distribution, q: Distribution) -> None:
    """Validate that the support of the prior covers that of the posterior.

    A prior on part of the real line and a posterior on all of it have an ELBO of minus infinity.

    Raises:
        ModelError: if the prior has bounds and the posterior has none.

    Example:
        >>> import pyro.distributions as dist
        >>> validate_support(dist.Exponential(1.0), dist.Normal(0.0, 1.0))
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: the posterior has the whole real line as support, the prior part of it ...
    """
    of_prior = support_of(p)
    if isinstance(support_of(q), type(constraints.real)) and isinstance(of_prior, BOUNDED):
        raise ModelError(
            f"the posterior has the whole real line as support, the prior part of it "
            f"({type(of_prior).__name__.strip('_')}); "
            "use a prior on the whole line, or a posterior on the prior's support"
        )


def support_of(d: Distribution) -> Any:
    """Return the constraint on each element, or None if a distribution declares none.

    Example:
        >>> import pyro.distributions as dist
        >>> support_of(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        Real()
    """
    try:
        support = d.support
    except (AttributeError, NotImplementedError):
        return None
    while (inner := getattr(support, "base_constraint", None)) is not None:  # of Independent, and of mixtures
        support = inner
    return support


def validate_real(d: Distribution, what: str) -> None:
    """Validate that latents are unbounded real numbers, as Hamiltonian moves and tables of means need them.

    Args:
        d: the distribution of the latents.
        what: the part that the message names, such as ``the prior``.

    Raises:
        ModelError: if the latents are discrete or bounded.

    Example:
        >>> import pyro.distributions as dist
        >>> validate_real(dist.Normal(torch.zeros(2), 1.0).to_event(1), "the prior")
    """
    support = support_of(d)
    if support is not None and not isinstance(support, type(constraints.real)):
        kind = "discrete" if support.is_discrete else "bounded"
        raise ModelError(
            f"{what} has {kind} latents ({type(support).__name__}), but this function needs latents that can be any "
            "real number; use to_datatree(posterior='psis') for draws, and the methods iw or psis for the evidence"
        )


def called(role: str, part: nn.Module, *given: Tensor) -> Distribution:
    """Return the distribution of a component.

    Args:
        role: ``"prior"``, ``"decoder"`` or ``"encoder"``, for messages.
        part: the component.
        given: its inputs: nothing or a context for the prior; rows, and perhaps a context, for the others.

    Raises:
        ModelError: if the component cannot be called with these inputs.

    Example:
        >>> import pyro_vae as pv
        >>> called("prior", pv.priors.StandardNormal(2)).event_shape
        torch.Size([2])
    """
    try:
        return distribution(part, role, *given)
    except PyroVAEError:
        raise
    except Exception as error:  # a user's component may raise anything
        raise ModelError(_explain_failure(role, part, given, error)) from error


def drawn(role: str, d: Distribution, shape: Any = ()) -> Tensor:
    """Sample the distribution of a component; some reveal sizes that do not fit only then.

    Raises:
        ModelError: if the distribution cannot be sampled.

    Example:
        >>> import pyro_vae as pv
        >>> drawn("prior", pv.priors.StandardNormal(2)(), (3,)).shape
        torch.Size([3, 2])
    """
    try:
        return d.sample(shape)
    except PyroVAEError:
        raise
    except Exception as error:  # as above
        what = f"the distribution of the {role} cannot be sampled ({in_a_line(error)})"
        raise ModelError(f"{what}; make its sizes equal, such as a flow's context and its network's outputs") from error


def in_a_line(error: Exception) -> str:
    """Format an error as its type and the first line of its message.

    Example:
        >>> in_a_line(TypeError("no\\nmore"))
        'TypeError: no'
    """
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _explain_failure(role: str, part: nn.Module, given: tuple[Tensor, ...], error: Exception) -> str:
    what = _describe_inputs(role, given)
    want = next((m.in_features for m in part.modules() if isinstance(m, nn.Linear)), None)
    after = sum(t.shape[-1] for t in given[1:])
    # The first layer takes flat rows, or the last dimension of images.
    fits = given and want in (math.prod(given[0].shape[1:]) + after, given[0].shape[-1] + after)
    if given and want and not fits and isinstance(error, RuntimeError):
        return f"the {role} was given {what} and was built for {want}; make the two equal"
    if given and isinstance(error, ValueError) and "to satisfy the constraint" in str(error):
        return (
            f"the {role} gives parameters outside the range of its distribution, for {what} of up to "
            f"{given[0].abs().max():.3g}; standardize the columns: VAE(..., standardize=pyro_vae.data.mean_and_sd(x))"
        )
    returns = "nothing or a context and returns p(z)" if role == "prior" else "such rows and returns a distribution"
    return f"the {role} cannot be called with {what} ({in_a_line(error)}); make it a module that takes {returns}"


def _describe_inputs(role: str, given: tuple[Tensor, ...]) -> str:
    """Describe the inputs of a component in words."""
    shape = " + ".join(" × ".join(map(str, t.shape[1:])) for t in given)
    return f"{'a context' if role == 'prior' else 'rows'} of {shape} numbers" if given else "nothing"
