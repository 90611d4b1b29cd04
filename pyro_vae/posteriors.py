"""Posteriors, ``x → q(z|x)``."""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.core.categories import GumbelSoftmax as _GumbelSoftmax
from pyro_vae.core.categories import OneHots
from pyro_vae.core.component import Conditional, Distribution, at_least_single, evaluating, join, masked
from pyro_vae.core.distributions import LowRankMultivariateNormal, MultivariateNormal
from pyro_vae.core.standardize import Standardizable, Standardize
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.errors import ModelError, SettingsError, type_of

if TYPE_CHECKING:
    from pyro_vae.core.vae import VAE

Rows = tuple[Tensor, Tensor | None, Tensor | None]
"""x, its context and the mask of its observed values."""


class Posterior(Conditional, Standardizable):
    """Base class of amortized posteriors: modules from ``x`` of shape ``(*batch, *features)`` to ``q(z|x)``.

    A subclass implements ``distribution``, which turns the network's outputs into q, and ``outputs``, their number.

    Args:
        net: the encoder network. Its input is x; with a context, the flattened x followed by the context.

    Example:
        >>> class Unit(Posterior):
        ...     def distribution(self, out):
        ...         return dist.Normal(out, 1.0).to_event(1)
        >>> Unit(nn.Linear(3, 2))(torch.zeros(4, 3)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @abstractmethod
    def distribution(self, out: Tensor) -> Distribution:
        """Return q, of batch shape ``(*batch)``, given the network's outputs of shape ``(*batch, outputs)``."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        return self.distribution(at_least_single(self.encoded(x, context)))

    def encoded(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the network's outputs at x, shape ``(*batch, outputs)``."""
        x = x if self.standardize is None else self.standardize(x)
        return self.net(join(x if context is None else x.flatten(context.dim() - 1), context))


class DiagNormal(Posterior):
    """The diagonal normal posterior, equations (14) and (16) of the note.

    .. math:: q(z | x) = \\mathcal N(z | \\mu_\\phi(x), \\mathrm{diag}(\\sigma_\\phi(x)^2))

    Args:
        net: the encoder network, from ``(*batch, *features)`` to ``(*batch, 2 · latent)``: first μ, then log σ.

    Raises:
        ModelError: when called, if the network has an odd number of outputs.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> _ = torch.manual_seed(0)
        >>> q = DiagNormal(nn.Linear(3, 2 * 2))(torch.zeros(4, 3))
        >>> q.batch_shape, q.event_shape
        (torch.Size([4]), torch.Size([2]))
    """

    @classmethod
    def outputs(cls, size: int) -> int:
        return 2 * size

    def distribution(self, out: Tensor) -> Distribution:
        if out.shape[-1] % 2:
            raise ModelError(f"the encoder network gives {out.shape[-1]} numbers; μ and log σ need an even number")
        loc, log_scale = out.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class FullNormal(Posterior):
    """A normal with a full covariance, parameterized by its Cholesky factor.

    .. math:: q(z | x) = \\mathcal N(z | \\mu, L L^\\top), \\qquad L_{jj} = \\exp \\ell_j

    Its KL divergence from a normal prior has a closed form here (Pyro alone would estimate it by sampling).

    Args:
        net: the encoder network, from ``(*batch, *features)`` to ``(*batch, d (d + 3) / 2)`` for d latents:
            first μ, then ℓ, the logarithm of the diagonal of L, then the rows of L below the diagonal.

    Raises:
        ModelError: when called, if the number of outputs is not d (d + 3) / 2 for any d.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114
        | An Introduction to Variational Autoencoders (Kingma & Welling, 2019), section 2.5.1,
          https://arxiv.org/abs/1906.02691

    Example:
        >>> _ = torch.manual_seed(0)
        >>> q = FullNormal(nn.Linear(3, FullNormal.outputs(2)))(torch.zeros(4, 3))
        >>> q.covariance_matrix.shape
        torch.Size([4, 2, 2])
    """

    @classmethod
    def outputs(cls, size: int) -> int:
        return size * (size + 3) // 2

    def distribution(self, out: Tensor) -> Distribution:
        size = (math.isqrt(9 + 8 * out.shape[-1]) - 3) // 2
        if size < 1 or self.outputs(size) != out.shape[-1]:
            raise ModelError(
                f"the encoder network gives {out.shape[-1]} numbers; "
                f"a full normal of d latents needs d (d + 3) / 2, such as {self.outputs(size)} or "
                f"{self.outputs(size + 1)}"
            )
        loc, log_diagonal, below = out.split([size, size, size * (size - 1) // 2], -1)
        return MultivariateNormal(loc, log_diagonal, below)


class LowRankNormal(Posterior):
    """A normal whose covariance is diagonal plus low rank: correlations at a cost linear in the latents.

    .. math:: q(z | x) = \\mathcal N(z | \\mu, W W^\\top + \\mathrm{diag}(\\sigma^2)), \\qquad W \\in R^{d \\times r}

    Its KL divergence from a normal prior has a closed form here (Pyro alone would estimate it by sampling).

    Args:
        net: the encoder network, from ``(*batch, *features)`` to ``(*batch, d (2 + rank))`` for d latents:
            first μ, then log σ, then the rows of W.
        rank: the rank r, at least 1. ``outputs(size, rank=rank)`` is the number of outputs that the network needs.

    Raises:
        SettingsError: if ``rank`` is below 1.
        ModelError: when called, if the number of outputs is not a multiple of ``2 + rank``.

    References:
        | Stochastic Backpropagation (Rezende, Mohamed & Wierstra, 2014), section 4.3, https://arxiv.org/abs/1401.4082
        | Gaussian Variational Approximation with a Factor Covariance Structure (Ong, Nott & Smith, 2018),
          https://arxiv.org/abs/1701.03208

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Linear(3, LowRankNormal.outputs(5, rank=2))
        >>> LowRankNormal(net, 2)(torch.zeros(4, 3)).cov_factor.shape
        torch.Size([4, 5, 2])
    """

    def __init__(self, net: nn.Module, rank: int = 1) -> None:
        super().__init__(net)
        self.rank = whole("rank", rank, 1)

    @classmethod
    def outputs(cls, size: int, *, rank: int = 1) -> int:
        return size * (2 + rank)

    def distribution(self, out: Tensor) -> Distribution:
        size, rest = divmod(out.shape[-1], 2 + self.rank)
        if rest or size < 1:
            raise ModelError(
                f"the encoder network gives {out.shape[-1]} numbers; "
                f"a normal of rank {self.rank} needs {2 + self.rank} per latent"
            )
        loc, log_scale, factor = out.split([size, size, size * self.rank], -1)
        return LowRankMultivariateNormal(loc, factor.unflatten(-1, (size, self.rank)), log_scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


class GumbelSoftmax(Posterior):
    """Relaxed categories with reparameterized draws; the latents are log-ratios to the last category.

    .. math:: z_k = (l_k(x) + g_k - l_K(x) - g_K) / \\tau, \\quad k < K, \\qquad g \\sim \\mathrm{Gumbel}

    Wrap the decoder's network in :class:`pyro_vae.nn.OnSimplex`: it then takes the shares
    ``softmax(z_1, …, z_{K-1}, 0)``, which are nearly one-hot at a low temperature.

    Such a VAE has two bounds. With :class:`pyro_vae.priors.GumbelSoftmax` as its prior, its ELBO is the **relaxed
    bound**: a bound on log p(x) of the model with relaxed latents. The relaxed bound neither equals nor bounds log p(x)
    of the model with categories. :func:`pyro_vae.evidence.discrete` returns the VAE with categories and the same
    parameters; its ELBO is the **discrete bound**, which bounds the evidence of the discrete model.

    The gradient of the relaxed bound is a biased estimate of the gradient of the discrete bound **at every τ**. As
    τ → 0 the evidence of the relaxed model tends to the evidence of the discrete model, but the KL divergence between
    two relaxed distributions does not tend to the KL divergence between their categories. It is larger, since
    log-ratios also encode by how much a category won. Judge a model trained on the relaxed bound by its discrete bound.
    (Jang et al. use the KL divergence between the categories instead. Their objective is not a bound at τ > 0, but
    tends to the discrete bound as τ → 0.)

    Args:
        net: the encoder network, from ``(*batch, *features)`` to ``(*batch, K · variables)``: the logits l of the
            first variable, then the logits of the second, ….
        categories: the number of categories K, at least 2.
        temperature: the temperature τ, above 0.

    Raises:
        SettingsError: if a setting is out of range.
        ModelError: when called, if the number of outputs is not a multiple of K.

    References:
        | The Concrete Distribution (Maddison, Mnih & Teh, 2017), https://arxiv.org/abs/1611.00712
        | Categorical Reparameterization with Gumbel-Softmax (Jang, Gu & Poole, 2017), https://arxiv.org/abs/1611.01144

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     prior=pv.priors.GumbelSoftmax(2 * 3, categories=4),  # two variables of four categories
        ...     decoder=pv.likelihoods.Bernoulli(pv.nn.OnSimplex(nn.Linear(2 * 4, 5), 2 * 3, 4)),
        ...     encoder=GumbelSoftmax(nn.Linear(5, 2 * 4), 4),
        ... )
        >>> vae.encoder(torch.zeros(3, 5)).event_shape
        torch.Size([6])
        >>> pv.evidence.discrete(vae).encoder(torch.zeros(3, 5)).event_shape  # one-hot
        torch.Size([8])
    """

    def __init__(self, net: nn.Module, categories: int, *, temperature: float = 0.5) -> None:
        super().__init__(net)
        self.categories, self.temperature = whole("categories", categories, 2), above_zero("temperature", temperature)

    @classmethod
    def outputs(cls, size: int, *, categories: int | None = None) -> int:
        if categories is None:
            raise SettingsError("the outputs of GumbelSoftmax depend on the number of categories; pass categories=")
        return size // (whole("categories", categories, 2) - 1) * categories

    def logits(self, out: Tensor) -> Tensor:
        """Return the network's outputs as logits, shape ``(*batch, variables, K)``."""
        if out.shape[-1] == 0 or out.shape[-1] % self.categories:
            raise ModelError(
                f"the encoder network gives {out.shape[-1]} numbers; it must give a multiple of {self.categories}, "
                "the number of categories"
            )
        return out.unflatten(-1, (-1, self.categories))

    def distribution(self, out: Tensor) -> Distribution:
        return _GumbelSoftmax(self.logits(out), self.temperature)

    def discrete(self) -> Posterior:
        """Return the posterior of one-hot categories that this posterior relaxes; it shares the parameters."""
        return _OneHot(self)

    def extra_repr(self) -> str:
        return f"categories={self.categories}, temperature={self.temperature:g}"


class _OneHot(Posterior):
    """One-hot categories with the probabilities of a relaxed posterior."""

    def __init__(self, net: GumbelSoftmax) -> None:
        super().__init__(net)

    def encoded(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net.encoded(x, context)  # type: ignore[operator]

    def distribution(self, out: Tensor) -> Distribution:
        return OneHots(self.net.logits(out))  # type: ignore[operator]

    def standardize_by(self, standardize: Standardize) -> None:
        """Standardize the inputs of the shared relaxed encoder."""
        self.net.standardize_by(standardize)  # type: ignore[operator]

    @property
    def center(self) -> Tensor | None:
        return self.net.center  # type: ignore[return-value]


class Flow(Posterior):
    """A posterior from any conditional normalizing flow of zuko.

    .. math:: q(z | x) = p_0(f(z; c)) \\, |\\det \\partial f(z; c) / \\partial z|, \\qquad c = \\mathrm{net}(x)

    A flow has no mean in closed form: ``.mean`` is the mean of a fixed number of draws, for figures. Each training
    step samples the flow, so choose a flow that samples fast (a coupling or inverse autoregressive flow).

    Args:
        flow: a zuko flow over d latents, such as ``zuko.flows.NICE(d, context=c)``; ``pip install pyro-vae[flows]``.
        net: the encoder network, from ``(*batch, *features)`` to the flow's c context numbers; by default the
            identity.

    Raises:
        ModelError: if ``flow`` is not a module, or when called, if it returns no distribution over all real numbers.

    References:
        | Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770
        | Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
          https://arxiv.org/abs/1606.04934
        | zuko (Rozet et al., 2022), https://zuko.readthedocs.io

    Example:
        >>> import zuko
        >>> _ = torch.manual_seed(0)
        >>> q = Flow(zuko.flows.NICE(2, context=8, transforms=2), net=nn.Linear(3, 8))(torch.zeros(4, 3))
        >>> q.batch_shape, q.event_shape
        (torch.Size([4]), torch.Size([2]))
    """

    def __init__(self, flow: nn.Module, *, net: nn.Module | None = None) -> None:
        super().__init__(nn.Identity() if net is None else net)
        if not isinstance(flow, nn.Module):
            raise ModelError(
                f"flow is {type_of(flow)}; pass a zuko flow (pip install pyro-vae[flows]), "
                "such as zuko.flows.NICE(latents, context=features)"
            )
        self.flow = flow

    def distribution(self, out: Tensor) -> Distribution:
        from pyro_vae.core.zuko import as_pyro

        return as_pyro(self.flow(out), type(self.flow).__name__)


class Refined(Posterior):
    """A semi-amortized diagonal normal: the encoder's output, refined for each datum by a few gradient steps.

    .. math::
        \\mu \\leftarrow \\mu + \\eta \\frac{\\sigma^2}{h} \\partial_\\mu \\hat{\\mathcal L}_i, \\quad
        \\log \\sigma \\leftarrow \\log \\sigma - \\tfrac\\eta2 \\log h, \\quad
        h = 1 - \\partial_{\\log \\sigma} \\hat{\\mathcal L}_i, \\quad
        \\hat{\\mathcal L}_i = \\sum_j \\log \\sigma_j
        + \\frac1K \\sum_k \\log p(x_i, \\mu + \\sigma \\odot \\epsilon_k)

    Here h estimates σ² times the curvature of -log p(x, z), so each step is a Newton step in each latent separately
    and the rate η has no unit (Kim et al. take plain gradient steps). The noise ε is drawn once and is the same for
    all data and calls, so q is a function of x. It consists of pairs ±ε of length √d. Its covariance is exactly I if
    K ≥ 2d, for d latents; with fewer particles, the directions of the pairs are orthogonal.

    A step that would lower the estimate of a datum is rejected and the rate of this datum is halved, so the estimate
    never decreases. The steps use the prior and the decoder of the VAE that the encoder belongs to, in evaluation mode;
    they are not submodules. The correction is treated as a constant that is added to the encoder's output (a
    straight-through gradient): φ learns from the gradient of the bound at the refined posterior. Missing
    values do not enter the estimate.

    Args:
        encoder: a :class:`DiagNormal`, or the network for one.
        steps: gradient steps per call, at least 1; each runs the decoder on ``particles`` latents per datum.
        rate: the rate η, above 0; 1 is a full Newton step, exact if the posterior's latents are independent normals.
        particles: the number of noise vectors K, even, at least 2.

    Raises:
        SettingsError: if a setting is out of range.
        ModelError: when called before the encoder belongs to a VAE, or if the VAE's prior calls its encoder.

    References:
        | Semi-Amortized Variational Autoencoders (Kim et al., 2018), https://arxiv.org/abs/1802.02550
        | Variational Adaptive-Newton Method for Explorative Learning (Khan et al., 2017),
          https://arxiv.org/abs/1711.05560

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> x, vae = linear.sample(3), linear.as_vae(diagonal=True)
        >>> amortized = DiagNormal(nn.Linear(5, 4))
        >>> vae.encoder = Refined(amortized, steps=20)
        >>> bool((linear.elbo(x, vae.encoder(x)) > linear.elbo(x, amortized(x))).all())
        True
    """

    takes_mask = True

    def __init__(self, encoder: nn.Module, *, steps: int = 5, rate: float = 0.5, particles: int = 8) -> None:
        super().__init__(encoder if isinstance(encoder, DiagNormal) else DiagNormal(encoder))
        self.steps, self.particles = whole("steps", steps, 1), whole("particles", particles, 2)
        self.rate = above_zero("rate", rate)
        if particles % 2:
            raise SettingsError(f"particles is {particles}; it must be even, since the noise comes in pairs ±ε")
        self._model: tuple[nn.Module, ...] = ()
        self._noise = torch.empty(0)
        self._busy = False

    @classmethod
    def outputs(cls, size: int) -> int:
        return DiagNormal.outputs(size)

    def bind(self, vae: "VAE") -> None:
        """Use the VAE's prior and decoder.

        The tuple keeps them from becoming submodules, and is copied with the posterior.
        """
        self._model = (vae.model,)

    def distribution(self, out: Tensor) -> Distribution:
        return self.net.distribution(out)  # type: ignore[operator]

    def standardize_by(self, standardize: Standardize) -> None:
        """Standardize the inputs of the encoder that is refined."""
        self.net.standardize_by(standardize)  # type: ignore[operator]

    @property
    def center(self) -> Tensor | None:
        return self.net.center  # type: ignore[return-value]

    @property
    def amortized(self) -> nn.Module:
        """The encoder that is refined; a VampPrior is a mixture of its posteriors."""
        return self.net

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Distribution:
        if not self._model:
            raise ModelError("a Refined posterior needs the decoder of a VAE; build a VAE with it before calling it")
        if self._busy:
            raise ModelError(
                "the prior calls the encoder, and this encoder calls the prior to refine its output; "
                "use another prior, or an encoder that is not refined"
            )
        start = self.net(x, context).base_dist
        loc, log_scale = start.loc, start.scale.log()
        self._busy = True
        try:
            # The decoder may not be finite at a trial step; such a step is rejected below, so it is not an error.
            with evaluating(self._model[0]), pyro.validation_enabled(False):
                loc_step, log_scale_step = self._corrections((x, context, mask), loc.detach(), log_scale.detach())
        finally:
            self._busy = False
        return dist.Normal(loc + loc_step, (log_scale + log_scale_step).exp()).to_event(1)

    def _corrections(self, rows: Rows, *start: Tensor) -> list[Tensor]:
        """The sum of all steps in (μ, log σ), without a graph."""
        point, rate = start, torch.full_like(start[0][..., :1], self.rate)
        value, slope = self._estimate(rows, *point)
        for _ in range(self.steps):
            curvature = (1 - slope[1]).clamp(min=0.1)  # times σ²; the clamp bounds the steps
            newton = slope[0] * (2 * point[1]).exp() / curvature, -0.5 * curvature.log()
            moved = [old + rate * step for old, step in zip(point, newton, strict=True)]
            moved = [torch.where(new.isfinite(), new, old) for new, old in zip(moved, point, strict=True)]
            new_value, new_slope = self._estimate(rows, *moved)
            better = (new_value > value).unsqueeze(-1)
            point = tuple(torch.where(better, new, old) for new, old in zip(moved, point, strict=True))
            slope = tuple(torch.where(better, new, old) for new, old in zip(new_slope, slope, strict=True))
            value = torch.where(better.squeeze(-1), new_value, value)
            rate = torch.where(better, rate, rate / 2)
        return [end - begin for end, begin in zip(point, start, strict=True)]

    @torch.enable_grad()
    def _estimate(self, rows: Rows, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Estimate the ELBO of each datum, up to a constant, and its gradient with respect to (μ, log σ)."""
        model, (x, context, mask) = self._model[0], rows
        context_args = () if context is None else (context,)
        loc, log_scale = loc.requires_grad_(), log_scale.requires_grad_()
        z = loc + log_scale.exp() * self._draws(loc)
        likelihood = model.decoder(z, *context_args)  # type: ignore[operator]
        likelihood = likelihood if mask is None else masked(likelihood, mask)
        log_joint = likelihood.log_prob(x) + model.prior(*context_args).log_prob(z)  # type: ignore[operator]
        value = log_joint.mean(0) + log_scale.sum(-1)
        slope = torch.autograd.grad(value.sum(), (loc, log_scale))
        return value.detach(), slope

    def _draws(self, loc: Tensor) -> Tensor:
        """The noise, shape ``(particles, 1, …, 1, latent)``, cached until the shape, dtype or device changes."""
        size, noise = loc.shape[-1], self._noise
        if noise.shape != (self.particles, size) or noise.dtype != loc.dtype or noise.device != loc.device:
            self._noise = noise = _orthogonal_pairs(self.particles, size).to(loc)
        return noise.view(self.particles, *[1] * (loc.dim() - 1), size)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, rate={self.rate:g}, particles={self.particles}"


def _orthogonal_pairs(number: int, size: int) -> Tensor:
    """Pairs ±ε of length √size: in orthogonal directions, or with covariance I if ``number`` is at least ``2 size``."""
    generator, half = torch.Generator().manual_seed(0), number // 2
    q = torch.linalg.qr(torch.randn(max(half, size), min(half, size), generator=generator, dtype=torch.float64)).Q
    directions = _equalize_lengths(math.sqrt(half) * q) if half >= size else math.sqrt(size) * q.T
    return torch.cat([directions, -directions])


def _equalize_lengths(rows: Tensor) -> Tensor:
    """Give all rows the same length without changing ``rowsᵀ rows``, by plane rotations of two rows.

    Each rotation of the longest and the shortest row gives one row the root-mean-square length, so n - 1 rotations
    are enough for n rows.
    """
    rows, mean = rows.clone(), rows.square().sum(-1).mean()
    for _ in range(len(rows) - 1):
        square = rows.square().sum(-1) - mean
        i, j = int(square.argmax()), int(square.argmin())
        if square[i] <= 1e-14 * mean or square[j] >= 0:
            break
        product = rows[i] @ rows[j]
        tangent = (-product - (product**2 - square[i] * square[j]).sqrt()) / square[j]
        cosine = (1 + tangent**2).rsqrt()
        rows[[i, j]] = torch.stack([rows[i] + tangent * rows[j], rows[j] - tangent * rows[i]]) * cosine
    return rows
