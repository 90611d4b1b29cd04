"""A function of tensors as a graph: traced at dispatch, below Pyro's handlers, with all it captures as inputs."""

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.util
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyro_vae.errors import CompileError, PyroVAEError


@dataclass(frozen=True)
class Graph:
    """A traced function.

    Args:
        module: called with ``captured`` and then the function's own inputs, it gives what the function gave, in a tuple.
        captured: the tensors that the function used besides its inputs: parameters, buffers, the state of
            an optimizer, constants. They are inputs of the graph, so none is baked in, and it may change them.
    """

    module: fx.GraphModule
    captured: list[Tensor]


def trace(function: Callable[..., Any], inputs: list[Tensor]) -> Graph:
    """Trace ``function(*inputs)`` to a graph without computing anything; twice, to see that it is the same.

    Raises:
        CompileError: if it cannot be traced, or what it does depends on more than its tensors' shapes.
    """
    first, second = _trace_once(function, inputs), _trace_once(function, inputs)
    pairs = zip(first.captured, second.captured, strict=False)
    if first.module.code != second.module.code or not all(_same(*pair) for pair in pairs):
        raise CompileError(
            "the model or guide does something else each time it runs, so no compiled step stands for it"
        )
    return first


def _same(first: Tensor, second: Tensor) -> bool:
    """The same tensor, or two constants of one value."""
    return first is second or (first.shape == second.shape and bool(((first == second) | first.isnan()).all()))


def _trace_once(function: Callable[..., Any], inputs: list[Tensor]) -> Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    # A fake tensor has a shape and no numbers: nothing is computed, drawn or changed.
    tracer = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
    try:
        with pyro.validation_enabled(False), _numbers_stay_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = tracer(*inputs)
    except PyroVAEError:
        raise
    except Exception as error:
        raise CompileError(_why(error)) from error
    return _lifted(module)


class _ItemsAreTensors(TorchFunctionMode):
    """Gives ``x.item()`` as a tensor without a graph: a number of the trace would be the same at every step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _numbers_stay_tensors() -> Iterator[None]:
    """Without what Pyro's estimators do with numbers: ``.item()``, and asking whether one is NaN."""
    ask = pyro.util.torch_isnan
    pyro.util.torch_isnan = lambda x: False
    try:
        with _ItemsAreTensors():
            yield
    finally:
        pyro.util.torch_isnan = ask


def _lifted(module: fx.GraphModule) -> Graph:
    """The graph with an input in the place of each tensor that it captured, those before its own."""
    graph, placeholders, captured = module.graph, {}, []
    first = next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(module, node.target)
        if not isinstance(tensor, Tensor):
            raise CompileError(f"the step holds a {type(tensor).__name__}, an operator that is not traced through")
        if id(tensor) not in placeholders:
            with graph.inserting_before(first):
                placeholders[id(tensor)] = graph.placeholder(f"captured_{len(captured)}")
            placeholders[id(tensor)].meta = dict(node.meta)
            captured.append(tensor)
        node.replace_all_uses_with(placeholders[id(tensor)])
        graph.erase_node(node)
    result = next(node for node in graph.nodes if node.op == "output")
    result.args = ((result.args[0],),)  # backends expect a tuple
    graph.lint()
    return Graph(fx.GraphModule({}, graph), captured)


def _why(error: Exception) -> str:
    """One sentence on what could not be traced, and where in the user's code."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    if isinstance(error, DataDependentOutputException):
        what = "Python reads a value of a tensor there (as bool(), float() or int() do)"
    elif isinstance(error, DynamicOutputShapeException):
        what = f"the shape of what {error.func} gives depends on values there"
    else:
        what = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"the step cannot be traced at {_place(error)}: {what}"


def _place(error: Exception) -> str:
    """The innermost line that belongs neither to torch, Pyro nor this engine."""
    others = [Path(module.__file__ or "").parent for module in (torch, pyro)] + [Path(__file__).parent]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in others)]
    chosen = (own or list(frames))[-1]
    return f"{Path(chosen.filename).name}:{chosen.lineno}"
