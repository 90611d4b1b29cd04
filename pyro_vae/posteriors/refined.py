"""A posterior refined for each datum by gradient steps."""

import math
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.core.component import Distribution, evaluating, masked
from pyro_vae.core.standardize import Standardize
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.posteriors.base import Posterior
from pyro_vae.posteriors.normal import DiagNormal

if TYPE_CHECKING:
    from pyro_vae.core.vae import VAE

Rows = tuple[Tensor, Tensor | None, Tensor | None]
"""x, its context and the mask of its observed values."""


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
