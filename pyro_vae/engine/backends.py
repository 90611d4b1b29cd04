"""From a graph to something that runs fast, and seeing that it does the same."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from pyro_vae.engine.graph import Graph
from pyro_vae.errors import CompileError

Compiled: TypeAlias = Callable[[list[Tensor]], Tensor]
Backend: TypeAlias = str | Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]

INDUCTOR = {
    # The same numbers as without compiling, in the same order: torch's own generators, kernels in the graph's order.
    "fallback_random": True,
    "reorder_for_peak_memory": False,
    # Compile here, without worker processes that outlive the call.
    "compile_threads": 1,
}
ON_CPU = {"cpp_wrapper": True}


def compiled(graph: Graph, inputs: Sequence[Tensor], backend: Backend) -> Compiled:
    """``graph`` by a backend, as a function of one list: what the graph captured, and its inputs.

    Args:
        graph: the graph, which changes what it captured.
        inputs: examples of its inputs.
        backend: a name that ``torch.compile`` knows, or a function as it takes.

    Raises:
        CompileError: if it cannot be compiled, or what comes out is not what the graph says.
    """
    examples = [*graph.captured, *inputs]
    with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(examples)):
        try:
            run = _by(backend, graph.module, examples)
        except Exception as error:
            what = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise CompileError(f"the backend {backend} cannot compile the step: {what}") from error
        if not isinstance(backend, str) or backend != "eager":
            _refuse_other_results(graph, run, examples)
    return run


def _by(backend: Backend, module: fx.GraphModule, examples: list[Tensor]) -> Compiled:
    if backend == "inductor":
        on_cpu = all(example.device.type == "cpu" for example in examples)
        whole = torch._inductor.compile(module, examples, options=INDUCTOR | (ON_CPU if on_cpu else {}))
    elif isinstance(backend, str):
        whole = torch._dynamo.lookup_backend(backend)(module, examples)
    else:
        whole = backend(module, examples)

    def run(inputs: list[Tensor]) -> Tensor:
        return whole(*inputs)[0]

    return run


def _refuse_other_results(graph: Graph, run: Compiled, examples: list[Tensor]) -> None:
    """One step from the same state and with the same noise, compiled and as the graph says; the state stays.

    What it guards against, above all, is noise drawn in another order.
    """
    before = [tensor.detach().clone() for tensor in graph.captured]
    seed, results = torch.initial_seed(), []
    for step in (lambda inputs: graph.module(*inputs)[0]), run:
        torch.manual_seed(seed)
        loss = step(examples)
        results.append([loss.detach().clone(), *(tensor.detach().clone() for tensor in graph.captured)])
        for tensor, value in zip(graph.captured, before, strict=True):
            if not torch.equal(tensor, value):
                tensor.detach().copy_(value)
    for said, found in zip(*results, strict=True):
        if said.is_floating_point() and not _close(said, found):
            raise CompileError("the compiled step gives other numbers than the traced one; train uncompiled")


def _close(first: Tensor, second: Tensor) -> bool:
    """Up to rounding, as a whole: single elements may be all rounding."""
    coarse = 1e-2 if first.dtype in (torch.float32, torch.float64) else 0.2
    if not bool(first.isfinite().all()):
        return bool((first.isfinite() == second.isfinite()).all())
    return bool((first - second).norm() <= coarse * first.norm() + 1e-30)


def _cuda_devices(tensors: Sequence[Tensor]) -> list[torch.device]:
    return list({tensor.device for tensor in tensors if tensor.is_cuda})
