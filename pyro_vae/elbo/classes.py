"""The semi-supervised bound M2, for data with labels on some rows only."""

import math
from typing import Any

from torch import Tensor

from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.bounds import ELBO
from pyro_vae.elbo.estimator import Estimator
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import ModelError, SettingsError

__all__ = ["M2"]


class M2(ELBO):
    """The semi-supervised ELBO: sum the class out under q(y|x), and fit q(y|x) to known labels.

    .. math:: \\mathcal L_i = \\sum_{y \\in S_i} \\tilde q(y)
        \\Bigl(\\frac1K \\sum_k \\log w_{kiy} - \\log \\tilde q(y)\\Bigr) +
        \\alpha \\log \\sum_{y \\in S_i} q(y | x_i), \\qquad w_{kiy} = \\frac{p(x_i, y, z_{kiy})}{q(z_{kiy} | x_i, y)}

    :math:`S_i` is the set of classes with positive probability under the model: the label if it is known, else all
    classes. :math:`\\tilde q` is q(y|x) renormalized over this set. A labelled datum contributes :math:`\\log w` of its
    class plus α times :math:`\\log q` of its class. An unlabelled datum contributes the bound of Kingma et al., which
    is at most the mean log-weight with the class summed out (:class:`ELBO` of the same pair).

    Args:
        num_particles: number of particles K, at least 1.
        weight: weight α of the classification term, at least 0, relative to the evidence of one datum. This term is
            not part of the bound; with ``weight=0``, labels do not train q(y|x).

    Raises:
        SettingsError: if ``weight`` is negative or not finite.
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
            raise SettingsError(f"M2: weight is {weight}; it must be finite and at least 0")
        self.weight = float(weight)

    def bound(self, w: Weights) -> Tensor:
        if not w.enumerated:
            raise ModelError('M2 needs an enumerated class; set infer={"enumerate": "parallel"} in the guide')
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
