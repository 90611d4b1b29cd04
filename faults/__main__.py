"""``make faults``: all of them, their counts on the screen and in ``benchmarks/results/faults.json``."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from faults.damage import WRONG, trials
from faults.hostile import counts, every
from faults.kill import fit, forked, kills, spawned
from pyro_vae.cli import main

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "faults.json"


def run() -> int:
    """Damage and kill as often as asked, and read hostile folders; 1 if anything was silently wrong, or was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--compiled", type=int, default=10, help="kills of a compiled training, each of a process that compiles anew"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    results: dict[str, Any] = {}

    def report(name: str, counts: dict[str, Any]) -> None:
        results[name] = counts
        print(json.dumps({name: counts}, indent=1), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        report("kills, eager", kills(Path(folder), asked.kills, engine="eager", start=forked))
    with tempfile.TemporaryDirectory() as folder:
        compiled = kills(Path(folder), asked.compiled, engine="compiled", start=spawned, in_training=True)
        report("kills, compiled", compiled)
    with tempfile.TemporaryDirectory() as folder:
        if main(fit(Path(folder), "eager", epochs=1)):
            return 1
        report("damages", trials(Path(folder) / "run", asked.damages))
        report("hostile folders", counts(Path(folder), Path(folder) / "run", every()))
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    exact = all(results[k]["ended"] == results[k]["equal to the bit"] for k in results if k.startswith("kills"))
    harmless = all(of["wrong"] == of["code run"] == 0 for of in results["hostile folders"].values())
    return int(not exact or not harmless or any(WRONG in of for of in results["damages"].values()))


if __name__ == "__main__":
    raise SystemExit(run())
