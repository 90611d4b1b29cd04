"""Estimators of the ELBO side by side, with the same noise."""

import copy
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core import VAE, evaluating
from pyro_vae.device import describe_device, refuse_seed, seeded
from pyro_vae.elbo import HandDerivedELBO, Trace_ELBO, TraceMeanField_ELBO, kl_provenance, note_objective
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.rows import Rows, rows_of
from pyro_vae.traces import Loss, differentiable, loss_name, particles_of

TIMED_REPEATS = 11
"""How often each estimator is timed; the median is reported."""


def default_elbos() -> dict[str, Loss]:
    """Pyro's sampled and analytic ELBO, and the one derived by hand.

    Example:
        >>> list(default_elbos())
        ['Trace_ELBO', 'TraceMeanField_ELBO', 'HandDerivedELBO']
    """
    return {
        "Trace_ELBO": Trace_ELBO(),
        "TraceMeanField_ELBO": TraceMeanField_ELBO(),
        "HandDerivedELBO": HandDerivedELBO(),
    }


def compare_elbos(
    vae: VAE,
    x: Any,
    elbos: Mapping[str, Loss] | None = None,
    *,
    draws: int = 100,
    size: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Compare estimators of the ELBO, draw by draw with the same noise.

    Each draw seeds the generator alike for every estimator (``noise_seed``), so what differs is the
    estimator. Layers are in evaluation mode: nothing is dropped out and no running mean moves.
    Differences are from :class:`~pyro_vae.elbo.HandDerivedELBO` with as many particles.

    Args:
        vae: the VAE; nothing is trained.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask; taken
            in the VAE's own precision and on its device.
        elbos: name → estimator, whatever ``SVI`` takes as ``loss=``; :func:`default_elbos` if not given,
            without the hand-derived one where it does not hold (differences are then NaN, and the
            attribute ``reference`` says why).
        draws: how many independent draws of all latents, at least 2.
        size: the number of data that ``x`` stands for; the n of n/m.
        seed: of the draws.

    Returns:
        A dataset over ``estimator``, ``draw`` and ``datum``, in nats per datum:

        - ``elbo``, ``elbo_se``: the mean over draws and its Monte-Carlo standard error, for these data;
        - ``elbo_sd``: the spread of a single draw;
        - ``value (estimator, draw)``: each draw; ``datum_elbo (estimator, datum)``: the mean over draws;
        - ``difference``: the largest difference from the hand-derived ELBO of one datum in one draw;
        - ``gradient_difference``: the largest norm of a draw's gradient minus the hand-derived one,
          relative to the norm of the latter;
        - ``seconds``: the median time of one evaluation with gradient;
        - the coordinates ``kl``: how the KL is had; ``noise_seed (draw)``.

    Raises:
        DataError: if the data are not finite numbers in rows.
        SettingsError: if ``draws`` is below 2, or ``elbos`` holds no estimator.
        ModelError: if the VAE does not fit the data, has no gradients, or an estimator is not a sum over data.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> table = compare_elbos(linear.as_vae(diagonal=True), linear.sample(20), draws=5)
        >>> bool(table.difference.sel(estimator="TraceMeanField_ELBO") < 1e-12)
        True
    """
    rows = rows_of(x)
    refuse_seed(seed)
    if draws < 2:
        raise SettingsError(f"draws is {draws}; a standard error needs at least 2")
    vae.check(rows.x, rows.context)
    rows, size = rows.like(vae), len(rows) if size is None else size
    missing = _why_no_reference(vae, rows)
    offered = default_elbos() if elbos is None else dict(elbos)
    if elbos is None and missing:
        del offered["HandDerivedELBO"]
    chosen = {name: _of_one_plate(loss) for name, loss in offered.items()}
    _refuse(vae, rows.x, chosen)
    seeds = torch.randint(2**62, (draws,), generator=torch.Generator().manual_seed(seed)).tolist()
    with pyro.validation_enabled(False), torch.enable_grad(), evaluating(vae):
        pairs = {
            name: _draws(vae, rows, size, loss, seeds, with_reference=not missing) for name, loss in chosen.items()
        }
        seconds = _median_seconds(vae, rows, size, chosen, seed)
        first = rows.take(slice(1))
        provenance = ", ".join(sorted(set(kl_provenance(vae.model, vae.guide, *first.arguments()).values())))
    table = _dataset(pairs, seconds, [_kl(loss, provenance) for loss in chosen.values()])
    return table.assign_coords(noise_seed=("draw", seeds)).assign_attrs(
        draws=draws, seed=seed, size=size, dtype=str(rows.x.dtype), threads=torch.get_num_threads(),
        device=describe_device(rows.x.device), reference=missing or "HandDerivedELBO", **versions(),
    )  # fmt: skip


def _of_one_plate(loss: Loss) -> Loss:
    """A copy that knows the plates of a VAE: Pyro would guess them at first use, and draw noise to do so."""
    if not isinstance(loss, ELBO):
        return loss
    known = copy.copy(loss)
    known.max_plate_nesting = 1 + (known.vectorize_particles and known.num_particles > 1)
    return known


def _refuse(vae: VAE, x: Tensor, losses: Mapping[str, Loss]) -> None:
    if not losses:
        raise SettingsError("elbos is empty; give at least one estimator, or none for the default three")
    if x.dtype not in (torch.float32, torch.float64):
        raise ModelError(f"the VAE computes in {x.dtype}, too coarse to compare in; use vae.float() or vae.double()")
    if torch.is_inference_mode_enabled() or not any(p.requires_grad for p in vae.parameters()):
        raise ModelError("there are no gradients to compare: every parameter is frozen, or inference mode is on")
    for name, loss in losses.items():
        if isinstance(loss, type):
            raise SettingsError(f"elbos[{name!r}] is a class; give an instance, {loss.__name__}()")
        differentiable(loss)


def _why_no_reference(vae: VAE, rows: Rows) -> str:
    """Why the hand-derived ELBO does not hold for this VAE; nothing where it does."""
    first = rows.take(slice(1))
    try:
        with evaluating(vae), seeded(0, rows.x.device):
            HandDerivedELBO().differentiable_loss(vae.model, vae.guide, *first.arguments())
    except ModelError as error:
        return f"none: {error}"
    return ""


def _draws(
    vae: VAE, rows: Rows, size: int, loss: Loss, seeds: list[int], *, with_reference: bool
) -> dict[str, np.ndarray]:
    """Per draw the ELBO of each datum, and how it and the gradient differ from the hand-derived one."""
    vectorized = getattr(loss, "vectorize_particles", False)
    reference = _of_one_plate(HandDerivedELBO(particles_of(loss), vectorize_particles=vectorized))
    values, differences, gradients = [], [], []
    for seed in seeds:
        value, gradient = _evaluate(vae, rows, size, loss, seed)
        nothing = value * torch.nan, gradient * torch.nan
        by_hand, hand_gradient = _evaluate(vae, rows, size, reference, seed) if with_reference else nothing
        values.append(value)
        differences.append((value - by_hand).abs().max())
        gradients.append((gradient - hand_gradient).norm() / hand_gradient.norm())
    return {
        "datum": torch.stack(values).double().cpu().numpy(),
        "difference": torch.stack(differences).double().cpu().numpy(),
        "gradient": torch.stack(gradients).double().cpu().numpy(),
    }


def _evaluate(vae: VAE, rows: Rows, size: int, loss: Loss, seed: int) -> tuple[Tensor, Tensor]:
    """The ELBO of each datum, and the gradient of minus their sum per datum.

    Every term of a datum is scaled by its own weight of 1. The loss is linear in these weights, so
    its derivative by each of them is that datum's part of it: one evaluation gives all parts.
    """
    x = rows.x
    weights = torch.ones(len(x), dtype=x.dtype, device=x.device, requires_grad=True)
    model, guide = (poutine.scale(program, scale=weights) for program in (vae.model, vae.guide))
    parameters = [p for p in vae.parameters() if p.requires_grad]
    with seeded(seed, x.device):
        total = differentiable(loss)(model, guide, *rows.arguments(size))
    parts, *gradients = torch.autograd.grad(total, [weights, *parameters], materialize_grads=True)
    if (parts.sum() - total.detach()).abs() > 1e4 * torch.finfo(x.dtype).eps * parts.abs().sum():
        raise ModelError(f"{loss_name(loss)} is not a sum over the plate 'data', so it has no value per datum")
    return -parts / (size / len(x)), torch.cat([g.flatten() for g in gradients]) / size


def _kl(loss: Loss, provenance: str) -> str:
    if isinstance(loss, TraceMeanField_ELBO):
        return provenance
    by_hand = isinstance(loss, HandDerivedELBO) or loss_name(loss) == note_objective.__name__
    return "Monte Carlo" if isinstance(loss, Trace_ELBO) else "by hand" if by_hand else "unknown"


def _median_seconds(vae: VAE, rows: Rows, size: int, losses: Mapping[str, Loss], seed: int) -> list[float]:
    """Timed in turns, so that a disturbance of the machine meets all estimators alike."""
    parameters = [p for p in vae.parameters() if p.requires_grad]

    def once(loss: Loss) -> float:
        _synchronise(rows.x.device)
        started = time.perf_counter()
        torch.autograd.grad(
            differentiable(loss)(vae.model, vae.guide, *rows.arguments(size)), parameters, allow_unused=True
        )
        _synchronise(rows.x.device)
        return time.perf_counter() - started

    with seeded(seed, rows.x.device):
        rounds = [[once(loss) for loss in losses.values()] for _ in range(TIMED_REPEATS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _dataset(pairs: dict[str, dict[str, np.ndarray]], seconds: list[float], kl: list[str]) -> xr.Dataset:
    nats = {"units": "nats per datum"}
    datum = np.stack([pair["datum"] for pair in pairs.values()])  # (estimator, draw, datum)
    value = datum.mean(-1)
    spread = value.std(-1, ddof=1)
    return xr.Dataset(
        {
            "elbo": ("estimator", value.mean(-1), nats),
            "elbo_se": ("estimator", spread / np.sqrt(value.shape[-1]), nats),
            "elbo_sd": ("estimator", spread, nats),
            "difference": ("estimator", [pair["difference"].max() for pair in pairs.values()], nats),
            "gradient_difference": ("estimator", [pair["gradient"].max() for pair in pairs.values()], {"units": "1"}),
            "seconds": ("estimator", seconds, {"units": "s"}),
            "value": (("estimator", "draw"), value, nats),
            "datum_elbo": (("estimator", "datum"), datum.mean(1), {"units": "nats"}),
        },
        {"estimator": list(pairs), "kl": ("estimator", kl)},
    )


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
        >>> print(verdict(compare_elbos(linear.as_vae(diagonal=True), linear.sample(20), draws=5)))
        Pyro's analytic-KL ELBO and the hand-derived ELBO agree to ... nats per datum and their gradients to ...
    """
    if comparison.attrs["reference"].startswith("none"):
        return f"There is no hand-derived ELBO of this VAE to compare with ({comparison.attrs['reference'][6:]})."
    row = comparison.sel(estimator="TraceMeanField_ELBO")
    # Each value is a sum of rounded terms: a thousand units in the last place is agreement.
    rounding = 1000 * float(np.finfo(comparison.attrs["dtype"].removeprefix("torch.")).eps)
    scale = float(np.abs(comparison.datum_elbo).max())
    agree = float(row.difference) <= rounding * max(scale, 1.0) and float(row.gradient_difference) <= rounding
    return (
        f"Pyro's analytic-KL ELBO and the hand-derived ELBO {'agree' if agree else 'DISAGREE: they differ by up'} to "
        f"{float(row.difference):.0e} nats per datum and their gradients to {float(row.gradient_difference):.0e} "
        f"(relative), with the same noise in {comparison.attrs['draws']} draws, in {comparison.attrs['dtype']}."
    )
