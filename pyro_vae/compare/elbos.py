"""Compare estimators of the evidence with the same noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.infer import ELBO

from pyro_vae.__about__ import versions
from pyro_vae.compare.cells import cells, kl_method
from pyro_vae.compare.measure import Measurer, Tabulator, reason_not_applicable
from pyro_vae.compare.pair import Pair, Subject, subject_of
from pyro_vae.compare.table import as_comparison
from pyro_vae.core.device import describe_device, validate_seed
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
from pyro_vae.errors import ModelError, SettingsError, type_of
from pyro_vae.evidence import known_evidence


def note_elbos() -> dict[str, Loss]:
    """Return Pyro's sampled and analytic ELBO, and the hand-derived ELBO.

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
    """Return the estimators of :func:`note_elbos` and one of each other common kind.

    Example:
        >>> list(default_elbos())[3:]
        ['STL', 'IWAE', 'DReG', 'Renyi', 'Thermodynamic']
    """
    more = {"STL": STL(), "IWAE": IWAE(), "DReG": DReG(), "Renyi": Renyi(alpha=0.5), "Thermodynamic": Thermodynamic()}
    return {**note_elbos(), **more}


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

    Each draw uses the same generator seed for every estimator (``noise_seed``), so that only the estimators differ.
    Modules are in evaluation mode: dropout is off and running means do not change.

    Args:
        vae: a VAE, or a :class:`Pair` of a Pyro model and guide; nothing is trained.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask; converted
            to the VAE's precision and device.
        elbos: name → estimator or its class, anything that ``SVI`` accepts as ``loss=``. By default
            :func:`~pyro_vae.compare.elbos.default_elbos` without those that do not apply to this VAE (the
            attribute ``left_out`` gives the reasons).
        particles: the numbers K to compare each estimator with; by default the estimator's own, or 1 if ``elbos`` is
            not given either.
        draws: the number of independent draws of all latents, at least 2.
        size: the number of data that ``x`` represents; the n of n/m.
        log_evidence: log p(x) per datum in nats: the result of :func:`pyro_vae.log_evidence`, or numbers of
            shape ``(datum,)``. By default computed exactly if the VAE is linear-Gaussian, or by quadrature if it has
            at most two latents (the attribute ``log_evidence`` gives the source).
        seed: of the draws.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``estimator``, ``particles`` and ``parameter_group`` (all, Θ, φ, each module that has its own
        parameters), NaN where an estimator does not support the number of particles. In nats per datum:

        - ``elbo``, ``elbo_se``, ``elbo_sd``: the bound, its Monte-Carlo standard error for these data, and the
          standard deviation of a single draw; ``value (…, draw)``: each draw; ``datum_elbo (…, datum)``: the mean over
          draws;
        - ``bias``, ``bias_se``: the bound minus log p(x);
        - ``difference``, ``gradient_difference``: the largest difference from the hand-derived ELBO of one datum
          in one draw, and of a draw's gradient, relative to the norm of the hand-derived gradient.

        Of the gradient, per datum, with ``_se`` by the jackknife over ten blocks of draws:

        - ``gradient_norm``: the norm of the mean gradient; ``gradient_variance``: the total variance of one draw;
        - ``gradient_snr``: ``gradient_norm / √gradient_variance``;
        - ``gradient_bias``: the distance of the mean gradient from that of another unbiased estimator of the same
          bound (as many particles, twice the draws, other noise), relative to the norm of the latter; 0 where the noise
          hides it, NaN where no such estimator is known;
        - ``gradient_khat``: the shape of the tail of the squared gradient norm over draws, NaN for fewer than 25 draws:
          above 0.7 the errors of these numbers are unreliable;
        - ``elbo_alignment``: the cosine between the mean gradient and that of the ELBO: how much a small step along
          the gradient raises the ELBO, relative to a step of the same length along the ELBO's gradient.

        Of the cost: ``seconds`` (median of one evaluation with gradient; ``seconds_se``), ``peak_memory`` (bytes).
        To choose an estimator: ``variance_seconds`` (``gradient_variance · seconds``), ``efficiency``
        (``gradient_snr² / seconds``) and ``speedup`` (the efficiency relative to that with the fewest particles:
        above 1, more particles pay).
        Coordinates: ``kl``, how the KL is computed; ``target (…)``, the estimated bound, such as "ELBO", "IWAE(8)" or,
        if it is unknown, the estimator's own name; ``bound``, the bounds of all K; ``known_bias``;
        ``noise_seed (draw)``. ``print`` shows a table.

    Raises:
        DataError: if the data are not finite numbers in rows.
        SettingsError: if ``draws`` is below 2, or ``elbos`` holds no estimator.
        ModelError: if the VAE does not match the data or has no gradients, or an estimator is not a sum over data.

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
    validate_seed(seed)
    if whole("draws", draws, 1) < 2:
        raise SettingsError(f"draws is {draws}; a standard error needs at least 2")
    if elbos is not None and not isinstance(elbos, Mapping):
        raise SettingsError(f"elbos is {_shown(elbos)}; pass a dict of estimators, such as {{'STL': pv.elbo.STL()}}")
    particles = None if particles is None else _as_numbers(particles)
    subject = subject_of(vae, x, size)
    offered = default_elbos() if elbos is None else {n: as_estimator(e, f"elbos[{n!r}]") for n, e in elbos.items()}
    particles = (1,) if elbos is None and particles is None else particles
    validate_choices(offered, particles)
    _validate_subject(subject)
    missing = reason_not_applicable(subject, HandDerivedELBO())
    chosen, left_out = cells(offered, particles)
    if elbos is None:
        unfit = {cell.name: why for cell in chosen if (why := reason_not_applicable(subject, cell.loss))}
        chosen = [cell for cell in chosen if cell.name not in unfit]
        left_out += [f"{name}: {why}" for name, why in unfit.items()]
    if not chosen:
        raise SettingsError(f"elbos: none of the estimators applies ({'; '.join(left_out)}); choose others")
    truth, truth_se, source = known_evidence(vae, subject.rows, log_evidence)
    most = max(cell.particles for cell in chosen)
    with subject.evaluating(most), counting("Comparing estimators", progress) as count:
        used = {"threads": torch.get_num_threads(), "device": describe_device(subject.device)}
        found = Measurer(subject, chosen, draws, seed, has_hand_derived=not missing, count=count).run()
        provenance = _provenance(subject)
    table = Tabulator(chosen, list(offered), list(subject.groups())).dataset(found, truth, truth_se)
    kl = {cell.name: kl_method(cell.loss, provenance) for cell in chosen}
    labelled = table.assign_coords(
        kl=("estimator", [kl[n] for n in table.estimator.values]), noise_seed=("draw", found.seeds)
    ).assign_attrs(
        draws=draws, seed=seed, size=subject.size, dtype=str(subject.rows.x.dtype), **used,
        reference=missing or "HandDerivedELBO", log_evidence=source,
        left_out="; ".join(left_out), **versions(),
    )  # fmt: skip
    return as_comparison(labelled)


def _shown(elbos: Any) -> str:
    return f"the class {elbos.__name__}" if isinstance(elbos, type) else type_of(elbos)


def _as_numbers(particles: Any) -> list[int]:
    try:
        return [k if isinstance(k, bool) else int(k) if int(k) == k else k for k in particles]
    except (TypeError, ValueError) as error:
        raise SettingsError(f"particles is {particles!r}; pass a sequence of whole numbers, such as (1, 8)") from error


def validate_choices(losses: Mapping[str, Loss], particles: Sequence[int] | None) -> None:
    """Raise if the estimators or the numbers of particles are invalid, or none can be combined.

    Example:
        >>> validate_choices(default_elbos(), [1, 8])
    """
    if not losses:
        raise SettingsError("elbos is empty; pass at least one estimator, or None for the default ones")
    if particles is not None and (not particles or any(type(k) is not int or k < 1 for k in particles)):
        raise SettingsError(f"particles is {list(particles)}; pass whole numbers of at least 1")
    for loss in losses.values():
        differentiable(loss)
    chosen, left_out = cells(losses, particles)
    if not chosen:
        raise SettingsError(f"elbos: none of the estimators applies ({'; '.join(left_out)}); choose others")


def _validate_subject(subject: Subject) -> None:
    if subject.rows.x.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"the VAE computes in {subject.rows.x.dtype}, too coarse to compare estimators; use vae.float() or "
            "vae.double()"
        )
    if not subject.parameters:
        raise ModelError(
            "there are no gradients to compare: every parameter is frozen or unregistered; set requires_grad, or "
            "register the modules with pyro.module"
        )


def _provenance(subject: Subject) -> str:
    found = kl_provenance(subject.model, subject.guide, *subject.arguments)
    return ", ".join(sorted(set(found.values())))


def verdict(comparison: xr.Dataset) -> str:
    """Say in one sentence whether Pyro's analytic-KL ELBO and the hand-derived ELBO agree.

    Args:
        comparison: from :func:`compare_elbos`, with ``TraceMeanField_ELBO`` among the estimators.

    Returns:
        The sentence, with the largest differences.

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> print(verdict(compare_elbos(linear.as_vae(diagonal=True), linear.sample(20), note_elbos(), draws=5)))
        Pyro's analytic-KL ELBO and the hand-derived ELBO agree to ... nats per datum and their gradients to ...
    """
    if comparison.attrs["reference"].startswith("none"):
        return f"This VAE has no hand-derived ELBO to compare with ({comparison.attrs['reference'][6:]})."
    row = comparison.sel(estimator="TraceMeanField_ELBO")
    difference, gradient = float(row.difference.max()), float(row.gradient_difference.max())
    if np.isnan(difference):
        return "Pyro's analytic-KL ELBO and the hand-derived ELBO cannot be compared: they are not finite."
    # Each value is a sum of rounded terms: a thousand units in the last place count as agreement.
    rounding = 1000 * float(np.finfo(comparison.attrs["dtype"].removeprefix("torch.")).eps)
    scale = float(np.abs(comparison.datum_elbo).max())
    agree = difference <= rounding * max(scale, 1.0) and gradient <= rounding
    return (
        f"Pyro's analytic-KL ELBO and the hand-derived ELBO {'agree' if agree else 'DISAGREE: they differ by up'} to "
        f"{difference:.0e} nats per datum and their gradients to {gradient:.0e} (relative)."
    )
