"""Write docs/coverage.md: ``cd tests && python -m helpers.coverage_page [words]``.

It measures the studies whose function or setting contains one of the words (by default, all studies), and keeps the
other rows of the page.
"""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from helpers.coverage_checks import LEAST, NOMINAL, WIDTH, Figures, Row, Study, run, studies

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"

Key = tuple[str, str, str]

TEXT = f"""# Coverage of the standard errors

Each estimate that pyro-vae prints has a standard error. This page shows how often the interval of ± {WIDTH:g} standard
errors contains the true value, which is known from the linear-Gaussian model, from quadrature, or by construction.
The nominal coverage is {NOMINAL:.0%}. The slow tests in `tests/contract/test_coverage.py` measure each row with at
least {LEAST} repetitions and check it against the limits stated there. `make coverage` writes the page.

- **coverage**: the share of repetitions whose interval contains the true value, ± its standard error. For a p-value,
  the share of repetitions with p ≥ 0.05.
- **actual ÷ reported**: the root mean square of the actual error divided by the reported error. The ideal value is 1;
  2 means that the reported error is too small by a factor of 2. With heavy tails, a few repetitions can make it large.
- **k̂**: the median Pareto shape of the importance weights, if any.

An error estimated from few values (10 blocks, 3 seeds) is itself uncertain. With ν degrees of freedom, the coverage of
± {WIDTH:g} standard errors follows Student's t distribution: 0.81 for ν = 2, 0.88 for ν = 4, 0.92 for ν = 9.
"""

HEADER = """| quantity | setting | repetitions | coverage | actual ÷ reported | k̂ | reason for the deviation |
|---|---|---|---|---|---|---|"""


def _format(value: float) -> str:
    return "" if np.isnan(value) else "> 99" if value > 99 else f"{value:.2f}"


def line(key: Key, found: Figures, row: Row) -> str:
    """Return a row of the table."""
    cells = [
        f"`{key[1]}`", key[2], str(found.repetitions), f"{found.coverage:.3f} ± {found.error:.3f}",
        _format(found.spread), _format(found.khat), row.cause,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def read(text: str) -> dict[Key, Figures]:
    """Parse the figures of a page, by function, quantity and setting."""
    found, function = {}, ""
    for one in text.splitlines():
        if one.startswith("## `"):
            function = one[4:-1]
        elif one.startswith("| `"):
            quantity, setting, repetitions, coverage, spread, khat, _ = (c.strip() for c in one.strip("|").split(" | "))
            share, error = map(float, coverage.split(" ± "))
            rest = [np.nan if not value else np.inf if value == "> 99" else float(value) for value in (spread, khat)]
            found[function, quantity.strip("`"), setting] = Figures(share, error, int(repetitions), *rest)
    return found


def page(every: Sequence[Study], found: Mapping[Key, Figures]) -> str:
    """Return the whole page; rows without figures are listed at its end."""
    sections: dict[str, list[str]] = {}
    for study in every:
        for key, row in zip(study.labels(), study.rows.values(), strict=True):
            if key in found:
                sections.setdefault(study.function, []).append(line(key, found[key], row))
    parts = [f"## `{name}`\n\n{HEADER}\n" + "\n".join(lines) for name, lines in sections.items()]
    missing = [f"- `{key[0]}`, `{key[1]}`, {key[2]}" for key in labels(every) if key not in found]
    parts += ["## Not measured yet\n\n" + "\n".join(missing)] if missing else []
    return "\n\n".join([TEXT.strip(), *parts]) + "\n"


def labels(every: Iterable[Study]) -> list[Key]:
    """Return the keys of all rows that the page should have."""
    return [label for study in every for label in study.labels()]


def unmeasured(text: str) -> set[Key]:
    """Return the rows that a page lists without figures."""
    lines = [one[3:] for one in text.splitlines() if one.startswith("- `")]
    return {(f, q, s) for f, q, s in (one.replace("`", "").split(", ", 2) for one in lines)}


def main(words: list[str]) -> None:
    """Measure the studies and write the page after each of them."""
    torch.set_num_threads(1)
    every = studies()
    for study in every:
        if words and not any(word in f"{study.function} {study.setting}" for word in words):
            continue
        started = time.perf_counter()
        new = dict(zip(study.labels(), run(study).items(), strict=True))
        for key, (quantity, figures) in new.items():
            print(line(key, figures, study.rows[quantity]), flush=True)
        print(f"  {study.function}: {time.perf_counter() - started:.1f} s", flush=True)
        found = read(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}  # another process may have written it
        PAGE.write_text(page(every, found | {key: one for key, (_, one) in new.items()}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
