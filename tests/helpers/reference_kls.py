"""Kullback-Leibler divergences of normals, by dense matrices and by quadrature."""

import math

import numpy as np
import torch
from torch import Tensor

NODES, WEIGHTS = (torch.tensor(values) for values in np.polynomial.legendre.leggauss(120))


def of_normals(loc: Tensor, covariance: Tensor, other_loc: Tensor, other_covariance: Tensor) -> Tensor:
    """½ (tr(P⁻¹ Q) + (m - μ)ᵀ P⁻¹ (m - μ) - d + log |P| / |Q|)."""
    precision, apart = other_covariance.inverse(), other_loc - loc
    square = (apart.unsqueeze(-2) @ precision @ apart.unsqueeze(-1)).squeeze(-1).squeeze(-1)
    trace = (precision @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace + square - loc.shape[-1] + (other_covariance.det() / covariance.det()).log())


def normal_from_laplaces(loc: Tensor, covariance: Tensor, centre: Tensor, width: Tensor) -> Tensor:
    """E log q - Σ_j E log p_j, the latter by Gauss-Legendre quadrature on both sides of the kink."""
    d = loc.shape[-1]
    expected_q = -0.5 * (d * math.log(2 * math.pi) + d + covariance.det().log())
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    reach = ((loc - centre).abs() + 12 * scale).detach()
    distance = torch.zeros_like(loc + centre)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        apart = reach * (1 + node) / 2
        for z in (centre + apart, centre - apart):
            density = (-0.5 * ((z - loc) / scale) ** 2).exp() / (scale * math.sqrt(2 * math.pi))
            distance = distance + weight * reach / 2 * density * apart
    return expected_q + ((2 * width).log() + distance / width).sum(-1)


def by_quadrature(log_q, log_p, loc: Tensor, covariance: Tensor) -> Tensor:
    """∫ q (log q - log p) over two dimensions, up to 9 standard deviations from the mean in every direction."""
    factor = torch.linalg.cholesky(covariance)
    z = loc + 9 * torch.cartesian_prod(NODES, NODES) @ factor.T
    area = 81 * factor.det() * torch.outer(WEIGHTS, WEIGHTS).flatten()
    return (area * log_q(z).exp() * (log_q(z) - log_p(z))).sum()
