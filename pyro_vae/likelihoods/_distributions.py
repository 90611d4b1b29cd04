"""Distributions of one feature that Pyro lacks or computes with too few digits."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn import functional as F

from pyro_vae.core.compatibility import support_of
from pyro_vae.core.distributions import Normal, StudentT, unexpanded

EMPTY = torch.Size()

# log(sinh(h) / h) = Σ cₙ h²ⁿ; for |h| < ½ the first omitted term is below 1e-15.
SERIES = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250, 2 / 127702575, -3617 / 2605132530000)


class ContinuousBernoulli(dist.ContinuousBernoulli):
    """Torch's distribution, given logits η, but exact to rounding near η = 0.

    .. math:: p(x) = \\exp(\\eta x - A(\\eta)), \\qquad A(\\eta) = \\log((e^\\eta - 1) / \\eta)
    """

    def _halves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether h = η/2 is small, h where it is small (else 0), and h where it is not (else 1).

        The replacements keep NaN out of the gradient of the unused branch.
        """
        half = self.logits / 2
        small = half.abs() < 0.5
        return small, half.where(small, torch.zeros_like(half)), half.where(~small, torch.ones_like(half))

    def _log_partition(self) -> Tensor:
        small, near, far = self._halves()
        size = 2 * far.abs()
        direct = 2 * far.clamp(min=0) + torch.log(-torch.expm1(-size)) - size.log()
        return torch.where(small, near + _log_sinhc(near), direct)

    def _cont_bern_log_norm(self) -> Tensor:
        return F.softplus(self.logits) - self._log_partition()

    @property
    def mean(self) -> Tensor:
        small, near, far = self._halves()
        series = torch.zeros_like(near)
        for n, coefficient in reversed(list(enumerate(SERIES, 1))):
            series = series * near**2 + 2 * n * coefficient
        return 0.5 + 0.5 * torch.where(small, series * near, 1 / far.tanh() - 1 / far)

    @property
    def variance(self) -> Tensor:
        small, near, far = self._halves()
        series = torch.zeros_like(near)
        for n, coefficient in reversed(list(enumerate(SERIES, 1))):
            series = series * near**2 + 2 * n * (2 * n - 1) * coefficient
        # csch² h from e^-2|h|, which does not overflow.
        decay = torch.exp(-2 * far.abs())
        return 0.25 * torch.where(small, series, far**-2 - 4 * decay / (1 - decay) ** 2)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        small, near, far = self._halves()
        size, distance = 2 * far.abs(), torch.where(far > 0, 1 - value, value)  # distance from the mode
        direct = size.log() - torch.log(-torch.expm1(-size)) - size * distance
        return torch.where(small, 2 * near * (value - 0.5) - _log_sinhc(near), direct)

    def _reflect(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether η > 0, then -|η|, and the value, reflected to 1 - value where η > 0.

        The reflection is exact: 1 - x has the same distribution with logit -η.
        """
        logits, value = torch.broadcast_tensors(self.logits, value)
        up = logits > 0
        return up, -logits.abs(), torch.where(up, 1 - value, value)

    def cdf(self, value: Tensor) -> Tensor:
        up, eta, value = self._reflect(value.clamp(0, 1))
        flat = eta > -1e-30
        safe = eta.where(~flat, -torch.ones_like(eta))
        below = torch.where(flat, value, torch.expm1(safe * value) / torch.expm1(safe))
        return torch.where(up, 1 - below, below)

    def icdf(self, value: Tensor) -> Tensor:
        up, eta, u = self._reflect(value)
        flat = eta > -1e-2
        safe = eta.where(~flat, -torch.ones_like(eta))
        series = u + eta / 2 * u * (1 - u) * (1 + eta / 3 * (1 - 2 * u))
        x = torch.where(flat, series, torch.log1p(u * torch.expm1(safe)) / safe).clamp(0, 1)
        return torch.where(up, 1 - x, x)


def _log_sinhc(h: Tensor) -> Tensor:
    """log(sinh(h) / h) for small h."""
    square, series = h**2, torch.zeros_like(h)
    for coefficient in reversed(SERIES):
        series = (series + coefficient) * square
    return series


class Bernoulli(dist.Bernoulli):
    """Pyro's Bernoulli distribution, for values 0 and 1 only, with an exact gradient where a bit is nearly certain."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return F.softplus((2 * value - 1) * self.logits, beta=-1)  # log σ(±η) in one pass


class Levels(dist.TorchDistribution):
    """One of L levels 0, …, L - 1, as a float, given logits of shape ``(*batch, L)``."""

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012  (torch's own name and kind)
    has_enumerate_support = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Levels":
        new = Levels(self.logits.expand(*batch_shape, -1), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(-1)

    @property
    def indices(self) -> Tensor:
        """0, …, L - 1."""
        return torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)

    @property
    def mean(self) -> Tensor:
        return (self.probs * self.indices).sum(-1)

    @property
    def variance(self) -> Tensor:
        return (self.probs * (self.indices - self.mean.unsqueeze(-1)) ** 2).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        index = value.long().unsqueeze(-1)
        shape = torch.broadcast_shapes(index.shape[:-1], self.batch_shape)
        logits, index = self.logits.expand(*shape, -1), index.expand(*shape, 1)
        # From the odds of the other levels: where the level is nearly certain, 1 - p has no significant digits.
        others = logits - logits.gather(-1, index)
        is_index = torch.arange(others.shape[-1], device=others.device) == index
        return -F.softplus(others.masked_fill(is_index, -torch.inf).logsumexp(-1))

    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        with torch.no_grad():
            return dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape)).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return _enumerate_values(self.indices, self.batch_shape, expand)


class LogisticLevels(dist.TorchDistribution):
    """One of L values 0, 1/(L-1), …, 1: a rounded mixture of K logistic distributions on [-1, 1].

    The parameters have shape ``(*batch, K)``.
    """

    arg_constraints = {  # noqa: RUF012  (torch's own name and kind)
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "log_scale": constraints.real_vector,
    }
    has_enumerate_support = True

    def __init__(
        self, logits: Tensor, loc: Tensor, log_scale: Tensor, levels: int, validate_args: bool | None = None
    ) -> None:
        self.logits, self.loc, self.log_scale, self.levels = logits, loc, log_scale, levels
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogisticLevels":
        logits, loc, log_scale = (t.expand(*batch_shape, -1) for t in (self.logits, self.loc, self.log_scale))
        new = LogisticLevels(logits, loc, log_scale, self.levels, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return grid(self.levels)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        last = self.levels - 1
        index = (value * last).round().unsqueeze(-1)
        dtype = torch.float64 if self.levels > 1024 else self.loc.dtype  # single precision is too coarse for many bins
        centred = (2 * index.to(dtype) / last - 1 - self.loc).to(self.loc.dtype)
        rate = torch.exp(-self.log_scale)
        upper, lower = (centred + 1 / last) * rate, (centred - 1 / last) * rate
        # σ(a) - σ(b) = σ(a) σ(-b) (1 - e^(b-a)), which has no cancellation.
        inside = torch.log(-torch.expm1(-2 / last * rate))
        below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
        log_bins = torch.where(index <= 0, below, torch.where(index >= last, above, below + above + inside))
        return torch.logsumexp(self.logits.log_softmax(-1) + log_bins, -1)

    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        with torch.no_grad():
            component = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape)).unsqueeze(-1)
            loc, log_scale = (
                t.expand(*component.shape[:-1], -1).gather(-1, component).squeeze(-1)
                for t in (self.loc, self.log_scale)
            )
            u = torch.rand_like(loc).clamp(torch.finfo(loc.dtype).tiny, 1 - torch.finfo(loc.dtype).eps)
            y = loc + log_scale.exp() * (u.log() - torch.log1p(-u))
            last = self.levels - 1
            return ((y.clamp(-1, 1) + 1) / 2 * last).round() / last

    @property
    def values(self) -> Tensor:
        """0, 1/(L-1), …, 1."""
        return torch.arange(self.levels, dtype=self.loc.dtype, device=self.loc.device) / (self.levels - 1)

    def _moment(self, power: int, about: Tensor | float = 0.0) -> Tensor:
        """E[(x - about)^power], summed level by level, so that no array has L times the size."""
        total = torch.zeros(self.batch_shape, dtype=self.loc.dtype, device=self.loc.device)
        for value in self.values:
            total = total + (value - about) ** power * self.log_prob(value.expand(self.batch_shape)).exp()
        return total

    @property
    def mean(self) -> Tensor:
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        return self._moment(2, self.mean)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return _enumerate_values(self.values, self.batch_shape, expand)


def _enumerate_values(values: Tensor, batch_shape: torch.Size, expand: bool) -> Tensor:
    values = values.reshape(-1, *(1 for _ in batch_shape))
    return values.expand(-1, *batch_shape) if expand else values


class grid(constraints.Constraint):
    """The values 0, 1/(levels - 1), …, 1, up to rounding in single precision."""

    is_discrete = True
    event_dim = 0

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        index = value * (self.levels - 1)
        return (value >= 0) & (value <= 1) & ((index - index.round()).abs() < 0.01)


class Side(dist.TorchDistribution):
    """Independent distributions of features, concatenated along the last batch dimension."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch's own name and kind)

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts
        self.sizes = [part.batch_shape[-1] for part in parts]
        batch_shape = torch.broadcast_shapes(*(part.batch_shape[:-1] for part in parts))
        # Each part validates its own values.
        super().__init__(torch.Size([*batch_shape, sum(self.sizes)]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Side":
        *front, last = batch_shape
        if last != sum(self.sizes):
            raise ValueError(f"{sum(self.sizes)} concatenated features cannot be expanded to {last}")
        return Side([part.expand(torch.Size([*front, n])) for part, n in zip(self.parts, self.sizes, strict=True)])

    @property
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self.parts)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.cat([part.support for part in self.parts], -1, self.sizes)

    def log_prob(self, value: Tensor) -> Tensor:
        values = value.split(self.sizes, -1)
        return torch.cat([part.log_prob(v) for part, v in zip(self.parts, values, strict=True)], -1)

    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        with torch.no_grad():
            return torch.cat([part.sample(sample_shape) for part in self.parts], -1)

    def rsample(self, sample_shape: Any = EMPTY) -> Tensor:
        return torch.cat([part.rsample(sample_shape) for part in self.parts], -1)

    @property
    def mean(self) -> Tensor:
        return torch.cat([part.mean for part in self.parts], -1)

    @property
    def variance(self) -> Tensor:
        return torch.cat([part.variance for part in self.parts], -1)


def rescale(features: Any, center: Tensor, unit: Tensor) -> Any:
    """Return the distributions of ``center + unit u``, given those of u, where u is a real number.

    Other distributions are returned unchanged. Normals and other location-scale families stay in their family, so
    that means and KL divergences keep their closed forms.

    Example:
        >>> d = rescale(dist.Normal(torch.zeros(2), 0.5), torch.tensor([1.0, 0.0]), torch.tensor([10.0, 1.0]))
        >>> d.loc, d.scale
        (tensor([1., 0.]), tensor([5.0000, 0.5000]))
    """
    if isinstance(features, Side):
        parts = zip(features.parts, center.split(features.sizes, -1), unit.split(features.sizes, -1), strict=True)
        return Side([rescale(part, c, s) for part, c, s in parts])
    if isinstance(features, StudentT):
        return StudentT(features.given_df, center + unit * features.loc, unit * unexpanded(features.scale))
    if type(features) in (Normal, dist.Normal, dist.Laplace, dist.Cauchy, dist.Gumbel):
        return type(features)(center + unit * features.loc, unit * unexpanded(features.scale))
    if not isinstance(support_of(features), type(constraints.real)):
        return features
    return _Rescaled(features, [dist.transforms.AffineTransform(center, unit)])


class _Rescaled(dist.TransformedDistribution):
    """``center + unit u`` for u from a distribution outside the location-scale families above."""

    @property
    def mean(self) -> Tensor:
        affine = self.transforms[0]
        return affine.loc + affine.scale * self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        return self.transforms[0].scale ** 2 * self.base_dist.variance
