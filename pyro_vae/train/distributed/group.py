"""``Group``: the processes that train one VAE together, and their collectives."""

import hashlib
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_vae.core.device import choose_device, derive_seed
from pyro_vae.errors import ProcessError, PyroVAEError, SettingsError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others before it fails."""


@dataclass(frozen=True)
class Group:
    """The processes that train one VAE; with a single process, collectives do nothing.

    Args:
        rank: the rank of this process, from 0; only the first writes and shows progress.
        ranks: the number of processes.

    Example:
        >>> Group().first, Group(1, 3).part(torch.arange(7))
        (True, tensor([3, 4]))
    """

    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.ranks == 1

    def part(self, index: Tensor) -> Tensor:
        """Return this process's rows of a global batch; the numbers of rows of processes differ by at most one."""
        return index if self.alone else index.tensor_split(self.ranks)[self.rank]

    def parts(self, order: Tensor, batch_size: int) -> tuple[Tensor, int]:
        """Return this process's rows of consecutive whole global batches, and its rows per batch.

        Example:
            >>> Group(1, 2).parts(torch.arange(8), 4)
            (tensor([2, 3, 6, 7]), 2)
        """
        if self.alone:
            return order, batch_size
        rows = order.view(-1, batch_size).tensor_split(self.ranks, 1)[self.rank]
        return rows.flatten(), rows.shape[1]

    def seed(self, seed: int, step: int = 0) -> int:
        """Derive the seed of this process's noise from a step on.

        Args:
            seed: the seed of the training.
            step: the number of steps taken before.

        Example:
            >>> len({Group(rank, 2).seed(seed, step) for rank in (0, 1) for seed in (7, 8) for step in (0, 100)})
            8
        """
        return derive_seed(seed, "noise of training", self.rank, step)

    def broadcast(self, value: Any) -> Any:
        """Broadcast the first process's value, any picklable object, to all."""
        if self.alone:
            return value
        objects = [value]
        with reraise_lost_peer():
            dist.broadcast_object_list(objects, src=0, device=_device())
        return objects[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Gather the value of each process, in the order of ranks, on all."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.ranks
        with reraise_lost_peer():
            dist.all_gather_object(found, value)
        return found

    @contextmanager
    def raise_together(self, kind: type[PyroVAEError]) -> Iterator[None]:
        """Raise an error of this kind on all processes if it occurs inside on any of them."""
        error: PyroVAEError | None = None
        try:
            yield
        except kind as met:
            error = met
        every = self.all_gather(str(error) if error else None)
        if error is not None:
            raise error
        if other := next((f"process {rank}: {one}" for rank, one in enumerate(every) if one is not None), None):
            raise kind(other)

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast tensors of the first process to all, in place."""
        if not self.alone:
            with torch.no_grad(), reraise_lost_peer():
                for tensor in tensors:
                    whole = tensor.detach().contiguous()
                    dist.broadcast(whole, src=0)
                    tensor.detach().copy_(whole)

    def validate_equal(self, tensors: dict[str, Tensor]) -> None:
        """Raise if tensors are not equal, bit for bit, on all processes.

        Args:
            tensors: name → tensor, such as a state dict.

        Raises:
            ProcessError: naming the first tensor that differs.
        """
        if self.alone:
            return
        every = self.all_gather({name: _digest(tensor) for name, tensor in tensors.items()})
        for rank, one in enumerate(every):
            if other := next((name for name, digest in one.items() if every[0].get(name) != digest), None):
                raise ProcessError(
                    f"{other} differs between process {rank} and process 0, which train the same VAE; buffers that a "
                    "module updates must not depend on its batch (use devices=1 otherwise)"
                )


ALONE = Group()


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=8).digest()


def _device() -> torch.device:
    """Return the device from which objects are sent: NCCL only sends from the GPU."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def reraise_lost_peer() -> Iterator[None]:
    """Raise a one-sentence error if a collective fails because a peer process died.

    Raises:
        ProcessError: if a collective fails.
    """
    try:
        yield
    except RuntimeError as error:  # includes DistBackendError; gloo raises a plain RuntimeError
        if any(sign in str(error) for sign in LOST) or isinstance(error, dist.DistError):
            lost = ", ".join(map(str, _lost_ranks())) or "another, on another machine,"
            raise LostPeerError(f"process {lost} of {len(_PEERS)} died; resume from the last checkpoint") from error
        raise


_PEERS: list[tuple[str, int]] = []
"""The host name and the process id of each rank, once the processes are connected."""


def _lost_ranks(seconds: float = 2.0) -> list[int]:
    """Return the ranks on this machine whose processes have died, as soon as there is one."""
    here, end = socket.gethostname(), time.monotonic() + seconds
    while True:
        gone = [rank for rank, (host, process) in enumerate(_PEERS) if host == here and not _lives(process)]
        if gone or time.monotonic() > end:
            return gone
        time.sleep(0.05)


def _lives(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no Linux
        return True


LOST = ("gloo", "Connection closed", "Connection reset", "NCCL", "Timed out", "timeout", "Broken pipe", "Socket")
"""Parts of torch's messages when a collective fails because of another process."""


class LostPeerError(ProcessError):
    """A peer process died; report its failure, not this one."""


def launched() -> bool:
    """Return whether torchrun, or a launcher with the same environment, started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ) and os.environ["WORLD_SIZE"] != "1"


def writes() -> bool:
    """Return whether this process writes results: the only one, or the first that torchrun started."""
    return not launched() or os.environ["RANK"] == "0"


def process_device(device: str | torch.device) -> torch.device:
    """Choose the device of this process: with several GPUs, the one of its local rank.

    Args:
        device: ``"auto"``, or an argument of ``torch.device``; an index is only used with a single process.

    Raises:
        SettingsError: if there are fewer GPUs than processes.
    """
    chosen = choose_device(device)
    if chosen.type != "cuda" or not launched():
        return chosen
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise SettingsError(
            f"there are {int(os.environ.get('LOCAL_WORLD_SIZE', local + 1))} processes on this machine but only "
            f"{there} GPUs; start at most one process per GPU, or use device='cpu'"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Join the process group of torchrun's environment, and leave it at the end; without one, stay alone.

    Args:
        device: the device of this process; GPUs communicate over NCCL, CPUs over gloo.

    Raises:
        ProcessError: if the other processes cannot be reached.

    Example:
        >>> with joined(torch.device("cpu")) as group:
        ...     group.ranks
        1
    """
    if not launched():
        yield ALONE
        return
    ours = not dist.is_initialized()
    if ours:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"process {os.environ['RANK']} cannot reach the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); check the address and the firewall"
            ) from error
    group = Group(dist.get_rank(), dist.get_world_size())
    try:
        _PEERS[:] = group.all_gather((socket.gethostname(), os.getpid()))
        yield group
    finally:
        if ours:
            dist.destroy_process_group()


def threads_per_process(processes: int) -> int:
    """Compute the number of threads of each process on this machine.

    Example:
        >>> threads_per_process(10**6)
        1
    """
    if (requested := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        return max(1, int(requested))
    return max(1, math.floor(available_cores() / processes))


def available_cores() -> int:
    """Return the number of cores that this process may use.

    Example:
        >>> available_cores() >= 1
        True
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
