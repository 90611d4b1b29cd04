"""Keep compiled graphs by the shapes and values that they hold for."""

import linecache
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import CompileError
from pyro_vae.train.compiled.backends import Backend, compiled, refuse_other_results, threads_for
from pyro_vae.train.compiled.cuda import CudaReplay
from pyro_vae.train.compiled.graph import trace
from pyro_vae.train.compiled.replay import Replay
from pyro_vae.train.distributed.group import ALONE, Group

MOST_GRAPHS = 16
"""So many shapes and values of arguments are compiled; more are not static structure."""


@contextmanager
def _forgotten_sources() -> Iterator[None]:
    """Drop the source texts that torch.fx keeps of each graph for tracebacks, 0.1 MiB a shape and more each time."""
    kept: dict[str, str] = getattr(getattr(torch.fx.graph_module, "_loader", None), "eval_cache", {})
    before = {*kept}
    try:
        yield
    finally:
        for name in {*kept} - before:
            kept.pop(name, None)
            linecache.cache.pop(name, None)


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
            with self.group.alike(CompileError), _forgotten_sources():
                try:
                    graph = trace(function, inputs)
                finally:
                    restore()
                run = compiled(graph, inputs, self.backend)
            if self.backend != "eager":
                with self.group.alike(CompileError):
                    refuse_other_results(graph, run, inputs)
            kind = CudaReplay if any(t.is_cuda for t in (*graph.captured, *inputs)) else Replay
            self._made[key] = kind(run, graph.captured, threads_for(graph))
        return self._made[key]
