"""Replay a compiled graph, one call per step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.core.threads import threads
from pyro_vae.train.compiled.backends import Compiled


@dataclass
class Replay:
    """A compiled function of (what it captured, what changes from step to step, what does not).

    Args:
        run: takes all of them in one list, and gives the loss.
        captured: parameters, buffers, state of the optimizer, constants.
        threads: how many it was compiled for.
    """

    run: Compiled
    captured: list[Tensor]
    threads: int = 1

    def once(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the function gives, of inputs that need no rows taken of them."""
        with threads(self.threads):
            return self.run([*self.captured, *inputs])

    def __call__(self, changing: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensor:
        """The losses of steps, shape ``(steps,)``: each tensor of ``changing`` has one row per step."""
        rows = zip(*(tensor.unbind() for tensor in changing), strict=True)
        with threads(self.threads):
            return torch.stack([self.run([*self.captured, *row, *fixed]) for row in rows])
