"""``python -m pyro_vae`` is ``pyro-vae``."""

import sys


def run() -> int:
    """Run the command line; Ctrl-C while it is imported ends as later, in one line."""
    try:
        from pyro_vae.cli import main

        return main()
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130
    finally:
        _flush()


def _flush() -> None:
    """Write out what is left, unless nobody reads it, as behind ``| head -1``."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        from pyro_vae.core.format import discard

        discard(sys.stdout)


if __name__ == "__main__":
    sys.exit(run())
