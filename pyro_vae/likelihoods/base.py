"""What all likelihoods share: a network's numbers become independent features."""

import sys
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.core.component import Conditional, Distribution, as_taken, at_least_single, join
from pyro_vae.core.standardize import Standardizable, Standardize
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.likelihoods._distributions import rescaled


class Likelihood(Conditional, Standardizable):
    """The base of likelihoods: a module from ``z`` of shape ``(*batch, latent)`` to ``p(x|z)``.

    .. math:: p(x | z) = \\prod_j p(x_j | f_\\Theta(z)_j)

    A member implements :meth:`features`, which makes of the network's output the distribution of each
    feature. Where a feature needs several numbers, the output holds the first number of all features,
    then the second of all, and so on.

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to ``(*batch, outputs)``; with a context of
            size c it is fed ``latent + c`` numbers.

    Raises:
        ModelError: in a call, if the network's outputs cannot be shared out among the features.

    Example:
        >>> issubclass(Likelihood, Conditional)
        True
    """

    support: ClassVar[constraints.Constraint] = constraints.real
    """The values of one feature that the class can describe, with some choice of its settings."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @classmethod
    def outputs(cls, size: int) -> int:
        """How many numbers the network must give for ``size`` features; a member may ask for its settings too."""
        return size

    @property
    def numbers(self) -> int:
        """How many numbers of the network each feature takes, with this instance's settings."""
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
        """The distributions of the features, batch shape ``(*batch, features)``, given the network's output."""

    def beyond(self, out: Tensor) -> dict[str, Tensor]:
        """Where the network's output lies beyond a limit at which it is clamped, by the limit; nothing without one."""
        return {}

    def forward(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        out = at_least_single(self.net(as_taken(self.net, join(z, context))))
        features = self.features(out)
        if self.standardize is not None:
            features = rescaled(features, self.standardize.center, self.standardize.unit)
        return features.to_event(out.dim() - z.dim() + 1)

    def standardize_by(self, standardize: Standardize) -> None:
        """Describe the columns of real numbers in these units; counts, categories and shares stay as they are."""
        super().standardize_by(standardize.only(self.real_columns(standardize.center.shape)))

    def real_columns(self, shape: torch.Size) -> Tensor:
        """Which features may be any real number: booleans of this shape, that of the features."""
        return torch.full(shape, self.feature_support is constraints.real)

    def parts(self, out: Tensor) -> tuple[Tensor, ...]:
        """The network's output as :attr:`numbers` tensors, each with one number per feature."""
        given = out.shape[-1] if out.dim() else 0
        if given == 0 or given % self.numbers:
            raise ModelError(
                f"the network gives {given} outputs, {type(self).__name__} needs {self.numbers} for each feature; "
                f"make them a multiple of {self.numbers}"
            )
        return out.chunk(self.numbers, -1)

    def refuse(self, x: Tensor, source: str = "data", columns: Sequence[str] | None = None, first_row: int = 0) -> None:
        """Refuse data that this likelihood cannot have given; NaN, a missing value, passes.

        Args:
            x: data, shape ``(datum, *features)``.
            source: where they come from, for the message.
            columns: the names of the columns, for the message.
            first_row: the number of the first row of ``x`` in its source, for the message.

        Raises:
            DataError: naming the first such value and its place, and the likelihoods that would take the data.
        """
        self.refuse_columns(x, source, columns, 0, first_row)

    def refuse_columns(
        self, x: Tensor, source: str, columns: Sequence[str] | None, first: int, first_row: int = 0
    ) -> None:
        """:meth:`refuse` for ``x`` whose column 0 is column ``first`` of the data."""
        outside = _outside(x, self.feature_support)
        if not (count := int(outside.sum())):
            return
        row, *place = outside.nonzero()[0].tolist()
        value = x[(row, *place)].item()
        # As few digits as show that it is outside.
        few = (f"{value:g}", f"{value:.9g}")
        shown = next((text for text in few if _outside(torch.tensor(float(text)), self.feature_support)), repr(value))
        if place:
            place[-1] += first
        column = (
            repr(columns[place[-1]]) if columns is not None and len(place) == 1 else ", ".join(map(str, place)) or "0"
        )
        others = [name for name in taking(x) if name != type(self).__name__]
        advice = f"take {', '.join(others)}" if others else "no likelihood here takes them all, so clean the data"
        raise DataError(
            f"{source}: row {first_row + row}, column {column} is {shown}, and {type(self).__name__} takes "
            f"{self.takes}; {count} of {x.numel()} values {'is' if count == 1 else 'are'} outside; {advice} "
            "(rows and columns are counted from 0)"
        )


def taking(x: Tensor) -> list[str]:
    """The names of the likelihoods here whose support holds every value of ``x``, missing ones (NaN) apart.

    Those of any real number come last.

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
    """Make a likelihood whose features come from a network that it shares with others.

    Args:
        make: a class, or a function of a network, as ``partial(Categorical, levels=4)``.
        role: what it is for, for the message.

    Raises:
        SettingsError: if it makes no likelihood.

    Example:
        >>> from pyro_vae.likelihoods import Poisson
        >>> type(make_likelihood(Poisson, "a block")).__name__
        'Poisson'
    """
    if isinstance(make, nn.Module):
        name = type(make).__name__
        raise SettingsError(f"{role} is an instance of {name}, which has a network; give the class, {name}")
    try:
        likelihood = make(nn.Identity())
    except TypeError as error:
        name = getattr(make, "__name__", repr(make))
        raise SettingsError(
            f"{role} cannot be made by {name} ({error}); give its settings by partial({name}, ...)"
        ) from error
    if not isinstance(likelihood, Likelihood):
        raise SettingsError(f"{role} is a {type(likelihood).__name__}; it must be a likelihood")
    return likelihood


def _outside(x: Tensor, support: constraints.Constraint) -> Tensor:
    return ~x.isnan() & ~(x.isfinite() & support.check(x))
