"""Write docs/coverage.md: ``cd tests && python -m helpers.coverage_page [words]``.

It measures the studies whose function or setting holds one of the words (all, if none is given), and keeps the other
rows of the page.
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

Each estimate that pyro-vae prints has a standard error. This page says how often the interval of ± {WIDTH:g} standard
errors holds the truth, which is known here: from the linear-Gaussian model, from quadrature, or by construction.
Nominal is {NOMINAL:.0%}. `tests/contract/test_coverage.py` measures every row (the slow tests) with at least {LEAST}
repetitions, and holds it to the limits stated there. `make coverage` writes the page.

- **coverage**: the share of repetitions whose interval holds the truth, ± its standard error. Of a p-value: the
  share of repetitions with p ≥ 0.05.
- **made ÷ reported**: the root mean square of the error made in units of the error reported; 1 is right, 2 means that
  the reported error is half of what it should be. Where tails are heavy a few repetitions make it large.
- **k̂**: the median Pareto shape of the importance weights, where there are any.

An error estimated from few numbers (10 blocks, 3 seeds) is itself uncertain. With ν degrees of freedom
± {WIDTH:g} standard errors hold the truth as often as Student's t says: 0.81 for ν = 2, 0.88 for ν = 4, 0.92 for ν = 9.
"""

HEADER = """| quantity | setting | repetitions | coverage | made ÷ reported | k̂ | why it is not nominal |
|---|---|---|---|---|---|---|"""


def _shown(value: float) -> str:
    return "" if np.isnan(value) else "> 99" if value > 99 else f"{value:.2f}"


def line(key: Key, found: Figures, row: Row) -> str:
    """A row of the table."""
    cells = [
        f"`{key[1]}`", key[2], str(found.repetitions), f"{found.coverage:.3f} ± {found.error:.3f}",
        _shown(found.spread), _shown(found.khat), row.cause,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def read(text: str) -> dict[Key, Figures]:
    """The figures of a page, by function, quantity and setting."""
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
    """The whole page; rows without figures are named at its end."""
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
    """All rows that the page is to have."""
    return [label for study in every for label in study.labels()]


def unmeasured(text: str) -> set[Key]:
    """The rows that a page names without figures."""
    lines = [one[3:] for one in text.splitlines() if one.startswith("- `")]
    return {(f, q, s) for f, q, s in (one.replace("`", "").split(", ", 2) for one in lines)}


def main(words: list[str]) -> None:
    """Measure, and write the page after each study."""
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
