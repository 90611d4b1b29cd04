"""From a graph to something that runs fast, and seeing that it does the same."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from pyro_vae.core.threads import threads, threads_for_operations
from pyro_vae.errors import CompileError
from pyro_vae.train.compiled.graph import Graph
from pyro_vae.train.compiled.rewrites import cheaper_products

Compiled: TypeAlias = Callable[[list[Tensor]], Tensor]
Backend: TypeAlias = str | Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]

INDUCTOR = {
    # The same numbers as without compiling, in the same order: torch's own generators, kernels in the graph's order.
    "fallback_random": True,
    "reorder_for_peak_memory": False,
    # Compile here, without worker processes that outlive the call.
    "compile_threads": 1,
}
ON_CPU = {
    # The whole graph in C++, where Python would call each kernel: half the time of a small step.
    "cpp_wrapper": True,
    # Made once for all programs, but in longer than they save in one.
    "cpp_cache_precompile_headers": False,
    # The processor's vectors are those that it names; trying each with a program of its own takes seconds.
    "cpp.vec_isa_ok": True,
}


def threads_for(graph: Graph) -> int:
    """How many threads a graph is compiled for, and run by: one, or as many as torch is set to."""
    return threads_for_operations(graph.flops())


def compiled(graph: Graph, inputs: Sequence[Tensor], backend: Backend) -> Compiled:
    """``graph`` by a backend, as a function of one list: what the graph captured, and its inputs.

    Args:
        graph: the graph, which changes what it captured.
        inputs: examples of its inputs.
        backend: a name that ``torch.compile`` knows, or a function as it takes.

    Raises:
        CompileError: if it cannot be compiled.
    """
    examples = [*graph.captured, *inputs]
    with torch.no_grad(), threads(threads_for(graph)):
        try:
            with _quietly():
                return _by(backend, graph.module, examples)
        except Exception as error:
            what = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise CompileError(f"the backend {backend} cannot compile the step: {what}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the compiler's warnings, which are about itself."""
    log = logging.getLogger("torch._inductor")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _by(backend: Backend, module: fx.GraphModule, examples: list[Tensor]) -> Compiled:
    if backend == "inductor":
        from torch import _inductor as inductor

        on_cpu = all(example.device.type == "cpu" for example in examples)
        module = cheaper_products(module) if on_cpu else module
        known = set(inductor.list_options())
        options = {k: v for k, v in (INDUCTOR | (ON_CPU if on_cpu else {})).items() if k in known}
        whole = inductor.compile(module, list(examples), options=options)
    elif isinstance(backend, str):
        import torch._dynamo

        whole = torch._dynamo.lookup_backend(backend)(module, examples)
    else:
        whole = backend(module, examples)

    def run(inputs: list[Tensor]) -> Tensor:
        return whole(*inputs)[0]

    return run


def refuse_other_results(graph: Graph, run: Compiled, inputs: Sequence[Tensor]) -> None:
    """One step from the same state and with the same noise, compiled and as the graph says; the state stays.

    What it guards against, above all, is noise drawn in another order.

    Args:
        graph: the graph.
        run: it, compiled.
        inputs: examples of its inputs.

    Raises:
        CompileError: if what comes out is not what the graph says.
    """
    examples = [*graph.captured, *inputs]
    devices = list({tensor.device for tensor in examples if tensor.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices), threads(threads_for(graph)):
        _compare(graph, run, examples, devices)


def _compare(graph: Graph, run: Compiled, examples: list[Tensor], devices: list[torch.device]) -> None:
    before = [tensor.detach().clone() for tensor in graph.captured]
    results = []
    for step in (lambda inputs: graph.module(*inputs)[0]), run:
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(0)
        loss = step(examples)
        results.append([loss.detach().clone(), *(tensor.detach().clone() for tensor in graph.captured)])
        for tensor, value in zip(graph.captured, before, strict=True):
            if not torch.equal(tensor, value):
                tensor.detach().copy_(value)
    pairs = [pair for pair in zip(*results, strict=True) if pair[0].is_floating_point()]
    scale = sum(float(said.double().norm()) for said, _ in pairs)
    if not all(_close(said, found, scale) for said, found in pairs):
        raise CompileError("the compiled step gives other numbers than the traced one; train uncompiled")


def _close(said: Tensor, found: Tensor, scale: float) -> bool:
    """Up to rounding, of a tensor as a whole; what is nothing but rounding beside ``scale`` may be anything."""
    if not bool(said.isfinite().all()):
        return bool((said.isfinite() == found.isfinite()).all())
    coarse = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    precise = said.dtype in (torch.float32, torch.float64) and not coarse
    bound = (1e-2 if precise else 0.2) * said.double().norm() + 100 * torch.finfo(said.dtype).eps * scale
    return bool((said.double() - found.double()).norm() <= bound)
