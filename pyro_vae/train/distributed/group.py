"""The processes that train one VAE together, and what they tell each other."""

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
"""So long a process waits for the others before it gives them up."""


@dataclass(frozen=True)
class Group:
    """The processes that train one VAE; alone, a process has nobody to tell anything.

    Args:
        rank: which of them this is, from 0; the first alone writes and shows progress.
        ranks: how many they are.

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
        """Whether there is no other."""
        return self.ranks == 1

    def part(self, index: Tensor) -> Tensor:
        """Of the rows of a global batch those of this process: as many as of any other, or one more or less."""
        return index if self.alone else index.tensor_split(self.ranks)[self.rank]

    def parts(self, order: Tensor, batch_size: int) -> tuple[Tensor, int]:
        """Of whole global batches, one after the other, the rows of this process, and how many of each.

        Example:
            >>> Group(1, 2).parts(torch.arange(8), 4)
            (tensor([2, 3, 6, 7]), 2)
        """
        if self.alone:
            return order, batch_size
        own = order.view(-1, batch_size).tensor_split(self.ranks, 1)[self.rank]
        return own.flatten(), own.shape[1]

    def seed(self, seed: int, step: int = 0) -> int:
        """Derive the seed of the noise that this process draws from a step on.

        Args:
            seed: of the training.
            step: the steps taken before.

        Example:
            >>> len({Group(rank, 2).seed(seed, step) for rank in (0, 1) for seed in (7, 8) for step in (0, 100)})
            8
        """
        return derive_seed(seed, "noise of training", self.rank, step)

    def agreed(self, value: Any) -> Any:
        """What the first process has, on all of them: numbers, sentences, nested as they like."""
        if self.alone:
            return value
        held = [value]
        with told_if_lost():
            dist.broadcast_object_list(held, src=0, device=_device())
        return held[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks, on all of them."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.ranks
        with told_if_lost():
            dist.all_gather_object(found, value)
        return found

    @contextmanager
    def alike(self, kind: type[PyroVAEError]) -> Iterator[None]:
        """An error of this kind that one process meets inside is raised on all of them."""
        error: PyroVAEError | None = None
        try:
            yield
        except kind as met:
            error = met
        every = self.gathered(str(error) if error else None)
        if error is not None:
            raise error
        if other := next((f"process {rank}: {one}" for rank, one in enumerate(every) if one is not None), None):
            raise kind(other)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values that tensors have on the first, in place."""
        if not self.alone:
            with torch.no_grad(), told_if_lost():
                for tensor in tensors:
                    whole = tensor.detach().contiguous()
                    dist.broadcast(whole, src=0)
                    tensor.detach().copy_(whole)

    def refuse_apart(self, tensors: dict[str, Tensor]) -> None:
        """Refuse tensors that are not the same to the bit on all processes.

        Args:
            tensors: name → tensor, as a state dict has them.

        Raises:
            ProcessError: naming the first that is another.
        """
        if self.alone:
            return
        every = self.gathered({name: _digest(tensor) for name, tensor in tensors.items()})
        for rank, one in enumerate(every):
            if other := next((name for name, digest in one.items() if every[0].get(name) != digest), None):
                raise ProcessError(
                    f"{other} is not the same on process {rank} as on process 0, though all of them train one VAE; "
                    "what a module changes by itself while it trains must not depend on its batch (devices=1 allows it)"
                )


ALONE = Group()


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=8).digest()


def _device() -> torch.device:
    """Where objects are sent from: NCCL sends what is on the GPU only."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def told_if_lost() -> Iterator[None]:
    """A process that is gone is told of in a sentence.

    Raises:
        ProcessError: where a collective fails.
    """
    try:
        yield
    except RuntimeError as error:  # DistBackendError is one; gloo raises it bare
        if any(sign in str(error) for sign in LOST) or isinstance(error, dist.DistError):
            gone = ", ".join(map(str, _lost_ranks())) or "another, on another machine,"
            raise LostError(f"process {gone} of {len(_PEERS)} is gone; go on from the last checkpoint") from error
        raise


_PEERS: list[tuple[str, int]] = []
"""Of each rank its machine and the id of its process, once the processes have met."""


def _lost_ranks(seconds: float = 2.0) -> list[int]:
    """The ranks on this machine whose processes are gone, as soon as there is one."""
    here, end = socket.gethostname(), time.monotonic() + seconds
    while True:
        gone = [rank for rank, (host, process) in enumerate(_PEERS) if host == here and not _lives(process)]
        if gone or time.monotonic() > end:
            return gone
        time.sleep(0.05)


def _lives(process: int) -> bool:
    """Whether a process is there and is more than what its parent has not noticed yet."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no Linux
        return True


LOST = ("gloo", "Connection closed", "Connection reset", "NCCL", "Timed out", "timeout", "Broken pipe", "Socket")
"""What torch's messages hold where a collective fails because of another process."""


class LostError(ProcessError):
    """Another process is gone: the one that is to be told of is that."""


def launched() -> bool:
    """Whether torchrun, or what sets the same environment, has started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ) and os.environ["WORLD_SIZE"] != "1"


def writes() -> bool:
    """Whether this process is the one that writes results: the first of those that torchrun has started."""
    return not launched() or os.environ["RANK"] == "0"


def own_device(device: str | torch.device) -> torch.device:
    """The device of this process: of several GPUs that of its local rank.

    Args:
        device: ``"auto"``, or what ``torch.device`` takes; an index is that of a machine with one process.

    Raises:
        SettingsError: if there are fewer GPUs than processes.
    """
    chosen = choose_device(device)
    if chosen.type != "cuda" or not launched():
        return chosen
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise SettingsError(
            f"there are {int(os.environ.get('LOCAL_WORLD_SIZE', local + 1))} processes on this machine and {there} "
            "GPUs; take devices of at most that, or device='cpu'"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that torchrun's environment names, for as long as it is needed; alone where it names none.

    Args:
        device: of this process; GPUs talk by NCCL, processors by gloo.

    Raises:
        ProcessError: if the others cannot be met.

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
                f"process {os.environ['RANK']} cannot meet the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); look at the address and the firewall"
            ) from error
    group = Group(dist.get_rank(), dist.get_world_size())
    try:
        _PEERS[:] = group.gathered((socket.gethostname(), os.getpid()))
        yield group
    finally:
        if ours:
            dist.destroy_process_group()


def share_of_cores(processes: int) -> int:
    """How many threads each of so many processes on this machine is to have.

    Example:
        >>> share_of_cores(10**6)
        1
    """
    if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        return max(1, int(asked))
    known = getattr(os, "sched_getaffinity", None)
    cores = len(known(0)) if known else os.cpu_count() or 1
    return max(1, math.floor(cores / processes))
