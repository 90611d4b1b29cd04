"""Summarize a training in one line and as a table of its epochs."""

import numpy as np
import xarray as xr
from rich import box
from rich.table import Table

from pyro_vae.core.format import format_estimate, format_rounded

ROWS = 10
"""The most epochs in the table, spread evenly and including the first and the last."""


def in_one_line(history: xr.Dataset, device: str, *, interrupted: bool = False) -> str:
    """Say how long a training took and which ELBO it reached.

    Args:
        history: of a fit.
        device: the device of the training.
        interrupted: whether Ctrl-C ended the training early.

    Example:
        >>> history = xr.Dataset({"train_elbo": ("epoch", [-1.0]), "train_elbo_se": ("epoch", [0.12]),
        ...                       "seconds": ("epoch", [0.5])})
        >>> in_one_line(history, "CPU")
        'Trained for 1 epoch on CPU in 0.5 s: ELBO per datum -1.00 ± 0.12 nats in training (over data)'
    """
    if not history.sizes["epoch"]:
        return "Interrupted before the first step was taken"
    epochs = history.sizes["epoch"]
    chosen = history.attrs.get("weights_epoch", 0) or epochs
    last = history.isel(epoch=chosen - 1)
    parts = [
        f"{_elbo(last, part)} nats in {label}"
        for part, label in (("train", "training"), ("validation", "validation"))
        if f"{part}_elbo" in last
    ]
    which = f", with the weights after epoch {chosen}, selected on the validation data" if chosen != epochs else ""
    ended = "Interrupted after" if interrupted else "Trained for"
    return (
        f"{ended} {epochs} epoch{'s' * (epochs != 1)} on {device} in {history.seconds.sum().item():.1f} s{which}: "
        f"ELBO per datum {', '.join(parts)} (over data)"
    )


def history_table(history: xr.Dataset) -> Table:
    """Tabulate the epochs of a training, at most ten of them.

    Args:
        history: of a fit.

    Example:
        >>> history = xr.Dataset({"train_elbo": ("epoch", [-2.0, -1.0]), "train_elbo_se": ("epoch", [0.1, 0.1]),
        ...                       "objective": ("epoch", [-2.5, -1.5]), "seconds": ("epoch", [0.5, 0.5])},
        ...                      {"epoch": [1, 2]})
        >>> history_table(history).row_count
        2
    """
    watched = [part for part in ("train", "validation") if f"{part}_elbo" in history]
    table = Table(
        title="nats per datum, ± standard error over data",
        caption="objective: the maximized objective, averaged over the steps of the epoch",
        box=box.SIMPLE,
    )
    for heading in ("epoch", "objective", *(f"{part} ELBO" for part in watched), "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    epochs = history.sizes["epoch"]
    for i in np.unique(np.linspace(0, epochs - 1, min(epochs, ROWS)).round().astype(int)):
        row = history.isel(epoch=i)
        objective = format_rounded(row.objective.item(), row.train_elbo_se.item())
        elbos = (_elbo(row, part) for part in watched)
        table.add_row(str(row.epoch.item()), objective, *elbos, f"{row.seconds.item():.2g}")
    return table


def _elbo(row: xr.Dataset, part: str) -> str:
    return format_estimate(row[f"{part}_elbo"].item(), row[f"{part}_elbo_se"].item(), over="")
