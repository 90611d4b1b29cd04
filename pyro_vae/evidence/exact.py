"""Oracles: the linear-Gaussian model, with everything in closed form, and quadrature for up to two latents."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.core.component import Distribution, evaluating
from pyro_vae.core.threads import threads_for_evaluations
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings
from pyro_vae.data import as_tensor
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.likelihoods import Normal
from pyro_vae.posteriors import DiagNormal, Posterior
from pyro_vae.priors import StandardNormal


class LinearGaussian:
    """Probabilistic PCA: a VAE with evidence, posterior and ELBO in closed form.

    .. math:: z \\sim \\mathcal N(0, I), \\qquad x | z \\sim \\mathcal N(W z + b, s^2 I)

    All quantities are differentiable, so a bound can be maximized without sampling.

    Args:
        weight: the matrix W, shape ``(feature, latent)``.
        bias: the vector b, shape ``(feature,)``.
        scale: the standard deviation s in units of x, above 0.

    Raises:
        SettingsError: if the shapes disagree or ``scale`` is not above 0.

    References:
        | Probabilistic Principal Component Analysis (Tipping & Bishop, 1999), https://doi.org/10.1111/1467-9868.00196

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = LinearGaussian(torch.randn(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x = model.sample(3)
        >>> gap = model.log_marginal(x) - model.elbo(x, model.posterior(x))
        >>> bool((gap.abs() < 1e-12).all()), bool((model.elbo(x, model.best_diagonal(x)) < model.log_marginal(x)).all())
        (True, True)
    """

    def __init__(self, weight: Tensor, bias: Tensor, scale: float | Tensor) -> None:
        if weight.dim() != 2 or bias.shape != weight.shape[:1]:
            raise SettingsError(
                f"weight has shape {tuple(weight.shape)} and bias {tuple(bias.shape)}; "
                "the shapes must be (feature, latent) and (feature,)"
            )
        self.weight, self.bias = weight, bias
        self.scale = torch.as_tensor(scale, dtype=weight.dtype, device=weight.device)
        if not (self.scale.dim() == 0 and self.scale > 0):
            raise SettingsError(f"scale is {scale}; it must be one number above 0")

    def __repr__(self) -> str:
        features, latents = self.weight.shape
        return f"LinearGaussian(features={features}, latents={latents}, scale={self.scale.item():.4g})"

    @property
    def precision(self) -> Tensor:
        """The posterior precision ``A = I + WᵀW / s²``, the same for every x; shape ``(latent, latent)``."""
        return torch.eye(self.weight.shape[1]).to(self.weight) + self.weight.T @ self.weight / self.scale**2

    def _posterior_map(self) -> Tensor:
        """The matrix from ``x - b`` to the posterior mean: ``A⁻¹ Wᵀ / s²``."""
        return torch.linalg.solve(self.precision, self.weight.T / self.scale**2)

    def _posterior_mean(self, x: Tensor) -> Tensor:
        return (x.to(self.weight) - self.bias) @ self._posterior_map().T

    def log_marginal(self, x: Tensor) -> Tensor:
        """Return the evidence ``log N(x | b, W Wᵀ + s² I)`` in nats, shape ``(datum,)``."""
        noise = self.scale.square().expand(len(self.bias))
        return dist.LowRankMultivariateNormal(self.bias, self.weight, noise).log_prob(x.to(self.weight))

    def posterior(self, x: Tensor) -> Distribution:
        """Return the posterior ``p(z | x) = N(A⁻¹ Wᵀ (x - b) / s², A⁻¹)``, batch shape ``(datum,)``."""
        return dist.MultivariateNormal(self._posterior_mean(x), precision_matrix=self.precision)

    def best_diagonal(self, x: Tensor) -> Distribution:
        """Return the diagonal normal with the largest ELBO: the posterior mean, and variances ``1 / A_jj``.

        Its ELBO is ``½ (Σ_j log A_jj - log det A)`` nats below the evidence, for every x.
        """
        scale = self.precision.diagonal().rsqrt()
        return dist.Normal(self._posterior_mean(x), scale).to_event(1)

    def elbo(self, x: Tensor, q: Distribution) -> Tensor:
        """Compute the ELBO of ``q`` in closed form.

        Args:
            x: data, shape ``(datum, feature)``.
            q: a normal, diagonal or full, of batch shape ``(datum,)`` and event shape ``(latent,)``.

        Returns:
            ``E_q log p(x|z) + E_q log p(z) + H[q]`` in nats, shape ``(datum,)``.

        Raises:
            ModelError: if ``q`` is not normal, or its batch shape is not ``(datum,)``.
        """
        covariance = _covariance(q)
        if q.batch_shape != x.shape[:1]:
            raise ModelError(f"q has batch shape {tuple(q.batch_shape)} for {len(x)} data; pass one q per datum")
        square = ((x.to(self.weight) - self.bias - q.mean @ self.weight.T) ** 2).sum(-1)
        spread = ((self.weight @ covariance) * self.weight).sum((-2, -1))
        features, latents = self.weight.shape
        log_likelihood = -0.5 * features * torch.log(2 * math.pi * self.scale**2)
        log_likelihood = log_likelihood - (square + spread) / (2 * self.scale**2)
        second_moment = (q.mean**2).sum(-1) + covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        return log_likelihood - 0.5 * (latents * math.log(2 * math.pi) + second_moment) + q.entropy()

    @classmethod
    def fit(cls, x: Tensor, latent_dim: int) -> "LinearGaussian":
        """Fit the maximum-likelihood model: probabilistic PCA, with W along the principal axes.

        Args:
            x: data, shape ``(datum, feature)``.
            latent_dim: the number of latents, from 1 to the number of features minus 1.

        Returns:
            The model; ``s²`` is the mean of the smaller eigenvalues of the covariance (with 1/n).

        Raises:
            SettingsError: if ``latent_dim`` is out of range.
            DataError: if the data are not rows of finite numbers, or the residual variance is 0.
        """
        x = as_tensor(x).flatten(1)
        if not 1 <= latent_dim < x.shape[1]:
            raise SettingsError(
                f"latent_dim is {latent_dim}; it must be from 1 to {x.shape[1] - 1} for {x.shape[1]} features"
            )
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        noise = values[latent_dim:].mean()
        if noise <= 0:
            raise DataError(
                f"{latent_dim} latents explain the data completely, so s would be 0; use fewer latents or more data"
            )
        return cls(vectors[:, :latent_dim] * (values[:latent_dim] - noise).clamp(min=0).sqrt(), mean, noise.sqrt())

    @classmethod
    def of(cls, vae: VAE) -> "LinearGaussian":
        """Return the oracle of a linear-Gaussian VAE.

        Args:
            vae: a VAE with prior N(0, I), a linear decoder network and an isotropic normal likelihood; its encoder is
                not used.

        Raises:
            ModelError: if the prior or the decoder is of another type.
        """
        net = vae.decoder.net if isinstance(vae.decoder, Normal) and vae.decoder.standardize is None else None
        layer = net[0] if isinstance(net, nn.Sequential) and len(net) == 1 else net
        if not (isinstance(vae.prior, StandardNormal) and isinstance(layer, nn.Linear)):
            raise ModelError(
                "the oracle needs a StandardNormal prior and a Normal likelihood with one linear layer "
                "that does not standardize"
            )
        return cls(layer.weight, layer.bias, vae.decoder.scale)  # type: ignore[arg-type]

    @torch.no_grad()
    def as_vae(self, *, diagonal: bool = False) -> VAE:
        """Build a VAE of this model whose guide is the exact posterior or the best diagonal normal.

        Args:
            diagonal: whether the guide is :meth:`best_diagonal` (a ``DiagNormal``) instead of the exact posterior.

        Returns:
            A trainable VAE with the dtype of ``weight``.
        """
        latents = self.weight.shape[1]
        decoder = Normal(_linear(self.weight, self.bias), scale=float(self.scale)).to(self.weight)
        to_mean = self._posterior_map()
        offset = -to_mean @ self.bias
        encoder: Posterior
        if diagonal:
            log_scale = -0.5 * self.precision.diagonal().log()
            net = _linear(torch.cat([to_mean, torch.zeros_like(to_mean)]), torch.cat([offset, log_scale]))
            encoder = DiagNormal(net)
        else:
            encoder = _SharedCovariance(_linear(to_mean, offset), _inverse_factor(self.precision))
        return VAE(prior=StandardNormal(latents).to(self.weight), decoder=decoder, encoder=encoder)

    @takes_settings
    def sample(self, n: int) -> Tensor:
        """Draw ``n`` data from the model, shape ``(n, feature)``, with torch's global generator."""
        features, latents = self.weight.shape
        z, noise = self.weight.new_empty(n, latents).normal_(), self.weight.new_empty(n, features).normal_()
        return z @ self.weight.T + self.bias + self.scale * noise


class _SharedCovariance(Posterior):
    """A normal with a linear mean and a covariance that does not depend on x: the family of the exact posterior."""

    def __init__(self, net: nn.Module, scale_tril: Tensor) -> None:
        super().__init__(net)
        self.scale_tril = nn.Parameter(scale_tril.contiguous())

    def distribution(self, out: Tensor) -> Distribution:
        return dist.MultivariateNormal(out, scale_tril=self.scale_tril.tril())


def _inverse_factor(precision: Tensor) -> Tensor:
    """The lower Cholesky factor of the inverse of ``precision``."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _covariance(q: Any) -> Tensor:
    if hasattr(q, "covariance_matrix"):
        return q.covariance_matrix
    if isinstance(getattr(q, "base_dist", None), torch.distributions.Normal) and q.event_dim == 1:
        return torch.diag_embed(q.variance)
    raise ModelError(f"the closed-form ELBO needs a normal q with one event dimension, but q is {q}")


@torch.no_grad()
@takes_settings
def quadrature_log_marginal(
    vae: VAE,
    x: Tensor,
    *,
    points: int = 161,
    limit: float = 6.0,
    tolerance: float = 1e-3,
    chunk_elements: int = 2**22,
) -> Tensor:
    """Compute log p(x) of a VAE with one or two latents by quadrature on a grid.

    .. math:: \\log p(x) = \\log \\sum_g h^d\\, p(z_g)\\, p(x | z_g)

    The result is checked against the sum over every second point: for smooth densities, the error of the fine grid is
    far smaller than the difference between the two.

    Args:
        vae: a VAE with d ≤ 2 latents; its encoder is not used.
        x: data, shape ``(datum, *features)``.
        points: grid points per latent, odd and at least 3.
        limit: the grid spans ``[-limit, limit]`` in each latent, in units of z.
        tolerance: the largest difference between the fine and the coarse sum, in nats.
        chunk_elements: the number of decoded numbers to hold at a time.

    Returns:
        log p(x) in nats, shape ``(datum,)``.

    Raises:
        ModelError: if there are more than two latents.
        SettingsError: if ``points`` or ``limit`` is out of range, or the grid is too coarse or too small for
            ``tolerance``.

    References:
        | The Exponentially Convergent Trapezoidal Rule (Trefethen & Weideman, 2014),
          https://doi.org/10.1137/130932132

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = LinearGaussian(torch.randn(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x = model.sample(3)
        >>> bool((quadrature_log_marginal(model.as_vae(), x) - model.log_marginal(x)).abs().max() < 1e-9)
        True
    """
    with evaluating(vae):
        return _quadrature(vae, x, points, limit, tolerance, chunk_elements)


def _quadrature(vae: VAE, x: Tensor, points: int, limit: float, tolerance: float, chunk_elements: int) -> Tensor:
    latents = vae.prior().event_shape.numel()
    if latents > 2:
        raise ModelError(f"quadrature needs 1 or 2 latents, but this VAE has {latents}")
    if points < 3 or points % 2 == 0 or not limit > 0:
        raise SettingsError(
            f"points is {points} and limit {limit}; points must be odd and at least 3, and limit above 0"
        )
    x = vae.like(as_tensor(x))
    axis = torch.linspace(-limit, limit, points, dtype=x.dtype, device=x.device)
    grid = torch.cartesian_prod(*[axis] * latents).reshape(-1, latents)
    even = torch.arange(points, device=x.device) % 2 == 0
    coarse = torch.cartesian_prod(*[even] * latents).reshape(-1, latents).all(1)
    edge = (grid.abs() >= limit * (1 - 1e-9)).any(1)
    step = math.log(2 * limit / (points - 1))
    rows = max(1, chunk_elements // x.numel())
    fine_sum, coarse_sum, edge_sum = torch.full((3, len(x)), -math.inf, dtype=torch.float64, device=x.device)
    with threads_for_evaluations(vae.decoder.parameters(), min(rows, len(grid))):
        for z, on_coarse, on_edge in zip(grid.split(rows), coarse.split(rows), edge.split(rows), strict=True):
            joint = (vae.prior().log_prob(z).unsqueeze(1) + vae.decoder(z.unsqueeze(1)).log_prob(x)).double()
            fine_sum = torch.logaddexp(fine_sum, joint.logsumexp(0))
            coarse_sum = torch.logaddexp(coarse_sum, joint[on_coarse].logsumexp(0))
            edge_sum = torch.logaddexp(edge_sum, joint[on_edge].logsumexp(0))
    # The density at the edge bounds the mass beyond it, if the density falls at least as fast as exp(-|z|).
    beyond = (edge_sum - fine_sum - step).exp().max().item()
    if not beyond <= tolerance:
        raise SettingsError(
            f"the grid from {-limit:g} to {limit:g} is too small: about {beyond:.2g} of p(x) lies outside; "
            f"increase limit (or tolerance, now {tolerance:g})"
        )
    fine, rough = fine_sum + latents * step, coarse_sum + latents * (step + math.log(2))
    worst = (fine - rough).abs().max().item()
    if not worst <= tolerance:
        raise SettingsError(
            f"a grid of {points} points per latent is too coarse: with half the points, log p(x) changes by "
            f"{worst:.2g} nats; increase points (or tolerance, now {tolerance:g})"
        )
    return fine.to(x.dtype)
