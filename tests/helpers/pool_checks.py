"""What the tests of pools have done in other processes."""

import os
import signal
import time

import torch


def double(number):
    return 2 * number, os.getpid(), torch.get_num_threads()


def one_dies(number):
    if number == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30 if number else 0)
    return number


def fails(number):
    raise ValueError(f"number {number}")
