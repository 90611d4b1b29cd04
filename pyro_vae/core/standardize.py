"""Standardization of columns inside the model."""

import copy

import torch
from torch import Tensor, nn

from pyro_vae.core.given_numbers import GivenNumbers
from pyro_vae.errors import ModelError, SettingsError


class Standardize(GivenNumbers):
    """Standardize columns for the networks of a VAE.

    .. math:: u = (x - c) / s

    The likelihood remains a density of x in the units of the data: with :math:`\\tilde p` the density of u,
    :math:`p(x | z) = \\prod_j \\tilde p(u_j | z) / s_j`. The evidences of models that standardize differently, or not
    at all, are therefore comparable.

    Args:
        center: c, shape ``(*features)``, in units of the data.
        unit: s, same shape as c, above 0.

    Raises:
        SettingsError: if the shapes differ, or a unit is not above 0.
        ModelError: in a call, if the shape of a row differs from that of c.

    Example:
        >>> columns = Standardize(torch.tensor([1.0, 1e6]), torch.tensor([1.0, 1e5]))
        >>> columns(torch.tensor([[2.0, 9e5]]))
        tensor([[ 1., -1.]])
    """

    center: Tensor
    unit: Tensor

    def __init__(self, center: Tensor, unit: Tensor) -> None:
        super().__init__()
        if center.shape != unit.shape:
            raise SettingsError(f"center has shape {tuple(center.shape)} and unit {tuple(unit.shape)}; make them equal")
        if not bool((center.isfinite() & unit.isfinite() & (unit > 0)).all()):
            raise SettingsError(
                "each center must be finite and each unit finite and above 0; give the mean and the sd of each column"
            )
        for name, numbers in {"center": center, "unit": unit}.items():
            self.register_buffer(name, self.keep(name, numbers.detach().double()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[x.dim() - self.center.dim() :] != self.center.shape:
            raise ModelError(
                f"a row has shape {tuple(x.shape[1:])}, but the standardized columns have shape "
                f"{tuple(self.center.shape)}; give rows with the same columns"
            )
        return (x - self.center) / self.unit

    def inverse(self, standard: Tensor) -> Tensor:
        """Convert standardized values to the units of the data."""
        return self.center + self.unit * standard

    def only(self, columns: Tensor) -> "Standardize":
        """Restrict standardization to the columns where ``columns`` is true."""
        return Standardize(
            torch.where(columns.cpu(), self.given("center").cpu(), 0.0),
            torch.where(columns.cpu(), self.given("unit").cpu(), 1.0),
        )

    def extra_repr(self) -> str:
        scaled = int(((self.center != 0) | (self.unit != 1)).sum())
        return f"columns={scaled}"


class Standardizable(nn.Module):
    """A component of a VAE that can standardize its data: a likelihood or a posterior."""

    standardize: Standardize | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("standardize", None)

    def standardize_by(self, standardize: Standardize) -> None:
        """Standardize data by a copy of ``standardize`` from now on."""
        self.standardize = copy.deepcopy(standardize)

    @property
    def center(self) -> Tensor | None:
        """The value that replaces a missing one, by feature; None (for 0) if nothing is standardized."""
        return None if self.standardize is None else self.standardize.center
