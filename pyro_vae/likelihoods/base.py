"""The base class of likelihoods, and functions that find or build likelihoods."""

import sys
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.core.component import Conditional, Distribution, as_taken, at_least_single, join
from pyro_vae.core.standardize import Standardizable, Standardize
from pyro_vae.errors import DataError, ModelError, SettingsError, type_of
from pyro_vae.likelihoods._distributions import rescale


class Likelihood(Conditional, Standardizable):
    """Base class of likelihoods: modules from ``z`` of shape ``(*batch, latent)`` to ``p(x|z)``.

    .. math:: p(x | z) = \\prod_j p(x_j | f_\\Theta(z)_j)

    A subclass implements :meth:`features`, which turns the network's output into the distribution of each
    feature. If a feature has several parameters, the output holds the first parameter of all features,
    then the second parameter of all features, and so on.

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to ``(*batch, outputs)``. With a context of
            size c, its input has ``latent + c`` numbers.

    Raises:
        ModelError: when called, if the number of outputs is not a multiple of :attr:`numbers`.

    Example:
        >>> issubclass(Likelihood, Conditional)
        True
    """

    support: ClassVar[constraints.Constraint] = constraints.real
    """The values of one feature that the class can describe, for some choice of its settings."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @classmethod
    def outputs(cls, size: int) -> int:
        """Return the number of network outputs for ``size`` features; a subclass may require its settings, too."""
        return size

    @property
    def numbers(self) -> int:
        """The number of network outputs per feature, with the settings of this instance."""
        return self.outputs(1)

    @property
    def feature_support(self) -> constraints.Constraint:
        """The values of one feature that this instance can describe."""
        return self.support

    @property
    def takes(self) -> str:
        """The values of :attr:`feature_support`, in words."""
        return "finite numbers"

    @abstractmethod
    def features(self, out: Tensor) -> Distribution:
        """Return the distributions of the features, batch shape ``(*batch, features)``, given the network's output."""

    def beyond(self, out: Tensor) -> dict[str, Tensor]:
        """Return, for each limit at which outputs are clamped, a boolean tensor of the outputs beyond it."""
        return {}

    def forward(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        out = at_least_single(self.net(as_taken(self.net, join(z, context))))
        features = self.features(out)
        if self.standardize is not None:
            features = rescale(features, self.standardize.center, self.standardize.unit)
        return features.to_event(out.dim() - z.dim() + 1)

    def standardize_by(self, standardize: Standardize) -> None:
        """Standardize the columns of real numbers; counts, categories and shares are not standardized."""
        super().standardize_by(standardize.only(self.real_columns(standardize.center.shape)))

    def real_columns(self, shape: torch.Size) -> Tensor:
        """Return whether each feature is a real number: a boolean tensor of ``shape``, the shape of the features."""
        return torch.full(shape, self.feature_support is constraints.real)

    def parts(self, out: Tensor) -> tuple[Tensor, ...]:
        """Split the network's output into :attr:`numbers` tensors, each with one number per feature."""
        outputs = out.shape[-1] if out.dim() else 0
        if outputs == 0 or outputs % self.numbers:
            raise ModelError(
                f"the network gives {outputs} outputs; it must give a multiple of {self.numbers}, since "
                f"{type(self).__name__} needs {self.numbers} for each feature"
            )
        return out.chunk(self.numbers, -1)

    def refuse(self, x: Tensor, source: str = "data", columns: Sequence[str] | None = None, first_row: int = 0) -> None:
        """Raise an error if data lie outside the support; NaN, a missing value, is allowed.

        Args:
            x: data, shape ``(datum, *features)``.
            source: the name of the data, for the message.
            columns: the names of the columns, for the message.
            first_row: the number of the first row of ``x`` in its source, for the message.

        Raises:
            DataError: if a value lies outside the support. The message names the first such value, its row and column,
                and the likelihoods that take the data.
        """
        self.refuse_columns(x, source, columns, 0, first_row)

    def refuse_columns(
        self, x: Tensor, source: str, columns: Sequence[str] | None, first: int, first_row: int = 0
    ) -> None:
        """Do the work of :meth:`refuse` for data ``x`` whose column 0 is column ``first`` of the data set."""
        outside = _outside(x, self.feature_support)
        if not (count := int(outside.sum())):
            return
        row, *place = outside.nonzero()[0].tolist()
        value = x[(row, *place)].item()
        # The fewest digits that are outside the support, too.
        short = (f"{value:g}", f"{value:.9g}")
        shown = next((text for text in short if _outside(torch.tensor(float(text)), self.feature_support)), repr(value))
        if place:
            place[-1] += first
        column = (
            repr(columns[place[-1]]) if columns is not None and len(place) == 1 else ", ".join(map(str, place)) or "0"
        )
        others = [name for name in taking(x) if name != type(self).__name__]
        advice = f"use {', '.join(others)}" if others else "no likelihood takes all values, so clean the data"
        raise DataError(
            f"{source}: row {first_row + row}, column {column} is {shown}, but {type(self).__name__} takes "
            f"{self.takes}; {count} of {x.numel()} values {'is' if count == 1 else 'are'} invalid; {advice} "
            "(rows and columns are counted from 0)"
        )


def taking(x: Tensor) -> list[str]:
    """List the likelihoods whose support contains all values of ``x``.

    Missing values (NaN) are ignored. Likelihoods of real numbers come last.

    Example:
        >>> import torch
        >>> taking(torch.tensor([[0.0, 3.0], [7.0, 1.0]]))[:3]
        ['Binomial', 'Categorical', 'NegativeBinomial']
        >>> "Bernoulli" in taking(torch.tensor([[0.0, 1.0]]))
        True
    """
    here = vars(sys.modules[__package__])
    members = {name: part for name, part in here.items() if isinstance(part, type) and issubclass(part, Likelihood)}
    supports = {name: part.support for name, part in members.items() if part is not Likelihood}
    plain = {name: support for name, support in supports.items() if support is not constraints.dependent}
    taken = {id(support): not bool(_outside(x, support).any()) for support in plain.values()}
    return sorted((name for name in plain if taken[id(plain[name])]), key=lambda n: (plain[n] is constraints.real, n))


def make_likelihood(make: Any, role: str) -> Likelihood:
    """Build a likelihood without its own network, for use inside another likelihood.

    Args:
        make: a class, or a function of a network, such as ``partial(Categorical, levels=4)``.
        role: the role of the likelihood, for the message.

    Raises:
        SettingsError: if ``make`` does not build a likelihood.

    Example:
        >>> from pyro_vae.likelihoods import Poisson
        >>> type(make_likelihood(Poisson, "a block")).__name__
        'Poisson'
    """
    if isinstance(make, nn.Module):
        name = type(make).__name__
        raise SettingsError(f"{role} is an instance of {name}, which has its own network; pass the class {name}")
    try:
        likelihood = make(nn.Identity())
    except TypeError as error:
        name = getattr(make, "__name__", repr(make))
        raise SettingsError(
            f"{role} cannot be built from {name} ({error}); pass its settings with partial({name}, ...)"
        ) from error
    if not isinstance(likelihood, Likelihood):
        raise SettingsError(f"{role} is {type_of(likelihood)}; it must be a likelihood")
    return likelihood


def _outside(x: Tensor, support: constraints.Constraint) -> Tensor:
    return ~x.isnan() & ~(x.isfinite() & support.check(x))
