"""A likelihood for tables with several types of columns."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.core.component import Distribution
from pyro_vae.core.validation import whole
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.likelihoods._distributions import Side
from pyro_vae.likelihoods.base import Likelihood, make_likelihood

Block = tuple[Callable[[nn.Module], Likelihood], int]


class Blocks(Likelihood):
    """Consecutive blocks of columns, each with its own likelihood, on the output of one network.

    .. math:: p(x | z) = \\prod_b p_b(x_b | f_\\Theta(z)_b)

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to ``(*batch, outputs)``: the outputs of the first
            block, then of the second, …; ``Blocks.outputs(features, blocks=blocks)`` is their number.
        blocks: pairs of a likelihood class (or a function of a network, such as ``partial(Categorical, levels=4)``)
            and its number of columns, at least 1.

    Raises:
        SettingsError: if there is no block, or a block is not such a pair.
        ModelError: when called, if the number of outputs does not match the blocks.

    References:
        | Handling Incomplete Heterogeneous Data Using VAEs (Nazábal et al., 2018), https://arxiv.org/abs/1807.03653

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from pyro_vae.likelihoods import Bernoulli, Categorical, Normal
        >>> _ = torch.manual_seed(0)
        >>> blocks = [(Normal, 3), (Bernoulli, 1), (partial(Categorical, levels=4), 2)]
        >>> Blocks.outputs(6, blocks=blocks)
        12
        >>> likelihood = Blocks(nn.Linear(2, 12), blocks)
        >>> p = likelihood(torch.zeros(5, 2))
        >>> p.event_shape, p.log_prob(torch.zeros(6)).shape, likelihood.net_outputs
        (torch.Size([6]), torch.Size([5]), 12)
    """

    support = constraints.dependent

    def __init__(self, net: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__(net)
        self.sizes, likelihoods = _make_blocks(blocks)
        self.blocks = nn.ModuleList(likelihoods)

    @classmethod
    def outputs(cls, size: int, *, blocks: Sequence[Block] | None = None) -> int:
        if blocks is None:
            raise SettingsError("the outputs of Blocks depend on its blocks; pass blocks=")
        sizes, likelihoods = _make_blocks(blocks)
        if sum(sizes) != size:
            raise SettingsError(f"the blocks have {sum(sizes)} columns for {size} features; make them equal")
        return sum(_widths(sizes, likelihoods))

    @property
    def _members(self) -> list[Any]:
        return list(self.blocks)

    @property
    def net_outputs(self) -> int:
        """The number of outputs that the network needs."""
        return sum(_widths(self.sizes, self._members))

    @property
    def feature_support(self) -> constraints.Constraint:
        """The values that the columns can take, block by block."""
        return constraints.cat([block.feature_support for block in self._members], -1, self.sizes)

    @property
    def takes(self) -> str:
        return "; ".join(f"{block.takes} in {n} columns" for n, block in zip(self.sizes, self._members, strict=True))

    def features(self, out: Tensor) -> Distribution:
        if out.shape[-1] != self.net_outputs:
            raise ModelError(
                f"the network gives {out.shape[-1]} outputs and the blocks need {self.net_outputs}; make them equal"
            )
        parts = out.split(_widths(self.sizes, self._members), -1)
        return Side([block.features(part) for block, part in zip(self._members, parts, strict=True)])

    def real_columns(self, shape: torch.Size) -> Tensor:
        self._validate_width(shape[-1])
        sizes = zip(self.sizes, self._members, strict=True)
        return torch.cat([block.real_columns(torch.Size([n])) for n, block in sizes])

    def beyond(self, out: Tensor) -> dict[str, Tensor]:
        blocks = zip(self._members, out.split(_widths(self.sizes, self._members), -1), strict=True)
        return {
            f"{limit} in block {i}, {type(block).__name__}": beyond
            for i, (block, part) in enumerate(blocks)
            for limit, beyond in block.beyond(part).items()
        }

    def refuse_columns(
        self, x: Tensor, source: str, columns: Sequence[str] | None, first: int, first_row: int = 0
    ) -> None:
        self._validate_width(x.shape[-1])
        for n, block, part in zip(self.sizes, self._members, x.split(self.sizes, -1), strict=True):
            block.refuse_columns(part, source, columns, first, first_row)
            first += n

    def _validate_width(self, columns: int) -> None:
        if columns != sum(self.sizes):
            raise ModelError(f"the blocks have {sum(self.sizes)} columns but the data {columns}; make them equal")

    def extra_repr(self) -> str:
        return f"columns={self.sizes}"


def _widths(sizes: Sequence[int], likelihoods: Any) -> list[int]:
    """The number of network outputs of each block."""
    return [n * likelihood.numbers for n, likelihood in zip(sizes, likelihoods, strict=True)]


def _make_blocks(blocks: Sequence[Block]) -> tuple[list[int], list[Likelihood]]:
    if not blocks:
        raise SettingsError("there are no blocks; pass at least one pair of a likelihood and its number of columns")
    sizes, likelihoods = [], []
    for block in blocks:
        if not (isinstance(block, Sequence) and len(block) == 2 and callable(block[0])):
            raise SettingsError(f"the block {block!r} is not a pair of a likelihood class and its number of columns")
        sizes.append(whole("a block's number of columns", block[1], 1))
        likelihoods.append(_make_block(block[0]))
    return sizes, likelihoods


def _make_block(make: Any) -> Likelihood:
    likelihood = make_likelihood(make, "a block")
    if isinstance(likelihood, Blocks):
        raise SettingsError("a block is itself a Blocks likelihood; list its blocks instead")
    return likelihood
