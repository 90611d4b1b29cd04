"""Compile a traced graph with a backend, and verify that the results agree."""

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
    # Draw the same random numbers as without compiling: torch's generators, kernels in the graph's order.
    "fallback_random": True,
    "reorder_for_peak_memory": False,
    # Compile in this process: worker processes would outlive the call.
    "compile_threads": 1,
}
ON_CPU = {
    # Run the whole graph in C++, without a Python call per kernel: half the time of a small step.
    "cpp_wrapper": True,
    # Precompiling the headers takes longer than it saves.
    "cpp_cache_precompile_headers": False,
    # Trust the vector instructions that the CPU reports; testing each with a program takes seconds.
    "cpp.vec_isa_ok": True,
}


def threads_for(graph: Graph) -> int:
    """Return the number of threads to compile and run a graph with: one, or torch's setting."""
    return threads_for_operations(graph.flops())


def compiled(graph: Graph, inputs: Sequence[Tensor], backend: Backend) -> Compiled:
    """Compile a graph with a backend, as a function of one list: captured tensors and inputs.

    Args:
        graph: the graph, which may change its captured tensors.
        inputs: example inputs.
        backend: a name or a function, as for ``torch.compile``.

    Raises:
        CompileError: if the graph cannot be compiled.
    """
    examples = [*graph.captured, *inputs]
    with torch.no_grad(), threads(threads_for(graph)):
        try:
            with _silence_compiler():
                return _compile(backend, graph.module, examples)
        except Exception as error:
            what = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise CompileError(f"the backend {backend} cannot compile the step: {what}") from error


@contextlib.contextmanager
def _silence_compiler() -> Iterator[None]:
    """Silence the compiler's warnings about its own internals."""
    log = logging.getLogger("torch._inductor")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _compile(backend: Backend, module: fx.GraphModule, examples: list[Tensor]) -> Compiled:
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


def validate_results(graph: Graph, run: Compiled, inputs: Sequence[Tensor]) -> None:
    """Raise if a compiled step and its graph differ, from the same state and noise; restore the state.

    The main danger is noise drawn in another order.

    Args:
        graph: the graph.
        run: the compiled graph.
        inputs: example inputs.

    Raises:
        CompileError: if the results differ.
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
    scale = sum(float(expected.double().norm()) for expected, _ in pairs)
    if not all(_close(expected, actual, scale) for expected, actual in pairs):
        raise CompileError("the compiled step and the traced step give different numbers; train without compiling")


def _close(expected: Tensor, actual: Tensor, scale: float) -> bool:
    """Return whether two tensors agree in norm up to rounding, relative to their norm or to ``scale``."""
    if not bool(expected.isfinite().all()):
        return bool((expected.isfinite() == actual.isfinite()).all())
    coarse = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    precise = expected.dtype in (torch.float32, torch.float64) and not coarse
    bound = (1e-2 if precise else 0.2) * expected.double().norm() + 100 * torch.finfo(expected.dtype).eps * scale
    return bool((expected.double() - actual.double()).norm() <= bound)
