"""Likelihoods of real numbers."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.core.component import Distribution
from pyro_vae.core.distributions import Normal as _Normal
from pyro_vae.core.distributions import StudentT as _StudentT
from pyro_vae.core.given_numbers import GivenNumbers
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.likelihoods.base import Likelihood


class _Scaled(GivenNumbers, Likelihood):
    """Base class of likelihoods with a location from the network and a scale, fixed or learned."""

    fixed_scale: Tensor

    def __init__(self, net: nn.Module, scale: float, learn_scale: bool, per_feature: int | bool | None) -> None:
        super().__init__(net)
        scale, self.per_feature = above_zero("scale", scale), _number_of_features(net, per_feature)
        shape = () if self.per_feature is None else (self.per_feature,)
        self.learn_scale = learn_scale or self.per_feature is not None
        if self.learn_scale:
            start = torch.full(shape, math.log(scale), dtype=torch.float64)
            self.log_scale = nn.Parameter(self.keep("log_scale", start))
        else:
            start = torch.tensor(scale, dtype=torch.float64)
            self.register_buffer("fixed_scale", self.keep("fixed_scale", start))

    @property
    def scale(self) -> Tensor:
        """The scale s, of shape ``()``, or ``(features,)`` with one scale per feature."""
        return self.log_scale.exp() if self.learn_scale else self.fixed_scale

    def loc_and_scale(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the location and the scale, given the network's output."""
        (loc,) = self.parts(out)
        if self.per_feature is not None and loc.shape[-1] != self.per_feature:
            raise ModelError(
                f"the network gives {loc.shape[-1]} features but per_feature is {self.per_feature}; make them equal"
            )
        return loc, self.scale

    def extra_repr(self) -> str:
        shown = [f"{s:.4g}" for s in self.scale.detach().flatten().tolist()]
        scale = shown[0] if self.per_feature is None else f"[{', '.join(shown[:3])}{', …' * (len(shown) > 3)}]"
        return f"scale={scale}, learn_scale={self.learn_scale}"


def _number_of_features(net: nn.Module, per_feature: int | bool | None) -> int | None:
    """The number of scales; for True, the number of outputs of the network's last linear layer."""
    if per_feature is None or per_feature is False:
        return None
    if per_feature is not True:
        return whole("per_feature, the number of features,", per_feature, 1)
    if not (layers := [layer for layer in net.modules() if isinstance(layer, nn.Linear)]):
        raise SettingsError(
            f"per_feature is True, but the network ({type(net).__name__}) has no linear layer from which to infer the "
            "number of features; pass the number, such as per_feature=5"
        )
    return layers[-1].out_features


class Normal(_Scaled):
    """The Gaussian likelihood, equation (14) of the note, with fixed or learned variance.

    .. math:: p(x | z) = \\mathcal N(x | f_\\Theta(z), s^2 I)

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to ``(*batch, *features)``.
        scale: the standard deviation s, above 0, in units of the data or, if the VAE standardizes, of each column's
            standard deviation. If s is learned, training starts here.
        learn_scale: whether to train s, as the parameter ``log s`` of Θ.
        per_feature: the number of features (the size of the last dimension), to learn one s per feature.
            True infers it from the outputs of the network's last linear layer. By default all features share one s.

    Raises:
        SettingsError: if ``scale`` is not a finite number above 0, or ``per_feature`` below 1.
        ModelError: when called, if the network does not give ``per_feature`` features.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> _ = torch.manual_seed(0)
        >>> likelihood = Normal(nn.Linear(2, 3), scale=0.5)
        >>> likelihood(torch.zeros(4, 2)).log_prob(torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    def __init__(
        self, net: nn.Module, scale: float = 1.0, *, learn_scale: bool = False, per_feature: int | bool | None = None
    ) -> None:
        super().__init__(net, scale, learn_scale, per_feature)

    def features(self, out: Tensor) -> Distribution:
        return _Normal(*self.loc_and_scale(out))


class HeteroscedasticNormal(Likelihood):
    """A Gaussian likelihood whose network gives location and scale of each feature.

    .. math:: p(x | z) = \\prod_j \\mathcal N(x_j | m_j(z), (s_0 + e^{l_j(z)})^2)

    With ``min_scale=0`` the density is unbounded, since the scale can approach 0; a positive ``min_scale`` bounds it.

    Args:
        net: the decoder network, from ``(*batch, latent)`` to ``(*batch, 2 features)``: all m, then all l.
        min_scale: the smallest standard deviation s₀, at least 0, in units of the data or, if the VAE standardizes, of
            each column's standard deviation.

    Raises:
        SettingsError: if ``min_scale`` is not a finite number of at least 0.
        ModelError: when called, if the network does not give two outputs for each feature.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), appendix C, https://arxiv.org/abs/1312.6114
        | Leveraging the Exact Likelihood of Deep Latent Variable Models (Mattei & Frellsen, 2018),
          https://arxiv.org/abs/1802.04826

    Example:
        >>> _ = torch.manual_seed(0)
        >>> HeteroscedasticNormal(nn.Linear(2, 6), min_scale=0.1)(torch.zeros(4, 2)).event_shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module, *, min_scale: float = 0.0) -> None:
        super().__init__(net)
        self.min_scale = 0.0 if min_scale == 0 else above_zero("min_scale, if it is not 0,", min_scale)

    @classmethod
    def outputs(cls, size: int) -> int:
        return 2 * size

    def features(self, out: Tensor) -> Distribution:
        loc, log_scale = self.parts(out)
        return _Normal(loc, self.min_scale + log_scale.exp())

    def extra_repr(self) -> str:
        return f"min_scale={self.min_scale:.4g}"


class StudentT(_Scaled):
    """A Student-t likelihood, robust to outliers, with a fixed or learned scale.

    .. math:: p(x | z) = \\prod_j t_\\nu((x_j - f_\\Theta(z)_j) / s) / s

    The variance is :math:`s^2 \\nu / (\\nu - 2)`.

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to ``(*batch, *features)``.
        df: the degrees of freedom ν, above 2, so that the variance is finite.
        scale: the scale s, above 0, in units of the data or, if the VAE standardizes, of each column's standard
            deviation. If s is learned, training starts here.
        learn_scale: whether to train s, as the parameter ``log s`` of Θ.
        per_feature: the number of features, to learn one s per feature, or True, as in :class:`Normal`.

    Raises:
        SettingsError: if ``scale`` is not above 0, ``df`` not above 2, or ``per_feature`` below 1.
        ModelError: when called, if the network does not give ``per_feature`` features.

    References:
        | Robust Statistical Modeling Using the t Distribution (Lange, Little & Taylor, 1989),
          https://doi.org/10.1080/01621459.1989.10478852

    Example:
        >>> _ = torch.manual_seed(0)
        >>> StudentT(nn.Linear(2, 3), df=5.0, scale=0.5)(torch.zeros(4, 2)).event_shape
        torch.Size([3])
    """

    def __init__(
        self,
        net: nn.Module,
        df: float = 4.0,
        *,
        scale: float = 1.0,
        learn_scale: bool = False,
        per_feature: int | bool | None = None,
    ) -> None:
        super().__init__(net, scale, learn_scale, per_feature)
        self.df = above_zero("df", df)
        if self.df <= 2:
            raise SettingsError(f"df is {df}; it must be above 2, so that the variance is finite")

    def features(self, out: Tensor) -> Distribution:
        return _StudentT(self.df, *self.loc_and_scale(out))

    def extra_repr(self) -> str:
        return f"df={self.df:.4g}, {super().extra_repr()}"


class Laplace(_Scaled):
    """A Laplace likelihood, which fits conditional medians, with a fixed or learned scale.

    .. math:: p(x | z) = \\prod_j \\frac{1}{2 s} e^{-|x_j - f_\\Theta(z)_j| / s}

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to ``(*batch, *features)``.
        scale: the mean absolute deviation s, above 0, in units of the data or, if the VAE standardizes, of each
            column's standard deviation. If s is learned, training starts here.
        learn_scale: whether to train s, as the parameter ``log s`` of Θ.
        per_feature: the number of features, to learn one s per feature, or True, as in :class:`Normal`.

    Raises:
        SettingsError: if ``scale`` is not a finite number above 0, or ``per_feature`` below 1.
        ModelError: when called, if the network does not give ``per_feature`` features.

    References:
        | Asymptotic Theory of Least Absolute Error Regression (Bassett & Koenker, 1978),
          https://doi.org/10.1080/01621459.1978.10480065

    Example:
        >>> _ = torch.manual_seed(0)
        >>> Laplace(nn.Linear(2, 3), scale=0.5)(torch.zeros(4, 2)).event_shape
        torch.Size([3])
    """

    def __init__(
        self, net: nn.Module, scale: float = 1.0, *, learn_scale: bool = False, per_feature: int | bool | None = None
    ) -> None:
        super().__init__(net, scale, learn_scale, per_feature)

    def features(self, out: Tensor) -> Distribution:
        return dist.Laplace(*self.loc_and_scale(out))
