"""Run the ``pyro-vae`` command by ``python -m pyro_vae``."""

import sys


def run() -> int:
    """Run the command line; report Ctrl-C in one line, during imports too."""
    try:
        from pyro_vae.cli import main

        return main()
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130
    finally:
        _flush()


def _flush() -> None:
    """Flush the standard output, if there is one; ignore a closed pipe, such as that of ``| head -1``."""
    if sys.stdout is None:  # closed by >&-
        return
    try:
        sys.stdout.flush()
    except OSError:
        from pyro_vae.core.format import discard

        discard(sys.stdout)


if __name__ == "__main__":
    sys.exit(run())
