"""Scripts that would start processes each of which would start processes."""

import ast
import sys
from typing import Any

import torch.multiprocessing as mp

from pyro_vae.errors import SettingsError

GUARD = (
    'processes begin by importing the script that starts them: put what it does under if __name__ == "__main__": '
    "so that they do not do it all again"
)


def refuse_no_guard() -> None:
    """Refuse a script that would start processes each of which would start processes.

    Raises:
        SettingsError: naming the line.
    """
    if getattr(mp.current_process(), "_inheriting", False):
        raise SettingsError(GUARD)
    main = sys.modules.get("__main__")
    frame: Any = sys._getframe()
    while frame is not None and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)):
        frame = frame.f_back
    if frame is None or getattr(main, "__spec__", None) is not None or not hasattr(main, "__file__"):
        return
    if not guarded(frame.f_code.co_filename, frame.f_lineno):
        raise SettingsError(f"{frame.f_code.co_filename}, line {frame.f_lineno}: {GUARD}")


def guarded(path: str, line: int) -> bool:
    """Whether a line of a script is in an ``if`` on its name."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return True  # no file that a process could import again
    conditions = (n for n in tree.body if isinstance(n, ast.If) and n.lineno <= line <= (n.end_lineno or n.lineno))
    return any(isinstance(name, ast.Name) and name.id == "__name__" for n in conditions for name in ast.walk(n.test))
