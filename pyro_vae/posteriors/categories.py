"""Relaxed categories, and the categories that they relax."""

from torch import Tensor, nn

from pyro_vae.core.categories import GumbelSoftmax as _GumbelSoftmax
from pyro_vae.core.categories import OneHots
from pyro_vae.core.component import Distribution
from pyro_vae.core.standardize import Standardize
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.posteriors.base import Posterior


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
        >>> import torch, pyro_vae as pv
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
