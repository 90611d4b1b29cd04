"""Distributions whose log-densities stay accurate where Pyro's formulas cancel in single precision."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

LOG_TWO_PI = math.log(2 * math.pi)


def unexpanded(tensor: Tensor) -> Tensor:
    """Return a view with one entry along each expanded dimension, so that equal numbers are computed once.

    Example:
        >>> unexpanded(torch.ones(3).expand(5, 3)).shape
        torch.Size([1, 3])
    """
    return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]


class Normal(dist.Normal):
    """Pyro's normal distribution, scored in fewer passes; a scale that many values share is used unexpanded.

    Example:
        >>> Normal(torch.zeros(4, 2), 0.5).log_prob(torch.zeros(2)).shape
        torch.Size([4, 2])
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Normal":
        return super().expand(batch_shape, self.__new__(type(self)) if _instance is None else _instance)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        scale = unexpanded(self.scale)
        standard = (value - self.loc) / scale
        return torch.addcmul(-scale.log() - 0.5 * LOG_TWO_PI, standard, standard, value=-0.5)


class StudentT(dist.StudentT):
    """Student's t with a normalizing constant in double precision.

    In single precision Pyro's constant is 1 nat off at df = 1e6.

    Example:
        >>> StudentT(1e9, torch.zeros(()), torch.ones(())).log_prob(torch.zeros(()))  # nearly N(0, 1)
        tensor(-0.9189)
    """

    def __init__(self, df: float, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.given_df, self.log_constant = df, student_constant(df)
        super().__init__(df, loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StudentT":
        new: StudentT = self.__new__(type(self)) if _instance is None else _instance
        new.given_df, new.log_constant = self.given_df, self.log_constant
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        df, scale = self.given_df, unexpanded(self.scale)
        square = ((value - self.loc) / scale).square()
        return self.log_constant - scale.log() - 0.5 * (df + 1) * torch.log1p(square / df)


def student_constant(df: float) -> float:
    """Compute log Γ((ν + 1) / 2) - log Γ(ν / 2) - ½ log(π ν), for large ν by its series.

    Example:
        >>> abs(student_constant(1.0) + math.log(math.pi)) < 1e-12
        True
    """
    if df > 1e5:
        return -0.5 * LOG_TWO_PI - 0.25 / df
    return math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi * df)


class MultivariateNormal(dist.MultivariateNormal):
    """Normal distribution given its Cholesky factor, scored in double precision.

    In single precision the distance of a value from the long axis cancels if the short axis is much shorter.

    Args:
        loc: μ, shape ``(*batch, d)``.
        log_diagonal: log L_jj, shape ``(*batch, d)``.
        below: the rows of L below its diagonal, shape ``(*batch, d (d - 1) / 2)``.
    """

    def __init__(self, loc: Tensor, log_diagonal: Tensor, below: Tensor, validate_args: bool | None = None) -> None:
        self.log_diagonal, self.factor = log_diagonal, _lower_triangular(log_diagonal.double(), below.double())
        super().__init__(loc, scale_tril=self.factor.to(loc.dtype), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MultivariateNormal":
        new: MultivariateNormal = self.__new__(type(self)) if _instance is None else _instance
        new.log_diagonal = self.log_diagonal.expand(*batch_shape, -1)
        new.factor = self.factor.expand(*batch_shape, -1, -1)
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        apart = (value.double() - self.loc.double()).unsqueeze(-1)
        standard = torch.linalg.solve_triangular(self.factor, apart, upper=False).squeeze(-1)
        each = -0.5 * (standard.square() + LOG_TWO_PI) - self.log_diagonal.double()
        return each.sum(-1).to(self.loc.dtype)


def _lower_triangular(log_diagonal: Tensor, below: Tensor) -> Tensor:
    """Assemble L, shape ``(*batch, d, d)``."""
    size = log_diagonal.shape[-1]
    entries = torch.cat([torch.zeros_like(log_diagonal[..., :1]), log_diagonal.exp(), below], -1)
    return entries[..., _places(size, log_diagonal.device)]


def _places(size: int, device: torch.device) -> Tensor:
    """Index each entry of a lower triangular matrix in the sequence (0, the diagonal, the rows below it)."""
    places = torch.arange(1, size + 1, device=device).diag()
    row, column = torch.tril_indices(size, size, -1, device=device)
    places[row, column] = torch.arange(size + 1, size + 1 + len(row), device=device)
    return places


class LowRankMultivariateNormal(dist.LowRankMultivariateNormal):
    """Low-rank normal distribution given log σ, scored in double precision by a sum of squares.

    .. math:: \\delta^\\top (W W^\\top + \\mathrm{diag}\\,\\sigma^2)^{-1} \\delta = \\|u - A v\\|^2 + \\|v\\|^2,
        \\quad A = W / \\sigma,\\ u = \\delta / \\sigma,\\ v = (I + A^\\top A)^{-1} A^\\top u

    Args:
        loc: μ, shape ``(*batch, d)``.
        factor: W, shape ``(*batch, d, r)``.
        log_scale: log σ, shape ``(*batch, d)``.
    """

    def __init__(self, loc: Tensor, factor: Tensor, log_scale: Tensor, validate_args: bool | None = None) -> None:
        self.log_scale = log_scale
        super().__init__(loc, factor, (2 * log_scale).exp(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LowRankMultivariateNormal":
        new: LowRankMultivariateNormal = self.__new__(type(self)) if _instance is None else _instance
        new.log_scale = self.log_scale.expand(*batch_shape, -1)
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_scale = self.log_scale.double()
        rate = torch.exp(-log_scale)
        a = self._unbroadcasted_cov_factor.double() * rate.unsqueeze(-1)
        u = ((value.double() - self.loc.double()) * rate).unsqueeze(-1)
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        capacitance = torch.linalg.cholesky(a.mT @ a + identity)
        half = torch.linalg.solve_triangular(capacitance, a.mT @ u, upper=False)
        v = torch.linalg.solve_triangular(capacitance.mT, half, upper=True)
        square = (u - a @ v).square().sum((-2, -1)) + v.square().sum((-2, -1))
        half_log_det = log_scale.sum(-1) + capacitance.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (-0.5 * (square + self.event_shape[0] * LOG_TWO_PI) - half_log_det).to(self.loc.dtype)
