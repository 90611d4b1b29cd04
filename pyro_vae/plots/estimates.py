"""The default figure of a diagnostic: each estimate with its standard error."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from pyro_vae.errors import SettingsError
from pyro_vae.plots._style import BLUE, GREY, literal_text

MOST_LABELS = 12
"""The largest number of points with a label for each; more are numbered."""

SHORT = 4
"""Longer labels are rotated, so that they do not overlap."""


def with_errors(found: xr.Dataset) -> list[str]:
    """List the variables over one dimension that have a standard error.

    Example:
        >>> with_errors(xr.Dataset({"mean": ("latent", [0.1]), "mean_se": ("latent", [0.2]), "n": 3}))
        ['mean']
    """
    return [str(name) for name in found.data_vars if f"{name}_se" in found and found[name].ndim == 1]


@literal_text
def estimates(found: xr.Dataset) -> Figure:
    """Draw each estimate that has a standard error, one panel per variable.

    Args:
        found: a result whose variables ``name`` over one dimension have their standard errors in ``name_se``; its
            attribute ``errors_over``, such as "draws", names their source. A variable's attributes ``long_name`` and
            ``units`` label its axis, and a line is drawn at its ``reference``.

    Returns:
        The figure; bars are ± 2 standard errors.

    Raises:
        SettingsError: if no variable has a standard error.

    Example:
        >>> _ = estimates(xr.Dataset({"mean": ("latent", [0.1]), "mean_se": ("latent", [0.2])}))
    """
    names = with_errors(found)
    if not names:
        raise SettingsError("found has no variable over one dimension with a standard error to draw")
    figure = Figure(figsize=(3.2 * max(2, len(names)) + 0.4, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = found[name]
        at, dimension = np.arange(len(values)), str(values.dims[0])
        axes.errorbar(at, values, 2 * found[f"{name}_se"], fmt="o", color=BLUE, capsize=3)
        if len(at) <= MOST_LABELS:
            labels = [str(label) for label in values[dimension].values]
            rotated = {"rotation": 30, "ha": "right"} if max(map(len, labels)) > SHORT else {}
            axes.set_xticks(at, labels, **rotated)
        units = values.attrs.get("units", "1")
        title = values.attrs.get("long_name", name)
        axes.set(xlabel=dimension, ylabel=title if units == "1" else f"{title}\n({units})")
        if "reference" in values.attrs:
            axes.axhline(values.attrs["reference"], color=GREY, lw=1)
        axes.grid(alpha=0.3)
    over = found.attrs.get("errors_over", "")
    figure.suptitle(f"bars: ± 2 standard errors{f', over {over}' if over else ''}", fontsize=9)
    return figure
