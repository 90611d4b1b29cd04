"""Capture steps as CUDA graphs, and stream data that do not fit in GPU memory."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyro_vae.errors import UncapturedStepWarning
from pyro_vae.train.compiled.backends import Compiled
from pyro_vae.train.compiled.feed import Feed
from pyro_vae.train.compiled.replay import Replay

WARM_UPS = 3
"""The steps before capturing, in which libraries allocate what they may not allocate during a capture."""

SHARE = 0.5
"""The fraction of free GPU memory that data may take; larger data are streamed."""


class CudaReplay(Replay):
    """A replay that launches all kernels of several steps at once.

    A CUDA graph uses the memory addresses of its capture: inputs that change from step to step are copied to fixed
    buffers first, and a graph is captured again if another tensor has moved. A step that cannot be captured is
    launched kernel by kernel, after a warning.
    """

    def __init__(self, run: Compiled, captured: list[Tensor], threads: int = 1) -> None:
        super().__init__(run, captured, threads)
        self._taken, self._captures = 0, True
        self._graphs: dict[int, _Captured] = {}

    def __call__(self, changing: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensor:
        steps = len(changing[0])
        if self._taken < WARM_UPS or not self._captures:
            self._taken += steps
            return self.uncaptured(changing, fixed)
        places = [tensor.data_ptr() for tensor in (*self.captured, *fixed)]
        if steps not in self._graphs or self._graphs[steps].places != places:
            try:
                self._graphs[steps] = _Captured(self, changing, fixed, places)
            except RuntimeError as error:
                self._stop_capturing(error)
                return self.uncaptured(changing, fixed)
        return self._graphs[steps](changing)

    def _stop_capturing(self, error: RuntimeError) -> None:
        """Stop capturing, and warn; a failed capture has computed nothing."""
        self._captures = False
        self._graphs.clear()
        first = error.__context__ or error  # ending the failed capture raises too
        why = str(first).splitlines()[0].rstrip(".")
        warnings.warn(
            f"the training step cannot be captured as a CUDA graph, so its kernels are launched separately: {why}",
            UncapturedStepWarning,
            stacklevel=2,
        )

    def uncaptured(self, changing: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensor:
        """Take the steps kernel by kernel."""
        return super().__call__(changing, fixed)


class _Captured:
    """A CUDA graph of some steps, and the tensors that it reads and writes."""

    def __init__(
        self, replay: CudaReplay, changing: Sequence[Tensor], fixed: Sequence[Tensor], places: list[int]
    ) -> None:
        # Scalars in main memory are constants, which a graph may contain.
        if any(tensor.numel() > 1 and not tensor.is_cuda for tensor in (*replay.captured, *changing, *fixed)):
            raise RuntimeError("it uses a tensor in main memory; move the tensor to the GPU")
        self.places, self.changing = places, [tensor.clone() for tensor in changing]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with _restore_after_failure(), torch.cuda.graph(self.graph):
            self.losses = replay.uncaptured(self.changing, fixed)

    def __call__(self, changing: Sequence[Tensor]) -> Tensor:
        for place, tensor in zip(self.changing, changing, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.losses.clone()


@contextlib.contextmanager
def _restore_after_failure() -> Iterator[None]:
    """Restore the stream and the state of the generator after a failed capture."""
    stream, generator = torch.cuda.current_stream(), torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.get_state()
    try:
        yield
    except RuntimeError:
        torch.cuda.set_stream(stream)
        fresh = torch.Generator(generator.device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise


def fits(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether data fit in the memory of a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return sum(t.numel() * t.element_size() for t in tensors if t.device != device) < SHARE * free


def streamed(tensors: Sequence[Tensor], device: torch.device) -> Feed:
    """Make a feed of data in main memory, copied to a GPU in chunks of rows."""
    return _Streamed(tensors, device)


class _Streamed(Feed):
    """Gather rows into pinned memory, copy them on a second stream, and place them in the buffers of the graphs."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.tensors, self.device = [tensor.detach().cpu() for tensor in tensors], device
        self._places: dict[torch.Size, tuple[Tensor, list[Tensor]]] = {}
        self._beside = torch.cuda.Stream(device)

    def chunk(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        flat = rows.flatten().cpu()
        if rows.shape not in self._places:
            index = torch.arange(flat.numel(), device=self.device).view(rows.shape)
            empty = [torch.empty(len(flat), *t.shape[1:], dtype=t.dtype, device=self.device) for t in self.tensors]
            self._places[rows.shape] = index, empty
        index, places = self._places[rows.shape]
        with torch.cuda.stream(self._beside):
            arrived = [t[flat].pin_memory().to(self.device, non_blocking=True) for t in self.tensors]
        torch.cuda.current_stream(self.device).wait_stream(self._beside)
        for place, tensor in zip(places, arrived, strict=True):
            tensor.record_stream(torch.cuda.current_stream(self.device))
            place.copy_(tensor)
        return index, places


def feed_of(tensors: Sequence[Tensor], device: torch.device) -> Feed:
    """Make a feed of data on a device, or streamed to it if they do not fit."""
    if device.type != "cuda":
        return Feed(tensors, device)
    return Feed(tensors, device) if fits(tensors, device) else streamed(tensors, device)
