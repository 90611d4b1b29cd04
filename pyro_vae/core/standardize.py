"""Columns in units of their own spread, as a part of the model."""

import copy

import torch
from torch import Tensor, nn

from pyro_vae.core.given_numbers import GivenNumbers
from pyro_vae.errors import ModelError, SettingsError


class Standardize(GivenNumbers):
    """What a VAE's networks are given of each column: its distance from a center, in units of its spread.

    .. math:: u = (x - c) / s

    The density stays one of x, in the units of the data: with :math:`\\tilde p` that of u,
    :math:`p(x | z) = \\prod_j \\tilde p(u_j | z) / s_j`. So evidences of models that standardize differently, or not
    at all, can be compared.

    Args:
        center: c, shape ``(*features)``, in units of the data.
        unit: s, of the same shape, above 0.

    Raises:
        SettingsError: if the shapes differ, or a unit is not above 0.
        ModelError: in a call, if a row is of another shape.

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
            raise SettingsError(
                f"center is of shape {tuple(center.shape)} and unit of {tuple(unit.shape)}; make them equal"
            )
        if not bool((center.isfinite() & unit.isfinite() & (unit > 0)).all()):
            raise SettingsError("a center is not finite or a unit not above 0; give the mean and the sd of each column")
        for name, numbers in {"center": center, "unit": unit}.items():
            self.register_buffer(name, self.keep(name, numbers.detach().double()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[x.dim() - self.center.dim() :] != self.center.shape:
            raise ModelError(
                f"a row has shape {tuple(x.shape[1:])}, and {tuple(self.center.shape)} were standardized; "
                "give rows of the same columns"
            )
        return (x - self.center) / self.unit

    def inverse(self, standard: Tensor) -> Tensor:
        """In units of the data."""
        return self.center + self.unit * standard

    def only(self, columns: Tensor) -> "Standardize":
        """The same for some columns, by booleans; the others stay as they are."""
        return Standardize(
            torch.where(columns.cpu(), self.given("center").cpu(), 0.0),
            torch.where(columns.cpu(), self.given("unit").cpu(), 1.0),
        )

    def extra_repr(self) -> str:
        scaled = int(((self.center != 0) | (self.unit != 1)).sum())
        return f"columns={scaled}"


class Standardizable(nn.Module):
    """A part of a VAE that can be told in which units the data are: a likelihood, or a posterior."""

    standardize: Standardize | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("standardize", None)

    def standardize_by(self, standardize: Standardize) -> None:
        """Take data in these units from now on; a copy is kept."""
        self.standardize = copy.deepcopy(standardize)

    @property
    def center(self) -> Tensor | None:
        """What stands for a missing value of each feature; 0 if there is none."""
        return None if self.standardize is None else self.standardize.center
