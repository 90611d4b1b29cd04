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
from pyro_vae.core.device import derive_seed, numbers_at_once, refuse_seed, seeded
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import data_hash, refuse_trained_on, row_hashes, trained_on
from pyro_vae.data.rows import rows_for
from pyro_vae.data.sources import Source
from pyro_vae.data.streams import Streamed
from pyro_vae.elbo.log_weights import Weights, weigh, without_enumeration
from pyro_vae.errors import CalibrationWarning, DataError
from pyro_vae.evidence.estimate import METHODS, Method, log_evidence, refuse_method
from pyro_vae.use.inputs import read

ON_GIVEN_DATA = tuple(name for name in METHODS if name != "bdmc")
"""The methods that estimate log p(x) of the data that are given, not of simulated ones."""

AT_ONCE = 4096
"""So many rows of a stream are scored at a time."""

OF_EVIDENCE = {"log_px": "log_evidence", "log_px_mcse": "mcse", "khat": "khat"}
"""What a score takes of the evidence, and by what name."""

UNITS = {"khat": "1", "p_value": "1", "held_out_rows": "rows"}
"""The units of what is not in nats."""

OVER_DRAWS = ("elbo", "elbo_mcse", "reconstruction", "reconstruction_mcse")


@torch.no_grad()
@takes_settings
def score(
    vae: VAE,
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

    The p-value is conformal: it compares log p(x) of a datum with that of n held-out rows h. Where the datum and the
    held-out rows are exchangeable (fresh rows of one population), ``P(p ≤ a) ≤ a`` for every a, however bad the model
    is, and whatever the Monte-Carlo error of log p(x). The probability is over held-out sets, too. The smallest
    possible p-value is ``1 / (n + 1)``, so ``p ≤ 0.01`` takes at least 99 held-out rows. The p-values of several data
    share the held-out rows; the procedure of Benjamini and Hochberg still controls their false discovery rate.

    The p-value is wrong for rows that the VAE was trained on, since training raises their log p(x): held-out rows that
    were trained on make the p-values too small, data that were trained on get too large ones. Both are refused where
    ``vae.trained_on`` shows it. Validation data that chose the weights (early stopping) are slightly affected, too.

    Where values are missing, log p(x) is that of the observed ones, and rows that miss other values are not comparable.
    A datum is therefore compared only with the held-out rows that miss the same values; ``held_out_rows`` counts them,
    and where there are none, the p-value is NaN and a :class:`~pyro_vae.errors.CalibrationWarning` says for how many.

    A small p-value says that few rows of the population have so low a log p(x). The converse fails: data of another
    kind can have a high log p(x) (Nalisnick et al., 2019).

    Args:
        vae: a VAE.
        data: shape ``(datum, *features)``, a table, :class:`~pyro_vae.data.Data` with context and mask, or a stream,
            which is scored 4096 rows at a time.
        context: shape ``(datum, c)``, for a conditional VAE; or in ``data``.
        mask: booleans, true where a value was observed, of the shape of the data; or in ``data``.
        held_out: rows of the same population that the VAE was not trained on, as ``data``, with context and mask in it.
        method: of log p(x): ``"iw"``, ``"psis"``, ``"ais"`` or ``"ais_prior"``, as in :func:`pyro_vae.log_evidence`.
        num_particles: draws or chains per datum for log p(x), as there.
        temperatures: of ``"ais"`` and ``"ais_prior"``.
        leapfrog: of ``"ais"`` and ``"ais_prior"``.
        draws: from q(z|x) per datum, for the ELBO and the reconstruction, at least 2.
        chunk: about so many numbers of decoded data at a time, on a GPU 64 times as many.
        seed: of all draws.
        progress: whether to show a bar.

    Returns:
        A dataset over ``datum``, whose coordinates are the row labels of the data: ``log_px``, ``elbo`` and
        ``reconstruction`` in nats, each with its Monte-Carlo standard error (``log_px_mcse``, over particles;
        ``elbo_mcse`` and ``reconstruction_mcse``, over draws), and ``khat``, the shape of the tail of the weights
        (above 0.7, ``log_px`` is too low and its error is not to be relied on). With ``held_out``, ``p_value`` and
        ``held_out_rows``, with how many held-out rows the datum was compared. ``attrs`` hold the settings, the hashes
        of both sets of rows, and which of the data were trained on, if any.

    Raises:
        DataError: if the data are not finite numbers in rows, or are outside the support of the likelihood; with
            ``held_out``, if that is a stream, or rows of either set were trained on.
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
    refuse_method(method, ON_GIVEN_DATA)
    whole("draws", draws, 2)
    whole("chunk", chunk, 1)
    refuse_seed(seed)
    fresh = None if held_out is None else _fresh(vae, held_out)
    table = read(vae, data, context=context, mask=mask)
    evidence = partial(
        log_evidence, vae, method=method, num_particles=num_particles, temperatures=temperatures, leapfrog=leapfrog,
        chunk=chunk, progress=progress,
    )  # fmt: skip
    # Seeds of their own: no draw follows those that made the data, and the errors of all rows are exchangeable.
    known, first, pieces, hashes = None, 0, list[dict[str, np.ndarray]](), list[np.ndarray]()
    for rows in table.blocks(AT_ONCE if isinstance(table.rows, Streamed) else len(table)):
        hashes.append(row_hashes(rows))
        if fresh is not None:
            refuse_trained_on(vae, hashes[-1], name="vae", source="data")
            if known is None:  # only once no row was refused
                known = evidence(fresh, seed=derive_seed(seed, "log p(x) of held-out data"))
        found = evidence(rows, seed=derive_seed(seed, "log p(x) of the data", first))
        means = _over_draws(vae, rows, draws, chunk, derive_seed(seed, "draws of the ELBO", first))
        own = {name: found[given].values for name, given in OF_EVIDENCE.items()}
        pieces.append(own | dict(zip(OVER_DRAWS, means, strict=True)))
        if fresh is not None and known is not None:
            groups = _alike(rows, fresh)
            p, count = conformal_p_values(own["log_px"], known.log_evidence.values, *groups)
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


def _fresh(vae: VAE, held_out: Any) -> Rows:
    """Held-out rows in memory, seen not to be trained on."""
    if isinstance(held_out, Source):
        raise DataError("held_out: a stream, and rows in memory are needed; give held_out.sample(10_000)")
    fresh = rows_for(vae, held_out, source="held_out")
    refuse_trained_on(vae, row_hashes(fresh), name="vae", source="held_out")
    return fresh.like(vae)


def conformal_p_values(
    log_px: np.ndarray, held_out: np.ndarray, group: np.ndarray, held_out_group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare each log p(x) with those of the held-out rows of its group.

    .. math:: p_i = \\frac{1 + \\#\\{j : \\log p(h_j) \\le \\log p(x_i)\\}}{n + 1}

    Held-out rows whose log p(x) is NaN count as the least probable ones, so that no p-value gets too small by them.

    Args:
        log_px: of the data, shape ``(datum,)``.
        held_out: of the held-out rows, shape ``(row,)``.
        group: a number for each datum; only held-out rows of the same group are compared with it.
        held_out_group: that of each held-out row.

    Returns:
        The p-values and the n of each, shape ``(datum,)``; NaN where n is 0 or log p(x) is NaN.

    Example:
        >>> log_px, known = np.array([-9.0, -2.0, -1.0]), np.array([-3.0, -2.0, -1.5])
        >>> conformal_p_values(log_px, known, np.zeros(3), np.zeros(3))
        (array([0.25, 0.75, 1.  ]), array([3, 3, 3]))
    """
    p, count = np.full(len(log_px), np.nan), np.zeros(len(log_px), int)
    held_out = np.nan_to_num(held_out, nan=-np.inf, neginf=-np.inf, posinf=np.inf)
    for one in np.unique(group):
        own, known = np.flatnonzero(group == one), np.sort(held_out[held_out_group == one])
        count[own] = len(known)
        p[own] = (1 + np.searchsorted(known, log_px[own], side="right")) / (len(known) + 1)
    return np.where((count == 0) | np.isnan(log_px), np.nan, p), count


def _alike(rows: Rows, fresh: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Number the rows of both by which of their values are missing."""
    bits = [np.packbits(_observed(each), axis=1) for each in (rows, fresh)]
    number = np.unique(np.concatenate(bits), axis=0, return_inverse=True)[1].reshape(-1)
    return number[: len(rows)], number[len(rows) :]


def _observed(rows: Rows) -> np.ndarray:
    """Whether each value of each row was observed, shape ``(datum, value)``, with one value that always was."""
    if rows.mask is None:
        return np.ones((len(rows), 1 + rows.x[0].numel()), bool)
    mask: np.ndarray = rows.mask.flatten(1).cpu().numpy()
    return np.concatenate([np.ones((len(rows), 1), bool), mask], 1)


def _warn_if_unmatched(count: np.ndarray) -> None:
    if unmatched := int((count == 0).sum()):
        warnings.warn(
            f"{unmatched} of {len(count)} data have no p-value, as no held-out row misses the same values; give "
            "held-out rows that do",
            CalibrationWarning,
            stacklevel=5,  # through the decorators of score
        )


def _over_draws(vae: VAE, rows: Rows, draws: int, chunk: int, seed: int) -> np.ndarray:
    """The variables of ``OVER_DRAWS``, shape ``(4, datum)``."""
    size = max(1, numbers_at_once(chunk, rows.x.device) // (draws * rows.x[0].numel()))
    with seeded(seed, rows.x.device), evaluating(vae, draws * min(size, len(rows))):
        parts = [
            _means(weigh(vae.model, without_enumeration(vae.guide), *part.arguments(), num_particles=draws))
            for part in rows.split(size)
        ]
    found: np.ndarray = torch.cat(parts, 1).cpu().numpy()
    return found


def _means(w: Weights) -> Tensor:
    """The mean log-weight and log-likelihood of each datum with their standard errors, shape ``(4, datum)``."""
    each = (w.log.double(), w.likelihood.double())
    return torch.stack([part for of in each for part in (of.mean(0), of.std(0) / math.sqrt(len(of)))])
