"""Priors, ``() → p(z)`` or ``context → p(z|context)``; unconditional priors ignore a context."""

from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.core.categories import GumbelSoftmax as _GumbelSoftmax
from pyro_vae.core.categories import OneHots
from pyro_vae.core.compatibility import called, drawn, in_a_line
from pyro_vae.core.component import Conditional, Distribution, at_least_single
from pyro_vae.core.distributions import StudentT as _StudentT
from pyro_vae.core.given_numbers import GivenNumbers
from pyro_vae.core.standardize import Standardize
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.data.rows import rows_of
from pyro_vae.errors import ModelError, PyroVAEError, SettingsError, type_of

if TYPE_CHECKING:
    from pyro_vae.core.vae import VAE


class Prior(Conditional):
    """Base class of priors: modules that take no argument, or a context, and return ``p(z)``.

    Example:
        >>> issubclass(StandardNormal, Prior)
        True
    """

    takes_data: bool = False
    """Whether the constructor's first argument is a data set instead of the number of latents."""


class StandardNormal(Prior):
    """The standard normal prior, equation (14) of the note.

    .. math:: p(z) = \\mathcal N(z | 0, I)

    Args:
        latent_dim: the number of latents d, at least 1.

    Raises:
        SettingsError: if ``latent_dim`` is below 1.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> StandardNormal(3)().log_prob(torch.zeros(3))
        tensor(-2.7568)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        whole("latent_dim", latent_dim, 1)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, context: Tensor | None = None) -> Distribution:
        return dist.Normal(self.loc, self.scale).to_event(1)

    def extra_repr(self) -> str:
        return f"latent_dim={len(self.loc)}"


class _LocationScale(Prior):
    """Base class of priors with a learned location and scale per latent."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(whole("latent_dim", latent_dim, 1)))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    def extra_repr(self) -> str:
        return f"latent_dim={len(self.loc)}"


class Normal(_LocationScale):
    """A diagonal normal with learned location and scale.

    .. math:: p(z) = \\mathcal N(z | m, \\mathrm{diag}(s^2))

    Args:
        latent_dim: the number of latents d, at least 1. Training starts at N(0, I).

    Raises:
        SettingsError: if ``latent_dim`` is below 1.

    References:
        | Stochastic Backpropagation (Rezende, Mohamed & Wierstra, 2014), https://arxiv.org/abs/1401.4082

    Example:
        >>> Normal(3)().log_prob(torch.zeros(3)).item() == StandardNormal(3)().log_prob(torch.zeros(3)).item()
        True
    """

    def forward(self, context: Tensor | None = None) -> Distribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class Laplace(_LocationScale):
    """Independent Laplace distributions with learned locations and scales, for sparse latents.

    .. math:: p(z) = \\prod_j \\frac1{2 b_j} \\exp(-|z_j - m_j| / b_j)

    Args:
        latent_dim: the number of latents d, at least 1. Training starts at location 0 and b = 1.

    Raises:
        SettingsError: if ``latent_dim`` is below 1.

    References:
        | The Bayesian Lasso (Park & Casella, 2008), https://doi.org/10.1198/016214508000000337

    Example:
        >>> Laplace(3)().log_prob(torch.zeros(3))  # -3 log 2
        tensor(-2.0794, grad_fn=<...>)
    """

    def forward(self, context: Tensor | None = None) -> Distribution:
        return dist.Laplace(self.loc, self.log_scale.exp()).to_event(1)


class StudentT(_LocationScale):
    """Independent Student-t distributions with learned locations and scales, for heavy-tailed latents.

    .. math:: p(z) = \\prod_j t_\\nu(z_j | m_j, s_j)

    Args:
        latent_dim: the number of latents d, at least 1. Training starts at location 0 and scale 1.
        df: the degrees of freedom ν, above 0; the variance is finite above 2.

    Raises:
        SettingsError: if ``latent_dim`` is below 1 or ``df`` is not above 0.

    References:
        | Robust Statistical Modeling Using the t Distribution (Lange, Little & Taylor, 1989),
          https://doi.org/10.1080/01621459.1989.10478852

    Example:
        >>> StudentT(1, df=1.0)().log_prob(torch.zeros(1))  # Cauchy: -log π
        tensor(-1.1447, grad_fn=<...>)
    """

    def __init__(self, latent_dim: int, *, df: float = 5.0) -> None:
        super().__init__(latent_dim)
        self.df = above_zero("df", df)

    def forward(self, context: Tensor | None = None) -> Distribution:
        return _StudentT(self.df, self.loc, self.log_scale.exp()).to_event(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, df={self.df:g}"


class GaussianMixture(Prior):
    """A mixture of diagonal normals with learned weights, locations and scales.

    .. math:: p(z) = \\sum_k \\pi_k \\, \\mathcal N(z | m_k, \\mathrm{diag}(s_k^2))

    Args:
        latent_dim: the number of latents d, at least 1.
        components: the number of normals, at least 1. Their locations start as draws from N(0, I).

    Raises:
        SettingsError: if ``latent_dim`` or ``components`` is below 1.

    References:
        | Variational Deep Embedding (Jiang et al., 2017), https://arxiv.org/abs/1611.05148

    Example:
        >>> _ = torch.manual_seed(0)
        >>> GaussianMixture(2, components=5)().sample((7,)).shape
        torch.Size([7, 2])
    """

    def __init__(self, latent_dim: int, *, components: int = 10) -> None:
        super().__init__()
        shape = whole("components", components, 1), whole("latent_dim", latent_dim, 1)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward(self, context: Tensor | None = None) -> Distribution:
        normals = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), normals)

    def extra_repr(self) -> str:
        components, latents = self.loc.shape
        return f"latent_dim={latents}, components={components}"


class VampPrior(GivenNumbers, Prior):
    """A mixture of the encoder's posteriors at learned pseudo-inputs.

    .. math:: p(z) = \\frac1K \\sum_k q(z | u_k), \\qquad p(z | c) = \\frac1K \\sum_k q(z | u_k, c)

    With a context c, each pseudo-input is encoded together with the context of the datum. The prior uses the
    encoder of the VAE that it belongs to. This encoder is not a submodule of the prior, so its parameters remain
    inference parameters φ; the prior's parameters are the pseudo-inputs u alone.

    Args:
        data: shape ``(datum, *features)``. The pseudo-inputs start as randomly drawn rows, with 0 in place of missing
            values (:class:`~pyro_vae.data.Data` with a mask). If the VAE standardizes, the pseudo-inputs are stored
            in standardized units, where 0 is the mean; :attr:`inputs` returns them in the units of the data.
        components: the number of pseudo-inputs K, from 1 to the number of data.

    Raises:
        DataError: if the data are not rows of finite numbers.
        SettingsError: if ``components`` is out of range.
        ModelError: when called before the prior belongs to a VAE, or if the encoder does not take such data.

    References:
        | VAE with a VampPrior (Tomczak & Welling, 2018), https://arxiv.org/abs/1705.07120

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     prior=VampPrior(torch.randn(100, 5), components=10),
        ...     decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 5)),
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 4)),
        ... )
        >>> vae.prior().sample((7,)).shape
        torch.Size([7, 2])
    """

    takes_data = True

    def __init__(self, data: Any, *, components: int = 50) -> None:
        super().__init__()
        rows = rows_of(data, source="data of the VampPrior")
        if whole("components", components, 1) > len(rows):
            raise SettingsError(f"components is {components}; it must be from 1 to the number of data, {len(rows)}")
        start = rows.take(torch.randperm(len(rows))[:components])
        self.pseudo_inputs = nn.Parameter(self.keep("pseudo_inputs", start.x.double()))
        self._missing = None if start.mask is None else ~start.mask
        self._standardized = False
        self._encoder: tuple[nn.Module, ...] = ()
        self._forget(data, self.pseudo_inputs)

    def bind(self, vae: "VAE") -> None:
        """Use the VAE's encoder for q, without its refinement if it has one.

        The tuple keeps the encoder from becoming a submodule.
        """
        self._encoder = (getattr(vae.encoder, "amortized", vae.encoder),)
        if self._units is not None and not self._standardized:
            self._standardized = True
            self._standardize(self._units)

    @property
    def _units(self) -> Standardize | None:
        return getattr(self._encoder[0], "standardize", None)

    @torch.no_grad()
    def _standardize(self, units: Standardize) -> None:
        """Convert the pseudo-inputs to standardized units, in which all columns train at the same pace."""
        start = units(self.pseudo_inputs.double())
        start = start if self._missing is None else start.masked_fill(self._missing.to(start.device), 0.0)
        self.pseudo_inputs.copy_(self.keep("pseudo_inputs", start))

    @property
    def inputs(self) -> Tensor:
        """The pseudo-inputs in the units of the data, shape ``(components, *features)``."""
        return self.pseudo_inputs if self._units is None else self._units.inverse(self.pseudo_inputs)

    def forward(self, context: Tensor | None = None) -> Distribution:
        if not self._encoder:
            raise ModelError("a VampPrior needs the encoder of a VAE; build a VAE with this prior before calling it")
        posteriors = self._posteriors(context)
        weights = torch.zeros(posteriors.batch_shape, dtype=self.pseudo_inputs.dtype, device=self.pseudo_inputs.device)
        return dist.MixtureSameFamily(dist.Categorical(logits=weights), posteriors)

    def _posteriors(self, context: Tensor | None) -> Any:
        """q(z | u) of each pseudo-input; with contexts, of each pseudo-input in each context."""
        inputs: list[Tensor] = [self.inputs]
        if context is not None:
            inputs = [inputs[0].expand(*context.shape[:-1], *inputs[0].shape), context.unsqueeze(-2)]
        try:
            return self._encoder[0](*inputs)
        except PyroVAEError:
            raise
        except Exception as error:  # a user's encoder may raise anything
            shape = " × ".join(map(str, self.pseudo_inputs.shape[1:]))
            raise ModelError(
                f"the encoder cannot take the VampPrior's pseudo-inputs, rows of {shape} numbers"
                f"{'' if context is None else f' and a context of {context.shape[-1]}'} ({in_a_line(error)}); "
                "build the prior from data that the encoder takes"
            ) from error

    def extra_repr(self) -> str:
        return f"components={len(self.pseudo_inputs)}"


class ContextNormal(Prior):
    """A diagonal normal that depends on the context: the prior of a conditional VAE.

    .. math:: p(z | c) = \\mathcal N(z | \\mu(c), \\mathrm{diag}(\\sigma(c)^2))

    Args:
        net: the prior network, from ``(*batch, context)`` to ``(*batch, 2 · latent)``: first μ, then log σ.

    Raises:
        ModelError: when called without a context.

    References:
        | Learning Structured Output Representation (Sohn, Lee & Yan, 2015),
          https://proceedings.neurips.cc/paper/2015/hash/8d55a249e6baa5c06772297520da2051-Abstract.html

    Example:
        >>> _ = torch.manual_seed(0)
        >>> ContextNormal(nn.Linear(3, 2 * 2))(torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, context: Tensor | None = None) -> Distribution:
        if context is None:
            raise ModelError("this prior needs a context; pass context=")
        loc, log_scale = at_least_single(self.net(context)).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class GumbelSoftmax(Prior):
    """Relaxed categories with learned probabilities: the prior of a Gumbel-softmax VAE.

    .. math:: z = (l_k + g_k - l_K - g_K) / \\tau, \\quad k < K, \\qquad g \\sim \\mathrm{Gumbel}

    See :class:`pyro_vae.posteriors.GumbelSoftmax`, the matching posterior.

    Args:
        latent_dim: the number of log-ratios d, K - 1 for each categorical variable.
        categories: the number of categories K, at least 2.
        temperature: the temperature τ, above 0. The posterior may have a different temperature.

    Raises:
        SettingsError: if a setting is out of range, or ``latent_dim`` is not a multiple of K - 1.

    References:
        | The Concrete Distribution (Maddison, Mnih & Teh, 2017), https://arxiv.org/abs/1611.00712

    Example:
        >>> p = GumbelSoftmax(3, categories=4)  # one variable
        >>> p().event_shape, p.discrete()().event_shape
        (torch.Size([3]), torch.Size([4]))
    """

    def __init__(self, latent_dim: int, *, categories: int, temperature: float = 0.5) -> None:
        super().__init__()
        self.categories, self.temperature = whole("categories", categories, 2), above_zero("temperature", temperature)
        variables, rest = divmod(whole("latent_dim", latent_dim, 1), self.categories - 1)
        if rest:
            raise SettingsError(
                f"latent_dim is {latent_dim}; it must be a multiple of {categories - 1}, the number of log-ratios of a "
                f"variable with {categories} categories"
            )
        self.logits = nn.Parameter(torch.zeros(variables, self.categories))

    def forward(self, context: Tensor | None = None) -> Distribution:
        return _GumbelSoftmax(self.logits, self.temperature)

    def discrete(self) -> Prior:
        """Return the prior of one-hot categories that this prior relaxes; it shares the parameters."""
        return _OneHot(self)

    def extra_repr(self) -> str:
        variables, categories = self.logits.shape
        return f"variables={variables}, categories={categories}, temperature={self.temperature:g}"


class _OneHot(Prior):
    """One-hot categories with the probabilities of a relaxed prior."""

    def __init__(self, relaxed: GumbelSoftmax) -> None:
        super().__init__()
        self.relaxed = relaxed

    def forward(self, context: Tensor | None = None) -> Distribution:
        return OneHots(self.relaxed.logits)


class Flow(Prior):
    """A prior from any unconditional normalizing flow of zuko.

    .. math:: p(z) = p_0(f(z)) \\, |\\det \\partial f / \\partial z|

    Args:
        flow: a zuko flow over the latents, without context, such as ``zuko.flows.NSF(8)``.

    Raises:
        ModelError: if ``flow()`` is not a distribution over all real numbers.

    References:
        | Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770
        | zuko (Rozet et al., 2022), https://zuko.readthedocs.io

    Example:
        >>> import zuko
        >>> _ = torch.manual_seed(0)
        >>> Flow(zuko.flows.NICE(4, transforms=2))().event_shape
        torch.Size([4])
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        if not isinstance(flow, nn.Module):
            raise ModelError(f"flow is {type_of(flow)}; pass a zuko flow, such as zuko.flows.NSF(latents)")
        self.flow = flow
        with torch.random.fork_rng(devices=[]):
            drawn("prior", called("prior", self))  # a flow with a context fails only when called

    def forward(self, context: Tensor | None = None) -> Distribution:
        from pyro_vae.core.zuko import as_pyro

        return as_pyro(self.flow(), type(self.flow).__name__)
