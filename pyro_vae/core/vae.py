"""The VAE: a prior, a decoder and an encoder, combined into a Pyro model and guide."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.core import compatibility
from pyro_vae.core.component import Distribution, distribution, infer, masked, observed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.param_store import Picklable, register
from pyro_vae.core.rows import Rows
from pyro_vae.core.standardize import Standardizable, Standardize
from pyro_vae.core.validation import whole
from pyro_vae.errors import DataError, ModelError, SettingsError, type_of


def data_plate(x: Tensor | None, size: int | None, context: Tensor | None = None) -> pyro.plate:
    """Return the plate over data: ``len(x)`` of ``size`` rows, each scaled by size / len(x).

    Without ``x`` the plate has ``size`` rows to draw, or one per row of the context.
    """
    if x is None:
        if size is None and context is None:
            raise SettingsError("x is None; give size=, the number of rows to draw, or give the rows to score as x")
        if context is not None and size not in (None, len(context)):
            raise SettingsError(f"size is {size} but the context has {len(context)} rows; leave size out")
        return pyro.plate("data", whole("size", len(context) if size is None else size, 1))  # type: ignore[arg-type]
    if len(x) == 0:
        raise DataError("x holds no rows; give at least one")
    if size is not None and size < len(x):
        raise SettingsError(f"size is {size} but the batch has {len(x)} rows; give the number of all data as size")
    return pyro.plate("data", len(x) if size is None else size, subsample=x)


class Generative(Picklable):
    """The Pyro model ``p(z) p(x|z)``, a callable of ``(x, size=None, context=None, mask=None)`` with parameters Θ.

    With ``x=None`` it draws ``size`` rows, as in ``pyro.infer.Predictive(vae.model, num_samples=1)(None, size=3)``.

    Example:
        >>> import pyro_vae as pv, torch
        >>> decoder = pv.likelihoods.Normal(pv.nn.mlp(2, [], 3))
        >>> model = Generative(pv.priors.StandardNormal(2), decoder)
        >>> pyro.poutine.trace(model).get_trace(torch.zeros(5, 3)).nodes["z"]["value"].shape
        torch.Size([5, 2])
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.prior, self.decoder = prior, decoder

    def forward(
        self, x: Tensor | None, size: int | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        register(self)
        given = () if context is None else (context,)
        with data_plate(x, size, context):
            z = pyro.sample("z", distribution(self.prior, "prior", *given))
            likelihood = distribution(self.decoder, "decoder", z, *given)
            if mask is not None:
                likelihood = masked(likelihood, mask)
            return pyro.sample("x", likelihood, obs=None if x is None else observed(x, mask))


class Inference(Picklable):
    """The Pyro guide ``q(z|x)``, a callable of ``(x, size=None, context=None, mask=None)`` with parameters φ.

    Example:
        >>> import pyro_vae as pv, torch
        >>> guide = Inference(pv.posteriors.DiagNormal(pv.nn.mlp(3, [], 4)))
        >>> guide(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, x: Tensor, size: int | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if x is None:
            raise DataError("x is None, but the guide infers z from data; to draw from the prior, call vae.model alone")
        register(self)
        with data_plate(x, size):
            return pyro.sample("z", infer(self.encoder, x, context, mask))


def _kind(part: Any) -> str:
    """Describe an invalid component."""
    makes = part.func if isinstance(part, partial) else part
    if isinstance(makes, type):
        return f"{'a partial of ' * isinstance(part, partial)}the class {makes.__name__}, which must be called"
    return type_of(part)


def _standardize_by(part: nn.Module, role: str, standardize: Any) -> None:
    if not isinstance(standardize, Standardize):
        raise ModelError(f"standardize is {type_of(standardize)}; give pyro_vae.data.mean_and_sd of the training data")
    if not isinstance(part, Standardizable):
        base = "likelihoods.Likelihood" if role == "decoder" else "posteriors.Posterior"
        raise ModelError(
            f"the {role} is {type_of(part)}, which does not support standardization; use a "
            f"pyro_vae.{base}, or standardize the data"
        )
    part.standardize_by(standardize)


class VAE(Amortized):
    """A variational autoencoder: a prior, a decoder and an encoder, each a module that returns a distribution.

    .. math:: p(x, z) = p(z)\\, p(x | z), \\qquad q(z | x)

    ``vae.model`` and ``vae.guide`` are Pyro callables of ``(x, size=None, context=None, mask=None)`` with sites ``z``
    and ``x`` in the plate ``data``. With ``size`` each datum has the weight ``size / len(x)``. A ``context`` of shape
    ``(datum, c)`` is passed to prior, decoder and encoder as their last argument (a conditional VAE); pass it by
    position through Pyro's handlers, which have an argument named ``context`` themselves. Where ``mask`` is false a
    feature is missing: the likelihood leaves it out, and the encoder sees 0 (and the mask as its third argument, if it
    has ``takes_mask``).

    Both are modules: ``vae.model.parameters()`` are the generative parameters Θ, ``vae.guide.parameters()`` the
    inference parameters φ. Any number of VAEs, including deep copies, can be trained in one process.

    Args:
        prior: ``() → p(z)``, event shape ``(latent,)``.
        decoder: ``z → p(x|z)``, from ``(*batch, latent)`` to event shape ``(*features)``.
        encoder: ``x → q(z|x)``, from ``(*batch, *features)`` to event shape ``(latent,)``.
        standardize: how to standardize the columns for the networks, such as ``pv.data.mean_and_sd(train)``; not at
            all by default. Columns of counts, categories or shares are not changed, and the likelihood remains a
            density in the units of the data.

    A prior or encoder that needs another component has a method ``bind(vae)``, which the constructor calls.

    Raises:
        ModelError: if a component is not a ``torch.nn.Module``, or does not support standardization.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv, torch
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StandardNormal(2),
        ...     decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 5), scale=0.5),
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 2 * 2)),
        ... )
        >>> vae.encoder(torch.zeros(3, 5)).batch_shape, vae.prior().event_shape
        (torch.Size([3]), torch.Size([2]))
    """

    model: Generative
    guide: Inference

    def __init__(
        self, *, prior: nn.Module, decoder: nn.Module, encoder: nn.Module, standardize: Standardize | None = None
    ) -> None:
        super().__init__()
        for role, part in {"prior": prior, "decoder": decoder, "encoder": encoder}.items():
            if not isinstance(part, nn.Module):
                raise ModelError(
                    f"the {role} is {_kind(part)}; it must be a torch.nn.Module that returns a distribution"
                )
        self.model = Generative(prior, decoder)
        self.guide = Inference(encoder)
        self._bind(standardize)

    def _bind(self, standardize: Standardize | None) -> None:
        if standardize is not None:
            _standardize_by(self.decoder, "decoder", standardize)
            # The encoder standardizes the same columns as the likelihood.
            _standardize_by(self.encoder, "encoder", self.decoder.standardize)
        for part in (self.prior, self.encoder):
            if callable(bind := getattr(part, "bind", None)):
                bind(self)

    @property
    def prior(self) -> nn.Module:
        """``() → p(z)``."""
        return self.model.prior

    @property
    def standardize(self) -> Standardize | None:
        """The standardization of the columns for the networks; None if there is none."""
        return getattr(self.decoder, "standardize", None)

    @property
    def decoder(self) -> nn.Module:
        """``z → p(x|z)``."""
        return self.model.decoder

    @property
    def encoder(self) -> nn.Module:
        """``x → q(z|x)``."""
        return self.guide.encoder

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.nn.Module stores modules before it looks up properties, so components are forwarded here.
        home = {"prior": "model", "decoder": "model", "encoder": "guide"}.get(name)
        if home is None:
            super().__setattr__(name, value)
        else:
            standardize = self.standardize
            setattr(getattr(self, home), name, value)
            self._bind(standardize)

    def posterior(self, rows: Rows) -> Distribution:
        """Return ``q(z|x)`` given rows with their contexts and masks, batch shape ``(datum,)``."""
        return infer(self.encoder, rows.x, rows.context, rows.mask)

    def likelihood(self, z: Tensor, rows: Rows) -> Distribution:
        """Return ``p(x|z)`` at latents ``(*, datum, latent)`` of rows, without their missing values."""
        likelihood = compatibility.called("decoder", self.decoder, z, *rows.given)
        return likelihood if rows.mask is None else masked(likelihood, rows.mask)

    def prior_of(self, rows: Rows) -> Distribution:
        """Return ``p(z)`` given the contexts of rows, batch shape ``(datum,)``, or ``()`` without contexts."""
        return compatibility.called("prior", self.prior, *rows.given)

    def latent_names(self, rows: Rows) -> list[str]:
        """Return the name of each latent, ``z[0]``, ``z[1]``, …."""
        return [f"z[{i}]" for i in range(self.prior_of(rows).event_shape.numel())]

    def closed_form_posterior(self, rows: Rows) -> Distribution:
        """Return ``q(z|x)`` of rows, as :meth:`posterior`."""
        return self.posterior(rows)

    def part_names(self) -> dict[str, str]:
        """Return the class of each component, by role."""
        parts = {"prior": self.prior, "likelihood": self.decoder, "posterior": self.encoder}
        return {role: type(part).__name__ for role, part in parts.items()}

    def stand_in(self, number: int) -> Tensor:
        """Return rows without features, since prior and decoder do not see data."""
        return self.like(torch.empty(number, 0))

    def log_joint_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            prior = self.prior_of(rows)  # once for all latents

        def log_joint(z: Tensor) -> Tensor:
            return prior.log_prob(z) + self.likelihood(z, rows).log_prob(rows.x)

        return log_joint

    def log_joint(self, z: Tensor, rows: Rows) -> Tensor:
        """Return ``log p(z) + log p(x|z)`` of rows at latents ``(*, datum, latent)``, in nats, shape ``(*, datum)``.

        Example:
            >>> import pyro_vae as pv
            >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
            >>> vae, rows = linear.as_vae(), Rows(torch.ones(3, 5).double())
            >>> z = vae.posterior(rows).sample((4,))
            >>> evidence = vae.log_joint(z, rows) - vae.posterior(rows).log_prob(z)
            >>> bool((evidence - linear.log_marginal(rows.x)).abs().max() < 1e-12)
            True
        """
        return self.prior_of(rows).log_prob(z) + self.likelihood(z, rows).log_prob(rows.x)

    @torch.no_grad()
    def check(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Validate that the components fit each other and the data.

        Args:
            x: data, shape ``(datum, *features)``; only the first two rows are used, with non-finite values as missing.
            context: shape ``(datum, c)``.
            mask: true where a value was observed, same shape as ``x``.

        Raises:
            ModelError: naming both sides that do not fit.
        """
        compatibility.check(self, x, context, mask)
