"""Print and write the results of a run: tables, summaries, weights and figures."""

import copy
from typing import Any

import torch
import xarray as xr

from pyro_vae.cli.load_data import Loaded
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.compare.elbos import verdict
from pyro_vae.compare.recommend import recommend
from pyro_vae.compare.table import comparison_table
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data
from pyro_vae.evidence import baseline, judge_baseline
from pyro_vae.train.fit import Fit
from pyro_vae.train.summary import in_one_line

BASELINE_ROWS, BASELINE_PARTICLES = 512, 100
"""The largest number of held-out rows, and the particles for each, to compare with baselines after a fit."""


def show_comparison(comparison: xr.Dataset, console: Console) -> None:
    """Print the verdict on Pyro's analytic-KL ELBO if it is included, the table, and a recommended estimator.

    Example:
        >>> import io, pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> comparison = pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), draws=3)
        >>> show_comparison(comparison, Console(file=io.StringIO()))
    """
    if "TraceMeanField_ELBO" in comparison.estimator.values:
        console.print(verdict(comparison), soft_wrap=True)
    console.print(comparison_table(comparison))
    console.print(recommend(comparison), soft_wrap=True)
    if comparison.attrs["left_out"]:
        console.print(f"Left out: {comparison.attrs['left_out']}.", soft_wrap=True)


def save_fit(run: RunFolder, fit: Fit, held_out: Data) -> None:
    """Write the history, weights and figures of a fit.

    Args:
        run: the folder to write to.
        fit: the result of training.
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
    run.figure("reconstructions.png", plots.reconstructions(fit.vae, held_out, **look))
    run.figure("prior_samples.png", plots.prior_samples(fit.vae, context=held_out.context, **look))
    run.figure("latent.png", plots.latent_space(fit.vae, shown, labels=shown.labels))


def write_held_out_rows(run: RunFolder, data: Loaded) -> None:
    """Write the labels or numbers of the held-out rows, one per line, if they were split off from the training file.

    Example:
        >>> import tempfile
        >>> part = Data(torch.zeros(5, 2), source="table.csv").rows(torch.tensor([4, 1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunFolder(folder)
        ...     write_held_out_rows(run, Loaded(part, part, files=(part,)))
        ...     print((run.path / "held_out_rows.txt").read_text(), end="")
        # the rows of table.csv that were held out, by their row labels
        4
        1
    """
    labels = data.held_out.row_labels
    if len(data.files) > 1 or labels is None:
        return
    are_numbers = data.files[0].row_labels is None
    by = "counted from 0 after any header" if are_numbers else "by their row labels"
    head = f"# the rows of {data.held_out.source} that were held out, {by}"
    run.text("held_out_rows.txt", "\n".join([head, *map(str, labels.tolist())]) + "\n")


def save_comparison(run: RunFolder, comparison: xr.Dataset) -> None:
    """Write a comparison and its figures.

    Args:
        run: the folder to write to.
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
    """Print a summary of training.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> result = pv.fit(linear.as_vae(), linear.sample(8), epochs=1, batch_size=8, progress=False)
        >>> show_fit(result, Console(width=200))
        Trained for 1 epoch on CPU (...) in ... s: ELBO per datum ... ± ... nats in training (over data)
    """
    console.print(in_one_line(fit.history, fit.device, interrupted=fit.interrupted), soft_wrap=True)


def show_baseline(fit: Fit, held_out: Data, train: Data, console: Console, *, seed: int = 0) -> None:
    """Print a comparison of the held-out log-likelihood with those of simple models.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> vae, x = linear.as_vae(), linear.sample(20)
        >>> show_baseline(Fit(vae, xr.Dataset(), "cpu"), Data(x[:10]), Data(x[10:]), Console(width=400))
        Comparison with simple models ... log p(x) of 10 data, ...
    """
    shown = held_out.rows(torch.arange(min(len(held_out.x), BASELINE_ROWS)))
    if len(shown.x) < 2:
        return
    finding = judge_baseline(baseline(fit.vae, shown, train=train, num_particles=BASELINE_PARTICLES, seed=seed))
    console.print(f"Comparison with simple models ({finding.level}): {finding.why}.", soft_wrap=True)
    if finding.next:
        console.print(f"Next: {finding.next}.", soft_wrap=True)


def in_double(vae: VAE) -> VAE:
    """Copy a VAE in double precision, in which estimators agree to the last digits.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> next(in_double(linear.as_vae()).parameters()).dtype
        torch.float64
    """
    return copy.deepcopy(vae).double()
