"""The order of the rows of a stream: blocks chained at random, the chain cut into windows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pyro_vae.core.device import derive_seed
from pyro_vae.data.sources import permutation

BLOCKS = 512
"""The number of blocks per window, if blocks can have any size."""


def window_rows(n: int, row_bytes: int, window_bytes: int, batch_size: int) -> int:
    """Return the number of rows in a window: all n, or whole batches of at most ``window_bytes`` (at least one)."""
    batches = max(window_bytes // (row_bytes * batch_size), 1)
    return n if n * row_bytes <= window_bytes else min(n, batches * batch_size)


@dataclass(frozen=True)
class Layout:
    """Blocks of consecutive rows, chained in random order, and the chain cut into windows.

    Args:
        starts: the first row of each block, in the order of the chain.
        ends: the end of each block in the chain.
        window: rows per window; a block may extend over several windows.

    Example:
        >>> layout = Layout.of(np.array([0, 3, 6, 8]), seed=0, window=4)
        >>> sorted(row for w in range(2) for first, last in layout.spans(w) for row in range(first, last))
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    starts: np.ndarray
    ends: np.ndarray
    window: int

    @classmethod
    def of(cls, cuts: np.ndarray, *, seed: int, window: int) -> "Layout":
        """Order the blocks between ``cuts``, from 0 to the number of rows, by a permutation from the seed."""
        order = permutation(len(cuts) - 1, derive_seed(seed, "blocks of a stream")).numpy()
        return cls(cuts[:-1][order], np.diff(cuts)[order].cumsum(), window)

    def numbers(self, number: int) -> np.ndarray:
        """Return the numbers of a window's rows in the data; windows are counted from 0."""
        firsts, lasts = np.array(list(self.spans(number))).T
        lengths = lasts - firsts
        return np.repeat(firsts - lengths.cumsum() + lengths, lengths) + np.arange(lengths.sum())

    def spans(self, number: int) -> Iterator[tuple[int, int]]:
        """Iterate over the spans of a window's rows, as first and last (exclusive) row of each block."""
        at, end = number * self.window, min((number + 1) * self.window, int(self.ends[-1]))
        block = int(np.searchsorted(self.ends, at, side="right"))
        while at < end:
            begin = int(self.ends[block - 1]) if block else 0
            until = min(int(self.ends[block]), end)
            first = int(self.starts[block]) + at - begin
            yield first, first + until - at
            at, block = until, block + 1
