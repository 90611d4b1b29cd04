"""Rows of data with their context and mask, the inputs of model and guide."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortized


@dataclass(frozen=True)
class Rows:
    """Rows of data with their context and mask, the inputs of model and guide.

    Args:
        x: shape ``(datum, *features)``, 0 where missing.
        context: additional input of prior, decoder and encoder, shape ``(datum, c)``.
        mask: true where a feature was observed, same shape as ``x``.

    Example:
        >>> import torch
        >>> len(Rows(torch.zeros(3, 2)).arguments(30)), len(Rows(torch.zeros(3, 2), torch.zeros(3, 1)).arguments())
        (2, 3)
    """

    x: Tensor
    context: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def given(self) -> tuple[Tensor, ...]:
        """The context as a tuple, the last arguments of a component; empty if there is none."""
        return () if self.context is None else (self.context,)

    def arguments(self, size: int | None = None) -> tuple[Any, ...]:
        """Return ``(x, size, context, mask)``, the arguments of model and guide, without trailing None.

        They are positional, because Pyro's handlers have an argument named ``context`` themselves.
        """
        every = (self.x, size, self.context, self.mask)
        last = max(i for i, value in enumerate(every) if i < 2 or value is not None)
        return every[: last + 1]

    def take(self, index: Any) -> "Rows":
        """Return the rows at an index."""
        context, mask = (None if value is None else value[index] for value in (self.context, self.mask))
        return Rows(self.x[index], context, mask)

    def split(self, size: int) -> Iterator["Rows"]:
        """Split the rows into parts of at most ``size``."""
        return (self.take(slice(start, start + size)) for start in range(0, len(self), size))

    def like(self, vae: "Amortized") -> "Rows":
        """Move the rows to the device and precision of a VAE."""
        x = vae.like(self.x)
        context = None if self.context is None else vae.like(self.context)
        return Rows(x, context, None if self.mask is None else self.mask.to(x.device))
