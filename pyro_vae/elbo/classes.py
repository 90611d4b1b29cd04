"""The bound of half-labelled data."""

import math
from typing import Any

from torch import Tensor

from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.bounds import ELBO, Estimator
from pyro_vae.elbo.log_weights import Weights
from pyro_vae.errors import ModelError, SettingsError

__all__ = ["M2"]


class M2(ELBO):
    """The ELBO of half-labelled data: the class summed out under q(y|x), which labels train too.

    .. math:: \\mathcal L_i = \\sum_{y \\in S_i} \\tilde q(y)
        \\Bigl(\\frac1K \\sum_k \\log w_{kiy} - \\log \\tilde q(y)\\Bigr) +
        \\alpha \\log \\sum_{y \\in S_i} q(y | x_i), \\qquad w_{kiy} = \\frac{p(x_i, y, z_{kiy})}{q(z_{kiy} | x_i, y)}

    :math:`S_i` holds the classes that the model leaves possible: the label, where it is known, else all. :math:`\\tilde
    q` is q(y|x) restricted to them. So a labelled datum has :math:`\\log w` of its class and α times the
    log-probability that q gives it, and an unlabelled datum the bound of Kingma et al., which is at most the mean of
    the log-weights with the class summed out (:class:`ELBO` of the same pair).

    Args:
        num_particles: K, at least 1.
        weight: α, at least 0, in units of the evidence of one datum. It is no part of the bound: with 0 labels do not
            train q(y|x).

    Raises:
        SettingsError: if ``weight`` is below 0.
        ModelError: when called, if the guide enumerates no site.

    References:
        | Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014), https://arxiv.org/abs/1406.5298

    Example:
        >>> M2(weight=5.0)
        M2(1, weight=5)
    """

    takes_globals = False

    @takes_settings
    def __init__(self, num_particles: int = 1, *, weight: float = 1.0) -> None:
        super().__init__(num_particles)
        if not 0 <= weight < math.inf:
            raise SettingsError(f"M2: weight is {weight}; it must be a finite number of at least 0")
        self.weight = float(weight)

    def bound(self, w: Weights) -> Tensor:
        if not w.enumerated:
            raise ModelError('M2 sums a class out; give its site infer={"enumerate": "parallel"} in the guide')
        possible = w.log_by_class > -math.inf
        log_q = w.log_q_by_class.masked_fill(~possible, -math.inf)
        known = log_q.logsumexp(0)
        log_q, log_w = (part.masked_fill(~possible, 0.0) for part in (log_q - known, w.log_by_class))
        share = log_q.exp() * possible
        return ((share * (log_w - log_q)).sum(0) + self.weight * known).mean(0)

    def settings(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def target(self) -> str:
        return repr(self)

    def reference(self) -> Estimator:
        return self
