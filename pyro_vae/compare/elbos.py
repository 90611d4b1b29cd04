"""Estimators of the evidence side by side, with the same noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.infer import ELBO

from pyro_vae.__about__ import versions
from pyro_vae.compare.cells import cells, how_kl_is_had
from pyro_vae.compare.measure import Comparing, Labelled, why_not
from pyro_vae.compare.pair import Pair, Subject, subject_of
from pyro_vae.compare.table import as_comparison
from pyro_vae.core.device import describe_device, refuse_seed
from pyro_vae.core.progress import counting
from pyro_vae.core.traces import Loss, differentiable
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.elbo import (
    IWAE,
    STL,
    DReG,
    HandDerivedELBO,
    Renyi,
    Thermodynamic,
    Trace_ELBO,
    TraceMeanField_ELBO,
    kl_provenance,
)
from pyro_vae.elbo.given import as_estimator
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.evidence import known_evidence


def note_elbos() -> dict[str, Loss]:
    """Pyro's sampled and analytic ELBO, and the one derived by hand.

    Example:
        >>> list(note_elbos())
        ['Trace_ELBO', 'TraceMeanField_ELBO', 'HandDerivedELBO']
    """
    return {
        "Trace_ELBO": Trace_ELBO(),
        "TraceMeanField_ELBO": TraceMeanField_ELBO(),
        "HandDerivedELBO": HandDerivedELBO(),
    }


def default_elbos() -> dict[str, Loss]:
    """Those of :func:`note_elbos`, and one of each other kind that one would train with.

    Example:
        >>> list(default_elbos())[3:]
        ['STL', 'IWAE', 'DReG', 'Renyi', 'Thermodynamic']
    """
    own = {"STL": STL(), "IWAE": IWAE(), "DReG": DReG(), "Renyi": Renyi(alpha=0.5), "Thermodynamic": Thermodynamic()}
    return {**note_elbos(), **own}


@takes_settings
def compare_elbos(
    vae: VAE | Pair,
    x: Any,
    elbos: Mapping[str, Loss | type[ELBO]] | None = None,
    *,
    particles: Sequence[int] | None = None,
    draws: int = 100,
    size: int | None = None,
    log_evidence: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Compare estimators: value, bias, variance, gradient signal, time and memory, with the same noise.

    Each draw seeds the generator alike for every estimator (``noise_seed``), so what differs is the
    estimator. Layers are in evaluation mode: nothing is dropped out and no running mean moves.

    Args:
        vae: a VAE, or a :class:`Pair` of a Pyro model and guide; nothing is trained.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask; taken
            in the VAE's own precision and on its device.
        elbos: name → estimator, whatever ``SVI`` takes as ``loss=``, or its class; if not given,
            :func:`~pyro_vae.compare.elbos.default_elbos` without those that do not hold here (the attribute
            ``left_out`` says why).
        particles: the numbers K to compare each with; by default each estimator's own, or 1 where ``elbos`` is
            not given either.
        draws: how many independent draws of all latents, at least 2.
        size: the number of data that ``x`` stands for; the n of n/m.
        log_evidence: log p(x) per datum in nats: what :func:`pyro_vae.log_evidence` returns, or numbers of
            shape ``(datum,)``. If not given, the oracle's where the VAE is linear-Gaussian or has at most two
            latents (the attribute ``log_evidence`` says which).
        seed: of the draws.
        progress: whether to show a bar.

    Returns:
        A dataset over ``estimator``, ``particles`` and ``parameter_group`` (all, Θ, φ, each module that has
        parameters itself), NaN where an estimator cannot have so many particles. In nats per datum:

        - ``elbo``, ``elbo_se``, ``elbo_sd``: the bound, its Monte-Carlo standard error for these data, and the
          spread of a single draw; ``value (…, draw)``: each draw; ``datum_elbo (…, datum)``: the mean over draws;
        - ``bias``, ``bias_se``: the bound minus log p(x);
        - ``difference``, ``gradient_difference``: the largest difference from the hand-derived ELBO of one datum
          in one draw, and of a draw's gradient, relative to the norm of the latter.

        Of the gradient, per datum, with ``_se`` by the jackknife over ten blocks of draws:

        - ``gradient_norm``: the norm of its mean; ``gradient_variance``: its total variance in one draw;
        - ``gradient_snr``: the root of the ratio of the former squared to the latter;
        - ``gradient_bias``: the distance of its mean from that of another unbiased estimator of the same bound
          (as many particles, twice the draws, other noise), relative to the norm of the latter; 0 where the noise hides
          it, NaN where no other such estimator is known;
        - ``gradient_khat``: the shape of the tail of its squared norm over draws, NaN for fewer than 25: above 0.7 the
          errors of these numbers cannot be trusted;
        - ``elbo_alignment``: the cosine between its mean and that of the ELBO: by how much a small step along it
          raises the ELBO, relative to a step of the same length along the ELBO's gradient.

        Of the cost: ``seconds`` (median of one evaluation with gradient; ``seconds_se``), ``peak_memory`` (bytes);
        and what decides: ``variance_seconds`` (``gradient_variance · seconds``), ``efficiency``
        (``gradient_snr² / seconds``) and ``speedup`` (the efficiency, relative to that with the fewest particles:
        above 1, more particles pay).
        Coordinates: ``kl``, how the KL is computed; ``target (…)``, the bound that is estimated, such as "ELBO",
        "IWAE(8)" or, where it is not known, the estimator's own name; ``bound``, those of all K; ``known_bias``;
        ``noise_seed (draw)``. ``print`` shows it as a table.

    Raises:
        DataError: if the data are not finite numbers in rows.
        SettingsError: if ``draws`` is below 2, or ``elbos`` holds no estimator.
        ModelError: if the VAE does not fit the data, has no gradients, or an estimator is not a sum over data.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> table = compare_elbos(linear.as_vae(diagonal=True), linear.sample(20), draws=5)
        >>> bool(table.difference.sel(estimator="TraceMeanField_ELBO") < 1e-12)
        True
    """
    refuse_seed(seed)
    if whole("draws", draws, 1) < 2:
        raise SettingsError(f"draws is {draws}; a standard error needs at least 2")
    if elbos is not None and not isinstance(elbos, Mapping):
        raise SettingsError(f"elbos is {_shown(elbos)}; give a name for each, as {{'STL': pv.elbo.STL()}}")
    particles = None if particles is None else _as_numbers(particles)
    subject = subject_of(vae, x, size)
    offered = default_elbos() if elbos is None else {n: as_estimator(e, f"elbos[{n!r}]") for n, e in elbos.items()}
    particles = (1,) if elbos is None and particles is None else particles
    refuse_choices(offered, particles)
    _refuse(subject)
    missing = why_not(subject, HandDerivedELBO())
    chosen, left_out = cells(offered, particles)
    if elbos is None:
        unfit = {cell.name: why for cell in chosen if (why := why_not(subject, cell.loss))}
        chosen = [cell for cell in chosen if cell.name not in unfit]
        left_out += [f"{name}: {why}" for name, why in unfit.items()]
    if not chosen:
        raise SettingsError(f"no estimator is left to compare ({'; '.join(left_out)}); choose others")
    truth, truth_se, source = known_evidence(vae, subject.rows, log_evidence)
    most = max(cell.particles for cell in chosen)
    with subject.evaluating(most), counting("Comparing estimators", progress) as count:
        used = {"threads": torch.get_num_threads(), "device": describe_device(subject.device)}
        found = Comparing(subject, chosen, draws, seed, by_hand=not missing, count=count).run()
        provenance = _provenance(subject)
    table = Labelled(chosen, list(offered), list(subject.groups())).dataset(found, truth, truth_se)
    kl = {cell.name: how_kl_is_had(cell.loss, provenance) for cell in chosen}
    labelled = table.assign_coords(
        kl=("estimator", [kl[n] for n in table.estimator.values]), noise_seed=("draw", found.seeds)
    ).assign_attrs(
        draws=draws, seed=seed, size=subject.size, dtype=str(subject.rows.x.dtype), **used,
        reference=missing or "HandDerivedELBO", log_evidence=source,
        left_out="; ".join(left_out), **versions(),
    )  # fmt: skip
    return as_comparison(labelled)


def _shown(elbos: Any) -> str:
    return f"the class {elbos.__name__}" if isinstance(elbos, type) else f"a {type(elbos).__name__}"


def _as_numbers(particles: Any) -> list[int]:
    try:
        return [k if isinstance(k, bool) else int(k) if int(k) == k else k for k in particles]
    except (TypeError, ValueError) as error:
        raise SettingsError(f"particles is {particles!r}; give a sequence of whole numbers, as (1, 8)") from error


def refuse_choices(losses: Mapping[str, Loss], particles: Sequence[int] | None) -> None:
    """Refuse estimators and numbers of particles that nothing can be made of.

    Example:
        >>> refuse_choices(default_elbos(), [1, 8])
    """
    if not losses:
        raise SettingsError("elbos is empty; give at least one estimator, or none for the default ones")
    if particles is not None and (not particles or any(type(k) is not int or k < 1 for k in particles)):
        raise SettingsError(f"particles is {list(particles)}; give whole numbers of at least 1")
    for loss in losses.values():
        differentiable(loss)
    chosen, left_out = cells(losses, particles)
    if not chosen:
        raise SettingsError(f"no estimator is left to compare ({'; '.join(left_out)}); choose others")


def _refuse(subject: Subject) -> None:
    if subject.rows.x.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"the VAE computes in {subject.rows.x.dtype}, too coarse to compare in; use vae.float() or vae.double()"
        )
    if not subject.parameters:
        raise ModelError(
            "there are no gradients to compare: every parameter is frozen, or none was registered, as by pyro.module"
        )


def _provenance(subject: Subject) -> str:
    found = kl_provenance(subject.model, subject.guide, *subject.arguments)
    return ", ".join(sorted(set(found.values())))


def verdict(comparison: xr.Dataset) -> str:
    """One sentence on how Pyro's analytic-KL ELBO and the hand-derived one agree.

    Args:
        comparison: from :func:`compare_elbos`, with ``TraceMeanField_ELBO`` among the estimators.

    Returns:
        The sentence, with the largest differences seen.

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> print(verdict(compare_elbos(linear.as_vae(diagonal=True), linear.sample(20), note_elbos(), draws=5)))
        Pyro's analytic-KL ELBO and the hand-derived ELBO agree to ... nats per datum and their gradients to ...
    """
    if comparison.attrs["reference"].startswith("none"):
        return f"There is no hand-derived ELBO of this VAE to compare with ({comparison.attrs['reference'][6:]})."
    row = comparison.sel(estimator="TraceMeanField_ELBO")
    difference, gradient = float(row.difference.max()), float(row.gradient_difference.max())
    if np.isnan(difference):
        return "Pyro's analytic-KL ELBO and the hand-derived ELBO are not compared: they are no finite numbers here."
    # Each value is a sum of rounded terms: a thousand units in the last place is agreement.
    rounding = 1000 * float(np.finfo(comparison.attrs["dtype"].removeprefix("torch.")).eps)
    scale = float(np.abs(comparison.datum_elbo).max())
    agree = difference <= rounding * max(scale, 1.0) and gradient <= rounding
    return (
        f"Pyro's analytic-KL ELBO and the hand-derived ELBO {'agree' if agree else 'DISAGREE: they differ by up'} to "
        f"{difference:.0e} nats per datum and their gradients to {gradient:.0e} (relative)."
    )
