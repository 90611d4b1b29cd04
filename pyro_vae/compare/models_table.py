"""Print a comparison of models as a table."""

from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from pyro_vae.core.format import as_text, format_estimate, format_rounded
from pyro_vae.evidence.atoms import MEANING
from pyro_vae.evidence.estimate import ESTIMATES

COLUMNS = ("rank", "elpd", "se", "elpd_diff", "dse", "diff_mcse", "weight", "diag_diff", "diag_elpd")
ATTRIBUTES = ("data", "distinct", "method", "unlike", "atoms")
"""Attributes that the table needs; without them, a comparison prints like any DataFrame."""

WEIGHT_ERROR = 0.1
"""The error that shows weights with two decimals."""


NOTHING = 1e-3
"""An error over draws below this fraction of the error over data is shown as 0."""

CAPTION = (
    "±: standard error over data; that of a difference is paired. Draws: the Monte-Carlo standard error of the "
    "difference. Weight: in the mixture of all models that describes the data best (stacking)."
)


class ModelComparison(pd.DataFrame):
    """A DataFrame that ``print`` shows as a table of models, with as many digits as the errors allow.

    Only ``str()`` differs from ``pandas.DataFrame``, and only if all columns of the table are present.
    """

    @property
    def _constructor(self) -> type["ModelComparison"]:
        return ModelComparison

    def __str__(self) -> str:
        whole = set(COLUMNS) <= set(self) and set(ATTRIBUTES) <= set(self.attrs) and len(self)
        return as_text(models_table(self)) if whole else super().__str__()


def models_table(found: pd.DataFrame) -> Table:
    """Tabulate a comparison of models, best first.

    Args:
        found: from :func:`pyro_vae.compare_models`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> models_table(pv.compare_models({"a": linear.as_vae(), "b": linear.as_vae()}, linear.sample(9))).row_count
        2
    """
    about = found.attrs
    rows = f"{about['data']} held-out data"
    if about["distinct"] < about["data"]:
        rows += f" ({about['distinct']} distinct rows)"
    wrong = [f"Not comparable: {about['unlike']}."] if about["unlike"] else []
    wrong += [f"Not comparable: {about['atoms']}; {MEANING}."] if about["atoms"] else []
    table = Table(
        title=f"log p(x) of {rows}, in nats\nby {', '.join(ESTIMATES[m] for m in about['method'].split(', '))}",
        caption="\n".join([CAPTION, *wrong]),
        caption_justify="left",
        min_width=76,
        box=box.SIMPLE,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("model", max_width=18, overflow="fold")
    for heading in ("elpd ± s.e.", "difference\nfrom the best", "draws", "weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", max_width=20)
    for name, row in found.iterrows():
        table.add_row(str(name), *_cells(row))
    return table


def _cells(row: Any) -> list[str]:
    """Format the numbers and notes of a model."""
    beside = ["", ""]
    if row["rank"]:
        draws = format_rounded(row.diff_mcse, row.diff_mcse) if row.diff_mcse > NOTHING * row.dse else "0"
        beside = [format_estimate(row.elpd_diff, row.dse, over=""), draws]
    note = "; ".join(filter(None, (row.diag_diff, row.diag_elpd)))
    return [format_estimate(row.elpd, row.se, over=""), *beside, format_rounded(row.weight, WEIGHT_ERROR), note]
