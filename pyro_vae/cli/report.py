"""What a person sees at the end of a run: a table, a sentence, and files."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table

from pyro_vae.cli.fit import Loaded
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.compare.elbos import verdict
from pyro_vae.compare.recommend import recommend
from pyro_vae.compare.seeds import drawn, refuse_stacked
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data
from pyro_vae.evidence import baseline, judge_baseline
from pyro_vae.train.fit import Fit

BASELINE_ROWS, BASELINE_PARTICLES = 512, 100
"""At most so many held-out rows, with so many particles each, are compared with baselines at the end of a fit."""


def comparison_table(comparison: xr.Dataset) -> Table:
    """The comparison of estimators, a row for each number of particles.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`.

    Raises:
        SettingsError: if it holds comparisons of several seeds side by side.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> comparison_table(pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), draws=3)).row_count
        7
    """
    refuse_stacked(comparison)
    about = comparison.attrs
    table = Table(
        title=f"{comparison.sizes['datum']} data, {drawn(comparison)}, {about['dtype']}, {about['device']}",
        caption="Gradient difference: from HandDerivedELBO, same noise, relative.\n"
        "SNR: signal-to-noise of one gradient. ms: median of one evaluation with gradient"
        f"{f', with {beside} beside it' if (beside := about.get('timed_beside')) else ''}.",
        box=box.SIMPLE,
        padding=(0, 1),
        collapse_padding=True,
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


def _snr(group: str) -> Callable[[xr.Dataset], str]:
    def shown(cell: xr.Dataset) -> str:
        if group not in cell.parameter_group.values:
            return ""
        cell = cell.sel(parameter_group=group)
        return f"{cell.gradient_snr.item():.2f}±{cell.gradient_snr_se.item():.2f}"

    return shown


def _difference(cell: xr.Dataset) -> str:
    return f"{cell.gradient_difference.item():.1e}" if cell.gradient_difference.notnull() else ""


_COLUMNS: tuple[tuple[str, Callable[[xr.Dataset], str]], ...] = (
    ("K", lambda cell: str(cell.particles.item())),
    ("bound ± s.e.,\nnats per datum", lambda cell: f"{cell.elbo.item():.3f}±{cell.elbo_se.item():.3f}"),
    ("gradient\ndifference", _difference),
    ("SNR of Θ\n± s.e.", _snr("Θ")),
    ("SNR of φ\n± s.e.", _snr("φ")),
    ("ms", lambda cell: f"{1000 * cell.seconds.item():.2f}"),
)


def show_comparison(comparison: xr.Dataset, console: Console) -> None:
    """Print the table, where Pyro's analytic-KL ELBO is in it the verdict, and which estimator to train with.

    Example:
        >>> import io, pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> comparison = pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), draws=3)
        >>> show_comparison(comparison, Console(file=io.StringIO()))
    """
    console.print(comparison_table(comparison))
    if "TraceMeanField_ELBO" in comparison.estimator.values:
        console.print(verdict(comparison), highlight=False, soft_wrap=True)
    console.print(recommend(comparison), highlight=False, soft_wrap=True)
    if comparison.attrs["left_out"]:
        console.print(f"Left out: {comparison.attrs['left_out']}.", highlight=False, soft_wrap=True)


def save_fit(run: RunFolder, fit: Fit, held_out: Data) -> None:
    """Write history, weights and figures of a fit.

    Args:
        run: where to.
        fit: what was trained.
        held_out: data for the figures.

    Example:
        >>> import tempfile, pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> result = pv.fit(linear.as_vae(), linear.sample(8), epochs=1, batch_size=8, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunFolder(folder)
        ...     save_fit(run, result, Data(linear.sample(4)))
        ...     sorted(p.name for p in run.path.glob("*.png"))
        ['latent.png', 'prior_samples.png', 'reconstructions.png', 'training.png']
    """
    from pyro_vae import plots

    run.dataset("history.nc", fit.history)
    run.weights("weights.safetensors", fit.vae, int(fit.history.step[-1]))
    look: Any = {"image_shape": held_out.image_shape, "limits": (held_out.x.min().item(), held_out.x.max().item())}
    shown = held_out.rows(torch.arange(min(len(held_out.x), 5000)))
    run.figure("training.png", plots.history(fit.history))
    run.figure("reconstructions.png", plots.reconstructions(fit.vae, held_out.x, **look))
    run.figure("prior_samples.png", plots.prior_samples(fit.vae, **look))
    run.figure("latent.png", plots.latent_space(fit.vae, shown.x, labels=shown.labels))


def write_held_out_rows(run: RunFolder, data: Loaded) -> None:
    """Write which rows of the file were held out, one a line, where training split the file.

    Example:
        >>> import tempfile
        >>> part = Data(torch.zeros(5, 2), source="table.csv").rows(torch.tensor([4, 1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunFolder(folder)
        ...     write_held_out_rows(run, Loaded(part, part, files=(part,)))
        ...     print((run.path / "held_out_rows.txt").read_text(), end="")
        # the rows of table.csv that were held out, counted from 0 after any header
        4
        1
    """
    labels = data.held_out.row_labels
    if len(data.files) > 1 or labels is None:
        return
    head = f"# the rows of {data.held_out.source} that were held out, counted from 0 after any header"
    run.text("held_out_rows.txt", "\n".join([head, *map(str, labels.tolist())]) + "\n")


def save_comparison(run: RunFolder, comparison: xr.Dataset) -> None:
    """Write a comparison and its figures.

    Args:
        run: where to.
        comparison: from :func:`pyro_vae.compare_elbos`.

    Example:
        >>> import tempfile, pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> comparison = pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), draws=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunFolder(folder)
        ...     save_comparison(run, comparison)
        ...     sorted(p.name for p in run.path.iterdir())
        ['SHA256SUMS', 'comparison.nc', 'comparison.png', 'elbos_by_datum.png']
    """
    from pyro_vae import plots

    run.dataset("comparison.nc", comparison)
    run.figure("comparison.png", plots.compare(comparison))
    last = comparison.isel(moment=-1) if "moment" in comparison.dims else comparison
    if ((last.bound == "ELBO") & last.elbo.isel(particles=0).notnull()).sum() > 1:
        run.figure("elbos_by_datum.png", plots.elbos_by_datum(last))


def show_fit(fit: Fit, console: Console) -> None:
    """Print what training came to.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> result = pv.fit(linear.as_vae(), linear.sample(8), epochs=1, batch_size=8, progress=False)
        >>> show_fit(result, Console(width=200))
        Trained for 1 epoch on CPU (...) in ... s: ELBO per datum ... ± ... nats in training
    """
    console.print(in_one_line(fit), highlight=False, soft_wrap=True)


def show_baseline(fit: Fit, held_out: Data, train: Data, console: Console, *, seed: int = 0) -> None:
    """Print how the held-out log-likelihood compares with that of simple models.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> vae, x = linear.as_vae(), linear.sample(20)
        >>> show_baseline(Fit(vae, xr.Dataset(), "cpu"), Data(x[:10]), Data(x[10:]), Console(width=400))
        Beside simple models ... log p(x) of 10 data ...
    """
    shown = held_out.rows(torch.arange(min(len(held_out.x), BASELINE_ROWS)))
    if len(shown.x) < 2:
        return
    finding = judge_baseline(baseline(fit.vae, shown, train=train, num_particles=BASELINE_PARTICLES, seed=seed))
    console.print(f"Beside simple models ({finding.level}): {finding.why}.", highlight=False, soft_wrap=True)
    if finding.next:
        console.print(f"Next: {finding.next}.", highlight=False, soft_wrap=True)


def in_one_line(fit: Fit) -> str:
    """What training came to.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> in_one_line(pv.fit(linear.as_vae(), linear.sample(8), epochs=1, batch_size=8, progress=False))
        'Trained for 1 epoch on CPU (...) in ... s: ELBO per datum ... ± ... nats in training'
    """
    if not fit.history.sizes["epoch"]:
        return "Interrupted before the first step was taken"
    kept = fit.history.attrs.get("weights_epoch", 0) or fit.history.sizes["epoch"]
    last = fit.history.isel(epoch=kept - 1)
    parts = [
        f"{last[f'{part}_elbo'].item():.3f} ± {last[f'{part}_elbo_se'].item():.3f} nats in {label}"
        for part, label in (("train", "training"), ("validation", "validation"))
        if f"{part}_elbo" in last
    ]
    ended = "Interrupted after" if fit.interrupted else "Trained for"
    epochs = fit.history.sizes["epoch"]
    seconds = fit.history.seconds.sum().item()
    which = f", with the weights after epoch {kept}, which the validation data chose" if kept != epochs else ""
    return (
        f"{ended} {epochs} epoch{'s' * (epochs != 1)} on {fit.device} in {seconds:.1f} s{which}: "
        f"ELBO per datum {', '.join(parts)}"
    )


def in_double(vae: VAE) -> VAE:
    """A copy in double precision, where agreement shows to the last digits.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> next(in_double(linear.as_vae()).parameters()).dtype
        torch.float64
    """
    return copy.deepcopy(vae).double()
