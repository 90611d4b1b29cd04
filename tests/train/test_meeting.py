"""Machines meet before any of them begins, and say why they do not."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyro_vae.errors import ProcessError, SettingsError
from pyro_vae.train.distributed.launch import Machines
from pyro_vae.train.distributed.meeting import met


@pytest.fixture
def place():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_all_are_there_inside_and_not_before(place, capsys):
    inside, last = [], threading.Event()

    def come(rank):
        if rank == 2:
            assert not last.wait(1.0)
            assert not inside, "the others wait for the last"
        with met(Machines(1, 3, rank, place), within=20):
            inside.append(rank)
            last.wait(10)

    with ThreadPoolExecutor(3) as machines:
        coming = [machines.submit(come, rank) for rank in (1, 0, 2)]
        while len(inside) < 3 and not any(one.done() and one.exception() for one in coming):
            last.wait(0.05)
        last.set()
        for one in coming:
            one.result()
    assert sorted(inside) == [0, 1, 2]
    assert f"Machine 0 waits for machines 1, 2 at {place}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "machine 1 did not come to .*; begin the same command there with its own node_rank"),
        (1, "machine 0 did not"),
    ],
)
def test_one_that_waits_in_vain_says_for_whom(rank, message, place):
    with pytest.raises(ProcessError, match=message), met(Machines(1, 2, rank, place), within=0.3):
        pytest.fail("it was let in alone")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Machines(1, 2, 0, "x:1"), "another machine has node_rank 0 too; give each its own, from 0 to 1"),
        (Machines(1, 3, 1, "x:1"), "here it is 3 machines with 1 devices each, and 2 machines with 1 devices each on"),
        (Machines(2, 2, 1, "x:1"), "here it is 2 machines with 2 devices each, and 2 machines with 1 devices each on"),
    ],
    ids=["the same number", "other machines", "other devices"],
)
def test_machines_with_other_plans_are_refused(other, message, place):
    """A second store in this process shares the first's place, as two machines do."""
    given, refused = threading.Event(), []

    def first():
        try:
            with met(Machines(1, 2, 0, place), within=1):
                pass
        except ProcessError as error:
            refused.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    given.wait(0.3)
    with pytest.raises(SettingsError, match=message), met(Machines(other.devices, other.nodes, other.node_rank, place)):
        pytest.fail("it was let in")
    thread.join()
    assert refused, "the first waits for one that fits"


def test_a_place_that_is_taken_is_named(place):
    host, _, port = place.rpartition(":")
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        refused = pytest.raises(
            ProcessError, match=r"machine 0 cannot meet the others at .*; give host:port of machine 0"
        )
        with refused, met(Machines(1, 2, 0, place), within=1):
            pytest.fail("it was let in")
