"""Rows of data, as model and guide take them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortised


@dataclass(frozen=True)
class Rows:
    """Data as model and guide take them.

    Args:
        x: shape ``(datum, *features)``, 0 where missing.
        context: what prior, decoder and encoder are given besides, shape ``(datum, c)``.
        mask: true where a feature was observed, the shape of ``x``.

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
        """The context as the last argument of a part, where there is one."""
        return () if self.context is None else (self.context,)

    def arguments(self, size: int | None = None) -> tuple[Any, ...]:
        """``(x, size, context, mask)``, the arguments of model and guide, as far as there are any.

        They go by position: Pyro's handlers have an argument of their own that is called ``context``.
        """
        every = (self.x, size, self.context, self.mask)
        last = max(i for i, value in enumerate(every) if i < 2 or value is not None)
        return every[: last + 1]

    def take(self, index: Any) -> "Rows":
        """Some of the rows."""
        context, mask = (None if value is None else value[index] for value in (self.context, self.mask))
        return Rows(self.x[index], context, mask)

    def split(self, size: int) -> Iterator["Rows"]:
        """The rows in parts of at most ``size``."""
        return (self.take(slice(start, start + size)) for start in range(0, len(self), size))

    def like(self, vae: "Amortised") -> "Rows":
        """On the device and in the precision of a VAE."""
        x = vae.like(self.x)
        context = None if self.context is None else vae.like(self.context)
        return Rows(x, context, None if self.mask is None else self.mask.to(x.device))
