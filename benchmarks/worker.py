"""One contestant in a process of its own: it makes ready, then trains a pass at each line of its input."""

import faulthandler
import json
import os
import resource
import sys
import time
import traceback
import warnings

READY_SECONDS = 120
"""A contestant that is not ready by then is left out."""


def main() -> None:
    name, settings, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    if hasattr(os, "sched_setaffinity"):  # XLA takes every core that the process may run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    # What a contestant prints goes to the errors; the results have the output to themselves.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")

    from benchmarks.cases import Case, LeftOut, bits
    from benchmarks.contestants import CONTESTANTS

    def tell(**what: object) -> None:
        print(json.dumps(what), file=results, flush=True)

    case = Case.of(settings)
    faulthandler.dump_traceback_later(READY_SECONDS, exit=True)
    started = time.perf_counter()
    try:
        one_pass = CONTESTANTS[name](case, bits(case))
    except ImportError as error:
        return tell(left_out=f"{error.name} is not installed")
    except LeftOut as reason:
        return tell(left_out=str(reason))
    except Exception as error:
        traceback.print_exc()
        tell(left_out=f"it failed: {error}".splitlines()[0])
        os._exit(1)  # a GPU whose capture broke may hang at an orderly end
    elbo = one_pass()
    faulthandler.cancel_dump_traceback_later()
    tell(ready=time.perf_counter() - started, elbo=elbo)
    for _ in sys.stdin:
        started = time.perf_counter()
        elbo = one_pass()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tell(seconds=(time.perf_counter() - started) / case.steps, elbo=elbo, mebibytes=memory)


if __name__ == "__main__":
    main()
