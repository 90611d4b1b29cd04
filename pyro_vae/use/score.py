"""Score each datum: log p(x), the ELBO, the reconstruction, and a p-value against held-out data."""

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import derive_seed, numbers_at_once, seeded, validate_seed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import data_hash, row_hashes, trained_on, validate_not_trained_on
from pyro_vae.data.rows import rows_for
from pyro_vae.data.sources import Source
from pyro_vae.data.streams import Streamed
from pyro_vae.elbo.log_weights import weigh, without_enumeration
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import CalibrationWarning, DataError
from pyro_vae.evidence.estimate import METHODS, Method, log_evidence, validate_method
from pyro_vae.use.inputs import read

ON_GIVEN_DATA = tuple(name for name in METHODS if name != "bdmc")
"""The methods that estimate log p(x) of given data, not of simulated data."""

AT_ONCE = 4096
"""The number of rows of a stream that are scored at a time."""

OF_EVIDENCE = {"log_px": "log_evidence", "log_px_mcse": "mcse", "khat": "khat"}
"""The variables of a score that come from the evidence, with their names there."""

UNITS = {"khat": "1", "p_value": "1", "held_out_rows": "rows"}
"""The units of the variables that are not in nats."""

OVER_DRAWS = ("elbo", "elbo_mcse", "reconstruction", "reconstruction_mcse")


@torch.no_grad()
@takes_settings
def score(
    vae: Amortized,
    data: Any,
    *,
    context: Any = None,
    mask: Any = None,
    held_out: Any = None,
    method: Method = "iw",
    num_particles: int | None = None,
    temperatures: int = 100,
    leapfrog: int = 5,
    draws: int = 100,
    chunk: int = 2**20,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Score each datum by log p(x), its ELBO, its reconstruction and, for anomalies, a p-value.

    .. math:: \\log p(x_i) \\;\\ge\\; \\mathcal L_i = \\mathbb E_{q(z|x_i)} \\log \\frac{p(x_i, z)}{q(z | x_i)},
        \\qquad R_i = \\mathbb E_{q(z|x_i)} \\log p(x_i | z), \\qquad
        p_i = \\frac{1 + \\#\\{j : \\log p(h_j) \\le \\log p(x_i)\\}}{n + 1}

    The p-value is conformal: it compares log p(x) of a datum with that of n held-out rows h. If the datum and the
    held-out rows are exchangeable (new rows of one population), ``P(p ≤ a) ≤ a`` for every a, regardless of the quality
    of the model and of the Monte-Carlo error of log p(x). The probability includes the choice of the held-out rows. The
    smallest possible p-value is ``1 / (n + 1)``, so ``p ≤ 0.01`` needs at least 99 held-out rows. The p-values of
    several data share the held-out rows; the Benjamini-Hochberg procedure still controls the false discovery rate.

    The p-value is wrong for training data, since training raises their log p(x): training rows in ``held_out`` make the
    p-values too small, and training rows in ``data`` get too large p-values. Both raise an error if ``vae.trained_on``
    records the rows. Validation data that chose the weights (early stopping) are slightly affected, too.

    With missing values, log p(x) is that of the observed values, and rows that miss different values are not
    comparable. A datum is therefore compared only with the held-out rows that miss the same values; ``held_out_rows``
    counts them. Without such rows the p-value is NaN, and a :class:`~pyro_vae.errors.CalibrationWarning` is issued.

    A small p-value means that few rows of the population have such a low log p(x). The converse does not hold: data
    from another population can have a high log p(x) (Nalisnick et al., 2019).

    Args:
        vae: a VAE or a :class:`pyro_vae.Pair`.
        data: shape ``(datum, *features)``, a table, :class:`~pyro_vae.data.Data` with context and mask, or a stream,
            which is scored 4096 rows at a time.
        context: for a conditional VAE, shape ``(datum, c)``, or a table, matched by name, unless ``data`` hold it.
        mask: booleans, true where a value was observed, of the shape of the data, unless ``data`` hold it.
        held_out: rows of the same population that are not training data, in the form of ``data``, holding their context
            and mask.
        method: the estimator of log p(x): ``"iw"``, ``"psis"``, ``"ais"`` or ``"ais_prior"``, as in
            :func:`pyro_vae.log_evidence`.
        num_particles: draws or chains per datum for log p(x), as in :func:`pyro_vae.log_evidence`.
        temperatures: the number of temperatures of ``"ais"`` and ``"ais_prior"``.
        leapfrog: the number of leapfrog steps of ``"ais"`` and ``"ais_prior"``.
        draws: draws from q(z|x) per datum for the ELBO and the reconstruction, at least 2.
        chunk: the approximate number of decoded values to process at a time (64 times as many on a GPU).
        seed: of all draws.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``datum``, whose coordinates are the row labels of the data: ``log_px``, ``elbo`` and
        ``reconstruction`` in nats, each with its Monte-Carlo standard error (``log_px_mcse``, over particles;
        ``elbo_mcse`` and ``reconstruction_mcse``, over draws), and ``khat``, the Pareto shape of the tail of the
        weights (above 0.7, ``log_px`` is too low and its error is unreliable). With ``held_out``, also ``p_value`` and
        ``held_out_rows``, the number of held-out rows that the datum was compared with. ``attrs`` hold the settings,
        the hashes of both sets of rows, and which of the data are training data, if any.

    Raises:
        DataError: if the data are not finite numbers in rows, or are outside the support of the likelihood; with
            ``held_out``, if it is a stream, or rows of either set are training data.
        ModelError: if the VAE does not fit the data.
        SettingsError: if a setting is out of its range, or a stream is given together with a context or a mask.

    References:
        | Algorithmic Learning in a Random World (Vovk, Gammerman & Shafer, 2005), https://doi.org/10.1007/b106715
        | Testing for Outliers with Conformal p-values (Bates et al., 2023), https://arxiv.org/abs/2104.08279
        | Do Deep Generative Models Know What They Don't Know? (Nalisnick et al., 2019),
          https://arxiv.org/abs/1810.09136

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> x = torch.cat([linear.sample(3), torch.full((1, 5), 9.0)])
        >>> found = score(linear.as_vae(), x, held_out=linear.sample(199))
        >>> bool((abs(found.log_px - linear.log_marginal(x).numpy()) < 1e-4).all()), found.p_value.values[-1].item()
        (True, 0.005)
    """
    validate_method(method, ON_GIVEN_DATA)
    whole("draws", draws, 2)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    fresh = None if held_out is None else _fresh(vae, held_out)
    table = read(vae, data, context=context, mask=mask)
    evidence = partial(
        log_evidence, vae, method=method, num_particles=num_particles, temperatures=temperatures, leapfrog=leapfrog,
        chunk=chunk, progress=progress,
    )  # fmt: skip
    # Separate seeds: the draws are independent of those that made the data, and the errors of all rows exchangeable.
    known, first, pieces, hashes = None, 0, list[dict[str, np.ndarray]](), list[np.ndarray]()
    for rows in table.blocks(AT_ONCE if isinstance(table.rows, Streamed) else len(table)):
        hashes.append(row_hashes(rows))
        if fresh is not None:
            validate_not_trained_on(vae, hashes[-1], name="vae", source="data")
            if known is None:  # after validating the first rows, which is fast
                known = evidence(fresh, seed=derive_seed(seed, "log p(x) of held-out data"))
        found = evidence(rows, seed=derive_seed(seed, "log p(x) of the data", first))
        means = _over_draws(vae, rows, draws, chunk, derive_seed(seed, "draws of the ELBO", first))
        evidences = {name: found[variable].values for name, variable in OF_EVIDENCE.items()}
        pieces.append(evidences | dict(zip(OVER_DRAWS, means, strict=True)))
        if fresh is not None and known is not None:
            groups = _group_by_missing(rows, fresh)
            p, count = conformal_p_values(evidences["log_px"], known.log_evidence.values, *groups)
            pieces[-1] |= {"p_value": p, "held_out_rows": count}
        first += len(rows)
    values = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    every = np.concatenate(hashes)
    attrs = {
        **found.attrs, "draws": draws, "seed": seed, "data_hash": data_hash(every),
        "trained_on": trained_on(vae, every),
    }  # fmt: skip
    if fresh is not None:
        _warn_if_unmatched(values["held_out_rows"])
        attrs |= {"held_out": len(fresh), "held_out_hash": data_hash(row_hashes(fresh))}
    labels = range(first) if table.names.row_labels is None else np.asarray(table.names.row_labels)
    variables = {name: ("datum", value, {"units": UNITS.get(name, "nats")}) for name, value in values.items()}
    return xr.Dataset(variables, {"datum": labels}, attrs)


def _fresh(vae: Amortized, held_out: Any) -> Rows:
    """Return held-out rows in memory, after validating that they are not training data."""
    if isinstance(held_out, Source):
        raise DataError("held_out is a stream, but must be in memory; pass held_out.sample(10_000)")
    fresh = rows_for(vae, held_out, source="held_out")
    validate_not_trained_on(vae, row_hashes(fresh), name="vae", source="held_out")
    return fresh.like(vae)


def conformal_p_values(
    log_px: np.ndarray, held_out: np.ndarray, group: np.ndarray, held_out_group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare each log p(x) with those of the held-out rows of its group.

    .. math:: p_i = \\frac{1 + \\#\\{j : \\log p(h_j) \\le \\log p(x_i)\\}}{n + 1}

    Held-out rows whose log p(x) is NaN count as the least probable, so that they make no p-value too small.

    Args:
        log_px: log p(x) of the data, shape ``(datum,)``.
        held_out: log p(x) of the held-out rows, shape ``(row,)``.
        group: the group of each datum, a number; a datum is compared with the held-out rows of its group.
        held_out_group: the group of each held-out row.

    Returns:
        The p-values and the n of each, shape ``(datum,)``; a p-value is NaN if n is 0 or log p(x) is NaN.

    Example:
        >>> log_px, known = np.array([-9.0, -2.0, -1.0]), np.array([-3.0, -2.0, -1.5])
        >>> conformal_p_values(log_px, known, np.zeros(3), np.zeros(3))
        (array([0.25, 0.75, 1.  ]), array([3, 3, 3]))
    """
    p, count = np.full(len(log_px), np.nan), np.zeros(len(log_px), int)
    held_out = np.nan_to_num(held_out, nan=-np.inf, neginf=-np.inf, posinf=np.inf)
    for one in np.unique(group):
        members, known = np.flatnonzero(group == one), np.sort(held_out[held_out_group == one])
        count[members] = len(known)
        p[members] = (1 + np.searchsorted(known, log_px[members], side="right")) / (len(known) + 1)
    return np.where((count == 0) | np.isnan(log_px), np.nan, p), count


def _group_by_missing(rows: Rows, fresh: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Number the rows of both sets by their patterns of missing values."""
    bits = [np.packbits(_observed(each), axis=1) for each in (rows, fresh)]
    number = np.unique(np.concatenate(bits), axis=0, return_inverse=True)[1].reshape(-1)
    return number[: len(rows)], number[len(rows) :]


def _observed(rows: Rows) -> np.ndarray:
    """Return whether each value was observed, shape ``(datum, 1 + value)``; the first column is always true."""
    if rows.mask is None:
        return np.ones((len(rows), 1 + rows.x[0].numel()), bool)
    mask: np.ndarray = rows.mask.flatten(1).cpu().numpy()
    return np.concatenate([np.ones((len(rows), 1), bool), mask], 1)


def _warn_if_unmatched(count: np.ndarray) -> None:
    if unmatched := int((count == 0).sum()):
        warnings.warn(
            f"{unmatched} of {len(count)} data have no p-value, because no held-out row misses the same values; add "
            "such rows to held_out",
            CalibrationWarning,
            stacklevel=5,  # through the decorators of score
        )


def _over_draws(vae: Amortized, rows: Rows, draws: int, chunk: int, seed: int) -> np.ndarray:
    """Compute the variables of ``OVER_DRAWS``, shape ``(4, datum)``."""
    size = max(1, numbers_at_once(chunk, rows.x.device) // (draws * rows.x[0].numel()))
    with seeded(seed, rows.x.device), evaluating(vae, draws * min(size, len(rows))):
        parts = [
            _means(weigh(vae.model, without_enumeration(vae.guide), *part.arguments(), num_particles=draws))
            for part in rows.split(size)
        ]
    found: np.ndarray = torch.cat(parts, 1).cpu().numpy()
    return found


def _means(w: Weights) -> Tensor:
    """Return the mean log-weight and log-likelihood of each datum with their standard errors, shape ``(4, datum)``."""
    each = (w.log.double(), w.likelihood.double())
    return torch.stack([part for of in each for part in (of.mean(0), of.std(0) / math.sqrt(len(of)))])
