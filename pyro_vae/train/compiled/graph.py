"""Trace a function of tensors to a graph, below Pyro's handlers, with captured tensors as inputs."""

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
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.errors import CompileError, PyroVAEError, type_of


@dataclass(frozen=True)
class Graph:
    """A traced function.

    Args:
        module: called with ``captured`` and then the function's inputs; returns a tuple of the function's result.
        captured: the tensors that the function uses besides its inputs: parameters, buffers, optimizer state and
            constants. They are inputs of the graph, not constants in it, and the graph may change them.
    """

    module: fx.GraphModule
    captured: list[Tensor]

    def flops(self) -> int:
        """Count the floating-point operations of matrix products and convolutions, two per multiply-add."""
        from torch.utils.flop_counter import flop_registry

        def value(argument: Any) -> Any:
            return argument.meta["val"] if isinstance(argument, fx.Node) else argument

        total = 0
        for node in self.module.graph.nodes:
            count = flop_registry.get(getattr(node.target, "overloadpacket", None))
            if count is not None:
                args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value)
                total += count(*args, **kwargs, out_val=node.meta["val"])
        return total


def trace(function: Callable[..., Any], inputs: list[Tensor]) -> Graph:
    """Trace ``function(*inputs)`` to a graph without computing; trace twice to verify that it is static.

    Raises:
        CompileError: if the function cannot be traced, or depends on more than the shapes of its tensors.
    """
    first, second = _trace_once(function, inputs), _trace_once(function, inputs)
    pairs = zip(first.captured, second.captured, strict=False)
    if first.module.code != second.module.code or not all(_same(*pair) for pair in pairs):
        raise CompileError(
            "the model or guide does not have a static structure: two traces differ, so its step cannot be compiled"
        )
    return first


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two captured tensors are the same tensor, or constants of the same value."""
    return first is second or (first.shape == second.shape and bool(((first == second) | first.isnan()).all()))


def _trace_once(function: Callable[..., Any], inputs: list[Tensor]) -> Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    captures = _Captures()

    def captured(*tensors: Tensor) -> Any:
        with captures:
            return function(*tensors)

    # Fake tensors have shapes but no values: tracing computes, draws and changes nothing.
    tracer = make_fx(captured, tracing_mode="fake", _allow_non_fake_inputs=True)
    try:
        with pyro.validation_enabled(False), _keep_numbers_as_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = tracer(*inputs)
    except PyroVAEError:
        raise
    except Exception as error:
        raise CompileError(_why(error)) from error
    return _lift_captures(module, captures.real)


class _Captures(TorchDispatchMode):
    """Replace each captured tensor by a fake one; small real tensors would be computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.real: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._guards import detect_fake_mode

        if func is not torch.ops.aten.lift_fresh.default:  # its arguments are new constants
            mode = detect_fake_mode()
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: self._fake(t, mode), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _fake(self, tensor: Tensor, mode: Any) -> Tensor:
        from torch._subclasses import FakeTensor
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        if isinstance(tensor, FakeTensor):
            return tensor
        with disable_proxy_modes_tracing():  # making the fake of a view is not part of the step
            fake: Tensor = mode.from_tensor(tensor)
        self.real[id(fake)] = tensor, fake
        return fake


class _ItemsAreTensors(TorchFunctionMode):
    """Return ``x.item()`` as a detached tensor: a number would be a constant of the trace."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item:
            return args[0].detach()
        if func is torch._is_all_true:  # read by distributions that validate their arguments
            return True
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _keep_numbers_as_tensors() -> Iterator[None]:
    """Disable what Pyro's estimators do with Python numbers: ``.item()`` and checks for NaN."""
    isnan = pyro.util.torch_isnan
    pyro.util.torch_isnan = lambda x: False
    try:
        with _ItemsAreTensors():
            yield
    finally:
        pyro.util.torch_isnan = isnan


def _lift_captures(module: fx.GraphModule, real: dict[int, tuple[Tensor, Tensor]]) -> Graph:
    """Turn captured tensors into inputs of the graph, before its own inputs."""
    from torch._subclasses import FakeTensor

    graph = module.graph
    placeholders: dict[int, fx.Node] = {}
    captured: list[Tensor] = []
    first = next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(module, node.target)
        if not isinstance(tensor, Tensor):
            raise CompileError(f"the step contains {type_of(tensor)}, an operator that cannot be traced")
        if id(tensor) in real:
            tensor = real[id(tensor)][0]
        elif isinstance(tensor, FakeTensor):
            raise CompileError("the step uses a Python reference to a tensor of an earlier step; make it a buffer")
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
    """Say in one sentence what could not be traced, and where in the user's code."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if isinstance(error, (DataDependentOutputException, GuardOnDataDependentSymNode)):
        what = "Python reads the value of a tensor (with bool(), float() or int(), for example)"
    elif isinstance(error, DynamicOutputShapeException):
        what = f"the shape of the result of {error.func} depends on values"
    else:
        what = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"the step cannot be traced at {_place(error)}: {what}"


def _place(error: Exception) -> str:
    """Find the innermost line outside torch, Pyro and this engine; else the innermost line of Pyro."""
    torchs, pyros, here = (Path(part).parent for part in (torch.__file__, pyro.__file__, __file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    outer = [f for f in frames if not Path(f.filename).is_relative_to(torchs)]
    users = [f for f in outer if not any(Path(f.filename).is_relative_to(folder) for folder in (pyros, here))]
    chosen = (users or [f for f in outer if Path(f.filename).is_relative_to(pyros)] or frames)[-1]
    return f"{Path(chosen.filename).name}:{chosen.lineno}"
