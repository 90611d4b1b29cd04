"""Replay a compiled graph, one call per step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.core.threads import threads
from pyro_vae.train.compiled.backends import Compiled


@dataclass
class Replay:
    """A compiled function of captured tensors, inputs that change from step to step, and fixed inputs.

    Args:
        run: a function from the list of all these tensors to the loss.
        captured: parameters, buffers, optimizer state and constants.
        threads: the number of threads that it was compiled for.
    """

    run: Compiled
    captured: list[Tensor]
    threads: int = 1

    def once(self, inputs: Sequence[Tensor]) -> Tensor:
        """Call the function once with these inputs."""
        with threads(self.threads):
            return self.run([*self.captured, *inputs])

    def __call__(self, changing: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensor:
        """Take one step per row of the tensors in ``changing``; return the losses, shape ``(steps,)``."""
        rows = zip(*(tensor.unbind() for tensor in changing), strict=True)
        with threads(self.threads):
            return torch.stack([self.run([*self.captured, *row, *fixed]) for row in rows])
