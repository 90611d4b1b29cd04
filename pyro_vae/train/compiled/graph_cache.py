"""Cache compiled graphs by the shapes and values of their arguments."""

import linecache
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import CompileError
from pyro_vae.train.compiled.backends import Backend, compiled, threads_for, validate_results
from pyro_vae.train.compiled.cuda import CudaReplay
from pyro_vae.train.compiled.graph import trace
from pyro_vae.train.compiled.replay import Replay
from pyro_vae.train.distributed.group import ALONE, Group

MOST_GRAPHS = 16
"""The most shapes and values of arguments that are compiled; more indicate that the structure is not static."""


@contextmanager
def _forget_traces() -> Iterator[None]:
    """Delete what torch keeps of each trace for the life of the process: source texts and results of fake operators.

    Together they take 0.5 MiB per shape, and a compiled graph needs neither.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    sources: dict[str, str] = getattr(getattr(torch.fx.graph_module, "_loader", None), "eval_cache", {})
    results: dict[Any, Any] = getattr(FakeTensorMode, "cache", {})
    known = [{*cache} for cache in (sources, results)]
    try:
        yield
    finally:
        for cache, before in zip((sources, results), known, strict=True):
            for key in {*cache} - before:
                cache.pop(key, None)
        for name in [name for name in list(linecache.cache) if name.startswith("<eval_with_key>")]:
            linecache.cache.pop(name, None)


class Replays:
    """The cache of replays.

    Args:
        backend: the backend that compiles the graphs.
        group: the processes that compile together: if one fails, all fail.
    """

    def __init__(self, backend: Backend, group: Group = ALONE) -> None:
        self.backend, self.group = backend, group
        self._made: dict[Hashable, Replay] = {}

    def clear(self) -> None:
        """Empty the cache."""
        self._made.clear()

    def get(
        self,
        key: Hashable,
        function: Callable[..., Tensor],
        changing: Sequence[Tensor],
        fixed: Sequence[Tensor],
        restore: Callable[[], Any],
    ) -> Replay:
        """Return the replay of ``function`` for these inputs; compile it if ``key`` is new.

        Args:
            key: what the trace depends on, besides the shapes of the tensors.
            function: a function of one row of each tensor of ``changing``, followed by ``fixed``.
            changing: tensors with one row per step.
            fixed: tensors that are the same in each step.
            restore: restores the values that tracing replaced.
        """
        inputs = [*(tensor[0] for tensor in changing), *fixed]
        ambient = torch.get_num_threads(), *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        key = (key, ambient, *((t.shape, t.dtype, t.device) for t in inputs))
        if key not in self._made:
            if len(self._made) >= MOST_GRAPHS:
                raise CompileError(
                    f"{MOST_GRAPHS} graphs are compiled already, and the arguments have a new shape or value; "
                    "pass changing values as tensors of a fixed shape"
                )
            with self.group.raise_together(CompileError), _forget_traces():
                try:
                    graph = trace(function, inputs)
                finally:
                    restore()
                run = compiled(graph, inputs, self.backend)
            if self.backend != "eager":
                with self.group.raise_together(CompileError):
                    validate_results(graph, run, inputs)
            kind = CudaReplay if any(t.is_cuda for t in (*graph.captured, *inputs)) else Replay
            self._made[key] = kind(run, graph.captured, threads_for(graph))
        return self._made[key]
