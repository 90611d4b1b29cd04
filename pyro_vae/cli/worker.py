"""Prepare a worker of a sweep, before it imports torch, which takes seconds."""

import os
import threading
import time


def start_worker(parent: int) -> None:
    """End this process when the main process has died, and let it not receive the Ctrl-C of the terminal.

    A thread watches the main process, since the kernel's signal (``PR_SET_PDEATHSIG``) never comes to a worker that
    starts after this death.

    Args:
        parent: the process id of the main process.
    """
    os.setpgid(0, 0)
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
