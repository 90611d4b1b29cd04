"""Machines that train one VAE together wait for each other, before any of them begins."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pyro_vae.errors import ProcessError, SettingsError

if TYPE_CHECKING:
    from pyro_vae.train.distributed.launch import Machines

MEETING = 600.0
"""So many seconds machines wait for each other."""


@contextmanager
def met(machines: "Machines", within: float = MEETING) -> Iterator[None]:
    """All machines are there inside, where torchrun's engine would wait without a word and past Ctrl-C.

    Args:
        machines: of which this is one. The first keeps the place where they meet.
        within: so many seconds the others have to come.

    Raises:
        ProcessError: if one does not come, or the first goes away.
        SettingsError: if two have one number, or are told of another number of machines.

    Example:
        >>> from pyro_vae.train.distributed.launch import Machines
        >>> with met(Machines(2)):
        ...     pass
    """
    if machines.nodes == 1:
        yield
        return
    others = [rank for rank in range(machines.nodes) if rank != machines.node_rank]
    print(f"Machine {machines.node_rank} waits for {_named(others)} at {machines.rendezvous}", file=sys.stderr)
    until = time.monotonic() + within
    try:
        store = _place(machines, until)  # held as long as this goes on: the engine's own shares it
        _refuse_other_plan(store, machines)
        _await_all(store, machines, until)
    except dist.DistError as error:
        raise ProcessError(f"machine 0 at {machines.rendezvous} went away; begin again on all of them") from error
    yield


def _place(machines: "Machines", until: float) -> dist.TCPStore:
    """What is kept by the first machine, and found by the others once it is there."""
    host, _, port = str(machines.rendezvous).rpartition(":")
    first = machines.node_rank == 0
    while not first:
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
            break
        except OSError as error:
            _refuse_late(until, [0], machines, f" ({error.strerror or error})")
            time.sleep(0.5)
    try:
        return dist.TCPStore(host, int(port), is_master=first, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise ProcessError(
            f"machine {machines.node_rank} cannot meet the others at {machines.rendezvous} "
            f"({str(error).splitlines()[0]}); give host:port of machine 0, a free port of it"
        ) from error


def _refuse_other_plan(store: Any, machines: "Machines") -> None:
    plan = f"{machines.nodes} machines with {machines.devices} devices each"
    if (first := store.compare_set("plan", "", plan).decode()) != plan:
        raise SettingsError(f"here it is {plan}, and {first} on another machine; give all of them the same")
    if store.add(f"machine {machines.node_rank}", 1) > 1:
        raise SettingsError(
            f"another machine has node_rank {machines.node_rank} too; give each its own, from 0 to {machines.nodes - 1}"
        )


def _await_all(store: Any, machines: "Machines", until: float) -> None:
    ranks = range(machines.nodes)
    while missing := [rank for rank in ranks if not store.check([f"machine {rank}"])]:
        _refuse_late(until, missing, machines)
        time.sleep(0.2)


def _refuse_late(until: float, missing: list[int], machines: "Machines", why: str = "") -> None:
    if time.monotonic() > until:
        raise ProcessError(
            f"{_named(missing)} did not come to {machines.rendezvous}{why}; begin the same command there with its own "
            "node_rank, or look at the address and the firewall"
        )


def _named(ranks: list[int]) -> str:
    return f"machine{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
