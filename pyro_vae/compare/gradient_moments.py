"""Estimate moments of gradients from blocks of draws, with standard errors by the jackknife."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.evidence.psis import LEAST, psis

BLOCKS = 10
"""The most blocks of draws; the spread over blocks gives the errors."""

WIDTH = 1.96
"""A normal variable lies within this many standard deviations with 95 % probability."""


class Moments:
    """Sums of gradients over blocks of draws; single gradients are not stored.

    Args:
        shapes: the number of elements of each parameter.
        draws: the number of gradients that will be added, at least 2.
        like: a tensor on the device of the gradients.

    Example:
        >>> moments = Moments([2, 1], 4, like=torch.zeros(()))
        >>> for i in range(4):
        ...     moments.add([torch.full((2,), float(i)), torch.ones(1)])
        >>> squares(moments, [[0], [1]]).variance.tolist()  # Σ over two numbers of variance 5/3, and none
        [3.333..., 0.0]
    """

    def __init__(self, shapes: Sequence[int], draws: int, *, like: Tensor) -> None:
        self.shapes, self.draws, self.seen = list(shapes), draws, 0
        self.blocks = min(BLOCKS, draws)
        self.sums = torch.zeros(self.blocks, sum(shapes), dtype=torch.float64, device=like.device)
        self.squares = torch.zeros(self.blocks, len(shapes), dtype=torch.float64, device=like.device)
        self.counts = torch.zeros(self.blocks, dtype=torch.float64)
        self.each: list[Tensor] = []
        self._products: Tensor | None = None

    @property
    def rounding(self) -> Tensor:
        """A bound of the relative rounding error of a sum of squares, per parameter: the variance without noise."""
        return torch.finfo(torch.float64).eps * torch.tensor(self.shapes).clamp(min=100).to(self.sums)

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Add the gradient of one draw, a tensor per parameter."""
        block = self.seen * self.blocks // self.draws
        flat = torch.cat([g.flatten() for g in gradient]).double()
        square = by_parameter(flat.square(), self.shapes)
        self.sums[block] += flat
        self.squares[block] += square
        self.each.append(square)
        self.counts[block] += 1
        self.seen += 1
        self._products = None

    def without(self, block: int | None) -> tuple[Tensor, Tensor, float]:
        """Return the squared norm of the sum, the sum of squares and the number of draws, without one block or none.

        The first two are per parameter.
        """
        if self._products is None:
            self._products = products(self.sums, self.sums, self.shapes)
        keep = torch.ones_like(self.counts)
        if block is not None:
            keep[block] = 0
        mask = keep.to(self.sums)
        return mask @ self._products @ mask, mask @ self.squares, float((keep * self.counts).sum())

    def means(self) -> Tensor:
        """Return the mean of each block, shape ``(block, number)``."""
        return self.sums / self.counts.to(self.sums).unsqueeze(1)


def by_parameter(values: Tensor, shapes: Sequence[int]) -> Tensor:
    """Sum over the elements of each parameter.

    Example:
        >>> by_parameter(torch.tensor([1.0, 2.0, 4.0]), [2, 1])
        tensor([3., 4.])
    """
    return torch.stack([part.sum() for part in values.split(list(shapes))])


def products(first: Tensor, second: Tensor, shapes: Sequence[int]) -> Tensor:
    """Compute the inner products of the rows of two tables per parameter, shape ``(parameter, row, row)``.

    Statistics of means over subsets of the rows are sums of these products, so the jackknife needs no other pass over
    the gradients.

    Example:
        >>> products(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 1.0, 2.0]]), [2, 1]).flatten()
        tensor([3., 6.])
    """
    pairs = zip(first.split(list(shapes), 1), second.split(list(shapes), 1), strict=True)
    return torch.stack([a @ b.T for a, b in pairs])


@dataclass(frozen=True)
class Squares:
    """An unbiased estimate of ``‖E g‖²``, negative where noise hides it, and the total variance, per group.

    Example:
        >>> Squares(torch.tensor([4.0]), torch.tensor([1.0])).ratio
        tensor([4.])
    """

    signal: Tensor
    variance: Tensor

    @property
    def ratio(self) -> Tensor:
        """The squared signal-to-noise ratio; infinite without noise."""
        return self.signal / self.variance


def root(square: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the root of an estimated square, 0 where the estimate is negative, and its standard error.

    .. math:: \\mathrm{se} = \\frac1c \\max\\{\\sqrt{s_+ + c\\,e} - \\sqrt{s_+},\\
        \\sqrt{s_+} - \\sqrt{(s - c\\,e)_+}\\}, \\qquad c = 1.96

    The interval of ± c errors of the root covers the truth at least as often as that of the square, also near 0, where
    the delta method's ``e / 2√s`` fails. Far from 0 the two agree.

    Example:
        >>> [round(float(part), 4) for part in root(torch.tensor(4.0), torch.tensor(0.04))]
        [2.0, 0.01]
        >>> [round(float(part), 2) for part in root(torch.tensor(-1.0), torch.tensor(1.96))]
        [0.0, 1.0]
    """
    known, beyond = square.clamp(min=0).sqrt(), WIDTH * error
    up, down = (square.clamp(min=0) + beyond).sqrt() - known, known - (square - beyond).clamp(min=0).sqrt()
    return known, torch.maximum(up, down) / WIDTH


def squares(moments: Moments, groups: Sequence[Sequence[int]], without: int | None = None) -> Squares:
    """Estimate signal and noise of each group of parameters.

    Example:
        >>> moments = Moments([1], 2, like=torch.zeros(()))
        >>> moments.add([torch.ones(1)]); moments.add([3 * torch.ones(1)])
        >>> squares(moments, [[0]]).variance
        tensor([2.], dtype=torch.float64)
    """
    square_of_total, square, count = moments.without(without)
    mean_square = square_of_total / count**2
    variance = (square / count - mean_square).clamp(min=0)
    variance = torch.where(variance < moments.rounding * square / count, 0.0, variance) * count / (count - 1)
    signal = mean_square - variance / count
    return Squares(_over(signal, groups), _over(variance, groups))


def _over(values: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([values[list(group)].sum(0) for group in groups])


def jackknife(blocks: int, statistic: Callable[[int | None], Tensor]) -> tuple[Tensor, Tensor]:
    """Compute a statistic of all draws, and its standard error by leaving out one block at a time.

    Args:
        blocks: the number of blocks.
        statistic: a function of the block to leave out, or of None.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> mean, error = jackknife(4, lambda block: kept(values, block).mean())
        >>> mean.item(), round(error.item(), 4)  # √(5/3 / 4)
        (2.5, 0.6455)
    """
    left_out = torch.stack([statistic(block) for block in range(blocks)])
    spread = (left_out - left_out.mean(0)).square().sum(0)
    return statistic(None), (spread * (blocks - 1) / blocks).sqrt()


def kept(blocks: Tensor, without: int | None) -> Tensor:
    """Return a tensor of blocks without one of them, or none.

    Example:
        >>> kept(torch.arange(4), 1)
        tensor([0, 2, 3])
    """
    return blocks if without is None else torch.cat([blocks[:without], blocks[without + 1 :]])


def tail_shapes(moments: Moments, groups: Sequence[Sequence[int]]) -> Tensor:
    """Estimate the tail shape k̂ of the squared gradient norm over draws, per group; NaN for too few draws.

    Above ½ the squared norm has infinite variance, so the error of the gradient variance cannot be estimated.

    Example:
        >>> moments = Moments([1], 400, like=torch.zeros(()))
        >>> for u in torch.linspace(1e-3, 1, 400):
        ...     moments.add([u.reshape(1) ** -1])  # the square has k = 2
        >>> bool(tail_shapes(moments, [[0]]) > 1.5)
        True
    """
    if moments.seen < LEAST:
        return torch.full((len(groups),), torch.nan, dtype=torch.float64, device=moments.sums.device)
    norms = torch.stack([_over(each, groups) for each in moments.each])
    known = norms.isfinite().all(0)
    norms = torch.where(known & (norms.sum(0) > 0), norms, 1.0)  # a zero gradient has no tail
    return torch.where(known, torch.as_tensor(psis(norms.log())[1], device=norms.device), torch.nan)


def alignment(first: Moments, second: Moments, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Estimate the cosine between two mean gradients, per group, and its standard error by the jackknife.

    Only products of different blocks are used, so that shared noise causes no bias.

    Example:
        >>> a, b = (Moments([2], 4, like=torch.zeros(())) for _ in range(2))
        >>> for noise in (0.1, -0.1, 0.1, -0.1):
        ...     a.add([torch.tensor([1 + noise, 0.0])]); b.add([torch.tensor([3.0, 4.0 + noise])])
        >>> alignment(a, b, [[0]])[0].item()
        0.60...
    """
    one, other = first.means(), second.means()
    if len(one) < 3:
        nothing = torch.full((len(groups),), torch.nan, dtype=torch.float64, device=one.device)
        return nothing, nothing

    tables = ((one, other), (one, one), (other, other))
    ab, aa, bb = (_over(products(*pair, first.shapes), groups) for pair in tables)

    def cosine(without: int | None) -> Tensor:
        norms = _between(aa, without).clamp(min=0) * _between(bb, without).clamp(min=0)
        return _between(ab, without) / norms.sqrt()

    return jackknife(len(one), cosine)


def _between(product: Tensor, without: int | None = None) -> Tensor:
    """Average the inner products of different rows, without one row or none."""
    keep = kept(torch.arange(product.shape[-1]), without)
    rows, m = product[:, keep][..., keep], len(keep)
    return (rows.sum((-2, -1)) - rows.diagonal(dim1=-2, dim2=-1).sum(-1)) / (m * (m - 1))


def square_of_mean(blocks: Tensor, shapes: Sequence[int], groups: Sequence[Sequence[int]]) -> Tensor:
    """Estimate ``‖E‖²`` per group without bias, as the mean over pairs of different blocks.

    Args:
        blocks: the means of blocks, shape ``(block, number)``, at least 2 blocks.
        shapes: the number of elements of each parameter.
        groups: the parameters of each group.

    Example:
        >>> square_of_mean(torch.tensor([[3.0], [1.0]]), [1], [[0]])
        tensor([3.])
    """
    return _between(_over(products(blocks, blocks, shapes), groups))


def distance(first: Moments, second: Moments, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Estimate the distance of two mean gradients relative to the norm of the second, per group.

    Returns:
        The relative distance, 0 where noise hides it, and its standard error by the jackknife, which includes the
        noise of the norm; NaN with fewer than 3 blocks.

    Example:
        >>> a, b = (Moments([1], 4, like=torch.zeros(())) for _ in range(2))
        >>> for noise in (0.1, -0.1, 0.1, -0.1):
        ...     a.add([torch.full((1,), 6 + noise)]); b.add([torch.full((1,), 4 - noise)])
        >>> [round(part.item(), 2) for part in distance(a, b, [[0]])]
        [0.5, 0.04]
    """
    blocks = min(first.blocks, second.blocks)
    if blocks < 3:
        nothing = torch.full((len(groups),), torch.nan, dtype=torch.float64, device=first.sums.device)
        return nothing, nothing
    norm = second.means()[:blocks]
    apart = first.means()[:blocks] - norm

    of_apart, of_norm = (_over(products(rows, rows, first.shapes), groups) for rows in (apart, norm))
    return root(*jackknife(blocks, lambda b: _between(of_apart, b) / _between(of_norm, b).clamp(min=0)))
