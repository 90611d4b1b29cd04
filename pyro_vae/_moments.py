"""Moments of gradients from blocks of draws, each with an error by the jackknife over blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.diagnose.weights import LEAST, psis

BLOCKS = 10
"""At most so many blocks of draws; their spread gives the errors."""


class Moments:
    """Sums of gradients over blocks of draws: no draw is kept.

    Args:
        shapes: how many numbers each parameter has.
        draws: how many gradients will come, at least 2.
        like: where, and in which precision, they are.

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

    def add(self, gradient: Sequence[Tensor]) -> None:
        """One draw's gradient, a tensor per parameter."""
        block = self.seen * self.blocks // self.draws
        flat = torch.cat([g.flatten() for g in gradient]).double()
        own = by_parameter(flat.square(), self.shapes)
        self.sums[block] += flat
        self.squares[block] += own
        self.each.append(own)
        self.counts[block] += 1
        self.seen += 1

    def without(self, block: int | None) -> tuple[Tensor, Tensor, float]:
        """The sum, the sum of squares per parameter and the number of draws, leaving out one block or none."""
        keep = torch.ones(self.blocks)
        if block is not None:
            keep[block] = 0
        mask = keep.to(self.sums)
        return mask @ self.sums, mask @ self.squares, float((keep.double() * self.counts).sum())

    def means(self) -> Tensor:
        """The mean of each block, shape ``(block, number)``."""
        return self.sums / self.counts.to(self.sums).unsqueeze(1)


def by_parameter(values: Tensor, shapes: Sequence[int]) -> Tensor:
    """The sum over the numbers of each parameter.

    Example:
        >>> by_parameter(torch.tensor([1.0, 2.0, 4.0]), [2, 1])
        tensor([3., 4.])
    """
    return torch.stack([part.sum() for part in values.split(list(shapes))])


@dataclass(frozen=True)
class Squares:
    """Per group: ``‖E g‖²`` without the bias of its noise, the total variance, and errors of what is made of them.

    Example:
        >>> Squares(torch.tensor([4.0]), torch.tensor([1.0])).snr
        tensor([2.])
    """

    signal: Tensor
    variance: Tensor

    @property
    def norm(self) -> Tensor:
        """``‖E g‖``, 0 where the noise hides it."""
        return self.signal.clamp(min=0).sqrt()

    @property
    def snr(self) -> Tensor:
        """``‖E g‖ / sd(g)``, the root of the ratio of the two totals; infinite without noise."""
        return self.norm / self.variance.sqrt()


def squares(moments: Moments, groups: Sequence[Sequence[int]], without: int | None = None) -> Squares:
    """Signal and noise of each group of parameters.

    Example:
        >>> moments = Moments([1], 2, like=torch.zeros(()))
        >>> moments.add([torch.ones(1)]); moments.add([3 * torch.ones(1)])
        >>> squares(moments, [[0]]).variance
        tensor([2.], dtype=torch.float64)
    """
    total, square, count = moments.without(without)
    mean_square = by_parameter((total / count).square(), moments.shapes)
    # Rounding leaves about 1e-16 of the square where there is no noise at all: that is none.
    variance = (square / count - mean_square).clamp(min=0)
    variance = torch.where(variance < 1e-14 * square / count, 0.0, variance) * count / (count - 1)
    signal = mean_square - variance / count
    return Squares(_over(signal, groups), _over(variance, groups))


def _over(values: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([values[list(group)].sum() for group in groups])


def jackknife(moments: Moments, statistic: Callable[[int | None], Tensor]) -> tuple[Tensor, Tensor]:
    """A statistic of all draws, and its standard error by leaving out one block at a time.

    Args:
        moments: for their blocks.
        statistic: of the block that is left out, or of none.

    Example:
        >>> moments = Moments([1], 4, like=torch.zeros(()))
        >>> for value in (1.0, 2.0, 3.0, 4.0):
        ...     moments.add([torch.full((1,), value)])
        >>> mean, error = jackknife(moments, lambda block: moments.without(block)[0] / moments.without(block)[2])
        >>> mean.item(), round(error.item(), 4)  # √(5/3 / 4)
        (2.5, 0.6455)
    """
    left_out = torch.stack([statistic(block) for block in range(moments.blocks)])
    blocks = len(left_out)
    return statistic(None), ((left_out - left_out.mean(0)).square().sum(0) * (blocks - 1) / blocks).sqrt()


def tail_shapes(moments: Moments, groups: Sequence[Sequence[int]]) -> Tensor:
    """The shape k̂ of the tail of the squared norm of a gradient, over draws, per group; NaN for too few draws.

    Above ½ the squared norm has no variance, so that the error of a variance of gradients cannot be estimated.

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
    norms = torch.where(known & (norms.sum(0) > 0), norms, 1.0)  # a gradient that is 0 has no tail
    return torch.where(known, torch.as_tensor(psis(norms.log())[1], device=norms.device), torch.nan)


def alignment(first: Moments, second: Moments, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The cosine between two mean gradients, per group, and its standard error by the jackknife.

    Products are of different blocks only, so that noise that both share does not count.

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

    def cosine(keep: Tensor) -> Tensor:
        a, b = one[keep], other[keep]
        across, own, its = (_between(*pair, first.shapes, groups) for pair in ((a, b), (a, a), (b, b)))
        return across / (own.clamp(min=0) * its.clamp(min=0)).sqrt()

    blocks = torch.arange(len(one))
    left_out = torch.stack([cosine(blocks[blocks != b]) for b in blocks])
    error = ((left_out - left_out.mean(0)).square().sum(0) * (len(one) - 1) / len(one)).sqrt()
    return cosine(blocks), error


def _between(first: Tensor, second: Tensor, shapes: Sequence[int], groups: Sequence[Sequence[int]]) -> Tensor:
    """The mean inner product of different rows of two tables, per group."""
    m = len(first)
    whole, own = first.sum(0) * second.sum(0), (first * second).sum(0)
    return _over(by_parameter((whole - own) / (m * (m - 1)), shapes), groups)


def distance(first: Moments, second: Moments, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """How far two mean gradients are apart, per group, without the bias of their noise.

    The squared distance is the mean over pairs of different blocks, which expects ``‖E g - E h‖²``.

    Returns:
        The squared distance, its standard error by the jackknife, and the squared norm of the second mean.

    Example:
        >>> a, b = (Moments([1], 4, like=torch.zeros(())) for _ in range(2))
        >>> for noise in (1.0, -1.0, 1.0, -1.0):
        ...     a.add([torch.full((1,), 5 + noise)]); b.add([torch.full((1,), 2 - noise)])
        >>> distance(a, b, [[0]])[0] > 6
        tensor([True])
    """
    blocks = min(first.blocks, second.blocks)
    apart = first.means()[:blocks] - second.means()[:blocks]

    def between(rows: Tensor) -> Tensor:
        return _between(rows, rows, first.shapes, groups)

    if blocks < 3:
        nothing = torch.full((len(groups),), torch.nan, dtype=torch.float64)
        return nothing, nothing, nothing
    left_out = torch.stack([between(torch.cat([apart[:b], apart[b + 1 :]])) for b in range(blocks)])
    error = ((left_out - left_out.mean(0)).square().sum(0) * (blocks - 1) / blocks).sqrt()
    return between(apart), error, between(second.means())
