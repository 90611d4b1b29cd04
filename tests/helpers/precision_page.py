"""Write docs/precision.md: ``cd tests && python -m helpers.precision_page``."""

from collections.abc import Mapping
from pathlib import Path

from helpers.precision import BOUND, SUBJECTS, Figures, Subject, measure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "precision.md"

Key = tuple[str, str]

TEXT = f"""# Precision of the densities

The largest error of each log-density in single precision, over the whole range of its parameters, compared with the
same density computed to 30 digits. `tests/contract/test_precision.py` measures each row and checks that it is at most
{BOUND:g}; `make precision` writes the page.

- **log p**: the error in nats per feature (per latent). Above 1,000 nats in magnitude, the error per 1,000 nats, since
  single precision has 7 digits.
- **gradient**: the relative error of the gradient with respect to the network's outputs, and for priors and posteriors
  also with respect to the latent.
- **bf16**: the error of log p in nats per feature at two typical points, if the network's outputs are rounded to
  bfloat16, which has 3 digits (`fit(precision="bf16")`). The densities themselves are computed in single precision or
  better. For a count of 1e6 under `Poisson`, the error is up to 490 nats, since bfloat16 resolves the log-rate 13.8 to
  0.03 only: train large counts and small scales in float32.

Counts, correlated normals and mixtures with more than 1,024 levels are computed in double precision, since their terms
cancel.
"""

HEADER = """| member | range | log p | gradient | bf16 |
|---|---|---|---|---|"""


def line(name: str, subject: Subject, found: Figures) -> str:
    """Return a row of the table."""
    return f"| `{name}` | {subject.range} | {found.value:.0e} | {found.gradient:.0e} | {found.bf16:.2g} |"


def page(found: Mapping[Key, Figures]) -> str:
    """Return the whole page."""
    parts = [TEXT.strip()]
    for room, subjects in SUBJECTS.items():
        lines = [line(name, subject, found[room, name]) for name, subject in subjects.items()]
        parts.append(f"## `pv.{room}`\n\n{HEADER}\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def read(text: str) -> dict[Key, Figures]:
    """Parse the figures of a page."""
    found, room = {}, ""
    for one in text.splitlines():
        if one.startswith("## `pv."):
            room = one[7:-1]
        elif one.startswith("| `"):
            name, _, *numbers = (cell.strip() for cell in one.strip("|").split(" | "))
            found[room, name.strip("`")] = Figures(*map(float, numbers))
    return found


def main() -> None:
    """Measure all densities and write the page."""
    found = {(room, name): measure(one) for room, subjects in SUBJECTS.items() for name, one in subjects.items()}
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
