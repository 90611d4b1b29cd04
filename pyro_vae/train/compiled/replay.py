"""Graphs kept and replayed."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import CompileError
from pyro_vae.train.compiled.backends import Backend, Compiled, compiled, refuse_other_results, threads, threads_for
from pyro_vae.train.compiled.graph import trace
from pyro_vae.train.distributed.group import ALONE, Group

MOST_GRAPHS = 16
"""So many shapes and values of arguments are compiled; more are not static structure."""


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


class Replays:
    """The replays made so far, by what they hold for.

    Args:
        backend: what compiles them.
        group: the processes that make them together: what one cannot compile, none does.
    """

    def __init__(self, backend: Backend, group: Group = ALONE) -> None:
        self.backend, self.group = backend, group
        self._made: dict[Hashable, Replay] = {}

    def clear(self) -> None:
        """Forget all of them."""
        self._made.clear()

    def get(
        self,
        key: Hashable,
        function: Callable[..., Tensor],
        changing: Sequence[Tensor],
        fixed: Sequence[Tensor],
        restore: Callable[[], Any],
    ) -> Replay:
        """The replay of ``function`` for these inputs, made where there is none for ``key``.

        Args:
            key: what the trace depends on besides the tensors' shapes.
            function: takes one row of each tensor of ``changing``, and then ``fixed``.
            changing: one row per step.
            fixed: the same in each step.
            restore: puts back what tracing moves.
        """
        inputs = [*(tensor[0] for tensor in changing), *fixed]
        ambient = torch.get_num_threads(), *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        key = (key, ambient, *((t.shape, t.dtype, t.device) for t in inputs))
        if key not in self._made:
            if len(self._made) >= MOST_GRAPHS:
                raise CompileError(
                    f"{MOST_GRAPHS} graphs are compiled already, and the arguments are of a new shape or value; "
                    "hand over what changes as a tensor of one shape"
                )
            with self.group.alike(CompileError):
                try:
                    graph = trace(function, inputs)
                finally:
                    restore()
                run = compiled(graph, inputs, self.backend)
            if self.backend != "eager":
                with self.group.alike(CompileError):
                    refuse_other_results(graph, run, inputs)
            kind = _cuda_replay() if any(t.is_cuda for t in (*graph.captured, *inputs)) else Replay
            self._made[key] = kind(run, graph.captured, threads_for(graph))
        return self._made[key]


def _cuda_replay() -> type[Replay]:
    from pyro_vae.train.compiled.cuda import CudaReplay

    return CudaReplay
