"""Train a VAE with :func:`pyro_vae.fit`."""

import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyro
import torch
import xarray as xr
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae.core.device import describe_device, seeded
from pyro_vae.core.format import as_text
from pyro_vae.core.one_at_a_time import one_at_a_time
from pyro_vae.core.pair import Amortized
from pyro_vae.core.progress import display
from pyro_vae.core.rows import Rows
from pyro_vae.core.signals import deliver_again, ending_signals
from pyro_vae.core.traces import Loss
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import Trained, data_hash, mostly_trained_on, overlap, row_hashes
from pyro_vae.data.repeats import warn_of_too_small_errors
from pyro_vae.data.rows import data_like, rows_for
from pyro_vae.data.sources import Source, hashes_of, source_of
from pyro_vae.elbo import Estimator
from pyro_vae.elbo.given import as_estimator
from pyro_vae.elbo.per_datum import per_datum_elbo as per_datum_elbo
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.train.callbacks import Callback
from pyro_vae.train.callbacks.base import validate_callbacks
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.compiled.optimizers import WholeOptimizer
from pyro_vae.train.compiled.steps import Engine
from pyro_vae.train.distributed.group import Group, joined, launched, process_device
from pyro_vae.train.distributed.launch import fit_on_workers
from pyro_vae.train.distributed.reduce import validate_distributable
from pyro_vae.train.resume import Journal
from pyro_vae.train.run import Run
from pyro_vae.train.summary import history_table, in_one_line
from pyro_vae.train.trial import default_batch_size, validate_batch_size, warn_of_limits, warn_of_narrow_likelihoods
from pyro_vae.train.validate import (
    Optimizer,
    build_optimizer,
    is_built,
    validate_engine,
    validate_schedules,
    validate_settings,
)

EVALUATION_ROWS = 2048
"""The most training data whose ELBO is evaluated after each epoch."""


A = TypeVar("A", bound=Amortized)
"""What is trained, a VAE or a Pair."""


@dataclass(frozen=True)
class Fit(Generic[A]):
    """The result of :func:`fit`.

    Args:
        vae: the trained VAE, the same object that was passed in.
        history: per epoch ``objective``, ``train_elbo``, ``train_elbo_se``, ``validation_elbo``,
            ``validation_elbo_se`` (nats per datum; errors over data) and ``seconds``. ``print`` shows a table of it.
        device: the device of the training.
        interrupted: whether Ctrl-C ended the training early.

    Example:
        >>> Fit(None, xr.Dataset(), "cpu").interrupted
        False
    """

    vae: A
    history: xr.Dataset
    device: str
    interrupted: bool = False

    def __str__(self) -> str:
        """Summarize the training in one line and a table of its epochs."""
        summary = in_one_line(self.history, self.device, interrupted=self.interrupted)
        return f"{summary}\n{as_text(history_table(self.history))}" if self.history.sizes["epoch"] else summary


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Make the default optimizer: fused Adam over all parameters, learning rate 1e-3.

    References:
        | Adam (Kingma & Ba, 2014), https://arxiv.org/abs/1412.6980

    Example:
        >>> adam([torch.zeros(2, requires_grad=True)]).defaults["lr"]
        0.001
    """
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


_INSTEAD = {
    **dict.fromkeys(("lr", "learning_rate"), "optimizer=functools.partial(torch.optim.Adam, lr={value})"),
    "weight_decay": "optimizer=functools.partial(torch.optim.AdamW, weight_decay={value})",
    **dict.fromkeys(("optim", "optimiser"), "optimizer={value}"),
    **dict.fromkeys(
        ("scheduler", "lr_scheduler"), "optimizer=, a function from the parameters to a learning-rate scheduler"
    ),
    **dict.fromkeys(("loss", "estimator", "objective"), "elbo={value}"),
    **dict.fromkeys(("num_particles", "particles"), "elbo=pyro_vae.elbo.ELBO({value})"),
    **dict.fromkeys(("beta", "kl_weight"), "elbo=pyro_vae.elbo.Beta(pyro_vae.elbo.ELBO(), {value})"),
    **dict.fromkeys(("num_epochs", "n_epochs", "max_epochs"), "epochs={value}"),
    **dict.fromkeys(("num_steps", "n_steps", "steps"), "epochs=, the passes over all data"),
    **dict.fromkeys(("verbose", "verbosity"), "progress={value}"),
    **dict.fromkeys(("validation", "val_data", "x_val"), "validation_data={value}"),
    "on_epoch": "callbacks=[...], a pyro_vae.callbacks.Callback whose epoch(run) reads run.vae",
    "random_state": "seed={value}",
}
"""What to write instead of the keywords of other libraries."""


@partial(takes_settings, hints=_INSTEAD)
def fit(
    vae: A,
    data: Any,
    *,
    elbo: Loss | type[ELBO] | None = None,
    optimizer: Optimizer | None = None,
    epochs: int = 100,
    batch_size: int | None = None,
    validation_data: Any = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
    context: Any = None,
    mask: Any = None,
    engine: Engine = "auto",
    clip_norm: float | None = None,
    precision: str = "float32",
    callbacks: Sequence[Callback] = (),
    checkpoints: Checkpoints | str | Path | None = None,
    resume: str | Path | None = None,
    devices: int = 1,
) -> Fit[A]:
    """Train a VAE by stochastic variational inference.

    .. math:: \\max_{\\Theta, \\phi} \\sum_i \\mathcal L_i, \\qquad
        \\nabla \\mathcal L \\approx \\frac nm \\sum_{i \\in \\mathrm{batch}} \\nabla \\mathcal L_i

    Each epoch visits every datum once, in a new order. After each epoch, the ELBO per datum is evaluated on at most
    2048 training data and on the validation data. This evaluation uses the same random numbers each time and leaves
    those of the training alone. The same seed, machine and versions give the same numbers. Ctrl-C ends the training
    after the current step and keeps the weights; SIGTERM also ends the process, unless the program handles it itself;
    either leaves a last checkpoint. One process trains one VAE at a time, because threads share Pyro's
    handlers: a second thread waits for the first. Hashes of the rows stay on the VAE (``vae.trained_on``), so that
    :func:`pyro_vae.compare_models` can reject them as held-out data.

    Args:
        vae: trained in place and moved to ``device``; or a :class:`pyro_vae.Pair` whose parameters belong to modules.
        data: shape ``(datum, *features)``: a tensor, an array or anything that numpy converts to one; a
            :class:`~pyro_vae.data.Data` with its own context and mask; torch's ``TensorDataset``, of which the
            first tensor is used; or a :func:`pyro_vae.data.stream`, for example of a ``DataLoader``.
        elbo: anything that SVI accepts as ``loss=``, or its class; ``Trace_ELBO()`` by default. The history's
            ``objective`` is what it optimizes, including any β; ``train_elbo`` is always the true ELBO. Each datum
            gets 1/n of the part of a Pair's global sites, where n is the number of training data, and all data of an
            evaluation share one draw of these sites.
        optimizer: a function (a class is one) from all trainable parameters to a torch optimizer or to a learning-rate
            scheduler of one; Adam with learning rate 1e-3 by default. A scheduler steps after each epoch
            (``ReduceLROnPlateau`` on the validation ELBO, or on the training ELBO without validation data). An
            optimizer or scheduler of the VAE's parameters is used as it is and keeps its state; an optimizer of
            ``pyro.optim`` provides its class and settings.
        epochs: passes over the data, at least 1.
        batch_size: data per step, from 1 to all of them; the last batch of an epoch may be smaller. The default is
            128, or all data if there are fewer, or slightly less if 128 would leave a last batch of one row. A batch
            of one row raises before the first step if a component or the objective cannot be trained on it (batch
            normalization, :class:`~pyro_vae.elbo.InfoVAE`).
        validation_data: like ``data``, but in memory; with a context or mask, pass ``Data``.
        device: ``"auto"`` is CUDA if available, else the CPU.
        seed: of the order of the data and of the samples of z.
        progress: whether to print the device and show a progress bar.
        context: additional input of prior, decoder and encoder, shape ``(datum, c)``, or a table of numbers, to whose
            column names later contexts are matched.
        mask: booleans of the shape of the data, true where a value was observed; the likelihood ignores missing
            values (:func:`pyro_vae.data.mask_nan` treats NaN as missing).
        engine: ``"compiled"`` steps with :class:`~pyro_vae.CompiledSVI`, ``"eager"`` with Pyro's SVI, and ``"auto"``
            with the former once enough steps are left for compiling to pay, if the step can be compiled. The
            numbers agree up to rounding.
        clip_norm: scale the gradient of all parameters together down to at most this norm.
        precision: as in :class:`~pyro_vae.CompiledSVI`.
        callbacks: callbacks of :mod:`pyro_vae.callbacks` or your own.
        checkpoints: a new run folder, to which a checkpoint is written every five minutes and at the end, or
            :class:`~pyro_vae.Checkpoints` of a run folder.
        resume: a run folder, whose newest intact checkpoint to resume with the same VAE, data and settings
            (``epochs`` may be larger). On the same machine this gives the same weights, bit for bit, as an
            uninterrupted run. New checkpoints are written to the same folder. A checkpoint does not hold module
            attributes other than tensors, nor the generators of Python and numpy.
        devices: the number of workers on this machine that share each batch, each with its own GPU or its share of
            the cores. Arguments are pickled; tensors of the data go to shared memory. After Ctrl-C or SIGTERM, workers
            have a minute to write a last checkpoint; a second signal ends them at once. Under torchrun, its workers
            are used, on one or many machines, and ``devices`` is ignored.

    Returns:
        The VAE, its labelled history and the device.

    Raises:
        DataError: if the data are not finite numbers in rows.
        ModelError: if the data and the components do not match, or if called inside one of Pyro's handlers.
        SettingsError: if a setting is out of range, or a schedule is longer than the training.
        DivergenceError: if a loss is not finite; the VAE then has the weights after the last good epoch.
        CompileError: if ``engine`` is ``"compiled"`` and the step cannot be compiled.
        ProcessError: if one of several processes dies; the others are stopped.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> x = pv.exact.LinearGaussian(torch.randn(4, 1), torch.zeros(4), 0.5).sample(256)
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StandardNormal(1),
        ...     decoder=pv.likelihoods.Normal(pv.nn.mlp(1, [], 4), learn_scale=True),
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(4, [], 2)),
        ... )
        >>> elbo = fit(vae, x, epochs=20, batch_size=32, progress=False).history.train_elbo
        >>> bool(elbo[-1] > elbo[0])
        True
    """
    settings = {name: value for name, value in locals().items() if name not in ("vae", "data")}
    if whole("devices", devices, 1) > 1 and not launched():
        if is_built(optimizer):
            raise SettingsError(
                "optimizer: workers cannot return the state of an optimizer instance; pass a class or function, such "
                "as optimizer=torch.optim.Adam"
            )
        return fit_on_workers(devices, fit, vae, data, settings)
    with one_at_a_time(), joined(process_device(device)) as group:
        return _fit(vae, data, group=group, **settings)


def _fit(
    vae: A,
    data: Any,
    *,
    group: Group,
    elbo: Loss | type[ELBO] | None,
    optimizer: Optimizer | None,
    epochs: int,
    batch_size: int | None,
    validation_data: Any,
    device: str | torch.device,
    seed: int,
    progress: bool,
    context: Any,
    mask: Any,
    engine: Engine,
    clip_norm: float | None,
    precision: str,
    callbacks: Sequence[Callback],
    checkpoints: Checkpoints | str | Path | None,
    resume: str | Path | None,
    devices: int,
) -> Fit[A]:
    """Train in this process, alone or as one of a group."""
    source = source_of(data, vae, context=context, mask=mask)
    batch_size = default_batch_size(len(source)) if batch_size is None else batch_size
    elbo = None if elbo is None else as_estimator(elbo)
    validate_settings(vae, elbo, epochs, batch_size, len(source), seed)
    validate_schedules(elbo, epochs * -(-len(source) // batch_size))
    validate_engine(engine, clip_norm, precision)
    validate_callbacks(callbacks)
    validate_distributable(vae, elbo or Trace_ELBO(), batch_size, group)
    validation = None
    if isinstance(validation_data, Source):
        raise SettingsError(
            "validation_data is a stream, but all validation data are evaluated after each epoch; pass rows in "
            f"memory, such as its sample({EVALUATION_ROWS})"
        )
    if validation_data is not None:
        validation_data = data_like(source, validation_data, source="validation data")
        validation = rows_for(vae, validation_data, source="validation data")
        warn_of_too_small_errors(validation, source="validation data", stacklevel=4)
    if isinstance(elbo, Estimator):
        elbo.restart()
    chosen = process_device(device)
    group.broadcast_tensors([*vae.to(chosen).parameters(), *vae.buffers()])
    validate_batch_size(vae, elbo or Trace_ELBO(), source.head().like(vae), batch_size=batch_size, size=len(source))
    optim = WholeOptimizer(build_optimizer(vae.to(chosen), optimizer or adam), clip_norm)
    run = Run(
        vae, source.like(vae), _watched(vae, source, validation), elbo or Trace_ELBO(), optim,
        batch_size=batch_size, seed=seed, device=chosen, callbacks=callbacks, group=group,
    )  # fmt: skip
    hashes = hashes_of(source)
    run.attributes |= {"data_hash": data_hash(hashes), "precision": precision}
    _validate_same_data(run)
    processes = "" if group.alone else f"{group.ranks} processes, the first on "
    where = f"Training on {processes}{describe_device(chosen)} with {run.attributes['estimator']}"
    with (
        _stop_on_signals() as stop_requested,  # the outermost: SIGTERM ends the process after the last checkpoint
        Journal(checkpoints, resume, group) as journal,
        display(where, epochs, epochs * run.steps_per_epoch, show=progress and group.first) as bar,
        _quiet_pyro(),
        seeded(group.seed(seed), chosen),
        torch.enable_grad(),
    ):
        named = {name: getattr(source, name, None) for name in ("columns", "categories", "context_columns")}
        if shared := _shared(hashes, len(source), validation):
            bar.say(f"validation data: {shared}, are training data; the validation ELBO is not that of new data")
        vae.trained_on = Trained.on(hashes, vae.trained_on, **named)
        run.folder = journal.saved.run if journal.saved is not None else None
        journal.find(run, bar.say)
        run.start(epochs, engine, precision, bar, stop_requested)
        journal.begin(run)
        run.train(journal.write_if_due)
    if group.first:
        warn_of_limits(vae, run.watched["train"])
        warn_of_narrow_likelihoods(vae, run.watched["train"], source.columns)
    return Fit(vae, run.history(), describe_device(chosen), run.ending.is_set() and not run.stopped)


def _shared(hashes: np.ndarray, size: int, validation: Rows | None) -> str:
    """Describe the validation data that are training data, if most are."""
    if validation is None:
        return ""
    known, new = Trained.on(hashes), row_hashes(validation)
    return overlap(known, new) if mostly_trained_on(known, new, len(hashes) / size) else ""


def _validate_same_data(run: Run) -> None:
    """Raise a DataError if the processes do not have the same data."""
    every = run.group.all_gather(run.attributes["data_hash"])
    if other := next((rank for rank, one in enumerate(every) if one != every[0]), None):
        raise DataError(f"the data of process {other} differ from those of process 0; pass the same data to all")


def _watched(vae: Amortized, source: Source, validation: Rows | None) -> dict[str, Rows]:
    """Select the data whose ELBO is evaluated after each epoch."""
    watched = {"train": source.sample(EVALUATION_ROWS).like(vae)}
    return watched if validation is None else {**watched, "validation": validation.like(vae)}


@contextmanager
def _quiet_pyro() -> Iterator[None]:
    """Disable Pyro's checks at every step: ``fit`` makes them once, or on the loss."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that the first termination signal sets, so that the step completes; a second one interrupts."""
    ending = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        ending.set()
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {kind: signal.signal(kind, handle) for kind in ending_signals()}
    try:
        yield ending
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        deliver_again(received, before)
