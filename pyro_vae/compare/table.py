"""Print a comparison of estimators as a table."""

from collections.abc import Callable
from typing import Any

import xarray as xr
from rich import box
from rich.table import Table

from pyro_vae.compare.seeds import drawn, validate_not_stacked
from pyro_vae.core.format import as_text, format_estimate, format_rounded


class Comparison(xr.Dataset):
    """A dataset that ``print`` shows as a table of estimators.

    Only ``str()`` differs from ``xarray.Dataset``, and only for a whole comparison; a selection, or a dataset read from
    a file, prints as usual in xarray. xarray warns that operations may lose the type of a subclass; here this only
    costs the table. An accessor or a method could not change ``print``.
    """

    __slots__ = ()

    def __str__(self) -> str:
        if not _is_whole(self):
            return super().__str__()
        if "moment" not in self.dims:
            return as_text(comparison_table(self))
        each = (self.isel(moment=i) for i in range(self.sizes["moment"]))
        return "\n\n".join(f"At the {one.moment.item()} of training:\n{as_text(comparison_table(one))}" for one in each)


def as_comparison(found: xr.Dataset) -> Comparison:
    """Make the dataset of a comparison, such as one read from a file, print as a table.

    Args:
        found: from :func:`pyro_vae.compare_elbos` or :func:`pyro_vae.over_seeds`.

    Example:
        >>> print(as_comparison(xr.Dataset({"a": 1})))
        <xarray.Comparison> ...
    """
    return Comparison(found.data_vars, found.coords, found.attrs)


def _is_whole(found: xr.Dataset) -> bool:
    """Return whether this is one comparison with all columns of the table."""
    needed = {"elbo", "elbo_se", "gradient_difference", "gradient_snr", "gradient_snr_se", "seconds", "seconds_se"}
    dims = {"estimator", "particles", "datum", "parameter_group"}
    return needed <= set(found) and dims <= set(found.sizes) and "seed" not in found.elbo.dims


def comparison_table(comparison: xr.Dataset) -> Table:
    """Tabulate a comparison of estimators, a row for each number of particles.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`.

    Raises:
        SettingsError: if ``comparison`` stacks several seeds.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> comparison_table(pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), draws=3)).row_count
        7
    """
    validate_not_stacked(comparison)
    about = comparison.attrs
    table = Table(
        title=f"{comparison.sizes['datum']} data, {drawn(comparison)}, {about['dtype']}, {about['device']}",
        caption=f"±: standard error over {drawn(comparison)}, for these data. "
        "Gradient difference: from HandDerivedELBO, same noise, relative.\n"
        "SNR: signal-to-noise ratio of one gradient. ms: median of one evaluation with gradient"
        f"{f', with {beside} running in parallel' if (beside := about.get('timed_beside')) else ''}.",
        box=box.SIMPLE,
        padding=0,  # the box separates columns by a blank; more would exceed 80 characters
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("estimator", no_wrap=True)
    for heading, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in comparison.estimator.values:
        cells = (comparison.sel(estimator=name, particles=k) for k in comparison.particles.values)
        for i, cell in enumerate(cell for cell in cells if cell.elbo.notnull()):
            table.add_row("" if i else str(name), *(shown(cell) for _, shown in _COLUMNS))
    return table


def _estimate(cell: Any, name: str) -> str:
    """Format a number and its error without spaces, to fit into 80 characters."""
    return format_estimate(cell[name].item(), cell[f"{name}_se"].item(), over="").replace(" ", "")


def _snr(group: str) -> Callable[[xr.Dataset], str]:
    def shown(cell: xr.Dataset) -> str:
        known = group in cell.parameter_group.values
        return _estimate(cell.sel(parameter_group=group), "gradient_snr") if known else ""

    return shown


def _difference(cell: xr.Dataset) -> str:
    return f"{cell.gradient_difference.item():.0e}" if cell.gradient_difference.notnull() else ""


_COLUMNS: tuple[tuple[str, Callable[[xr.Dataset], str]], ...] = (
    ("K", lambda cell: str(cell.particles.item())),
    ("bound ± s.e.,\nnats per datum", lambda cell: _estimate(cell, "elbo")),
    ("gradient\ndifference", _difference),
    ("SNR of Θ\n± s.e.", _snr("Θ")),
    ("SNR of φ\n± s.e.", _snr("φ")),
    ("ms", lambda cell: format_rounded(1000 * cell.seconds.item(), 1000 * cell.seconds_se.item())),
)
