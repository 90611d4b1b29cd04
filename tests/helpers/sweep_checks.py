"""Jobs that the tests of sweeps run in other processes."""

import os
import signal
import time

import torch

from pyro_vae.cli.sweep import Outcome


def double(settings, number, data):
    return Outcome((2 * number, os.getpid(), torch.get_num_threads(), data))


def fails(settings, number, data):
    raise ValueError(f"number {number}")


def one_dies(settings, number, data):
    if number == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30 if number else 0)
    return Outcome(number)


def waits(settings, data):
    time.sleep(60)


def interrupts(settings, number, folder, data):
    """The first is done at once; the second presses Ctrl-C in the process that waits for it."""
    if number == 1:
        (folder / str(os.getpid())).touch()
        time.sleep(1)
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60 if number else 0)
    return Outcome(number)
