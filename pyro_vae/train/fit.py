"""``fit``: data, steps, history."""

import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyro
import torch
import xarray as xr
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae.core.device import describe_device, seeded
from pyro_vae.core.format import as_text
from pyro_vae.core.one_at_a_time import one_at_a_time
from pyro_vae.core.pair import Amortised
from pyro_vae.core.progress import display
from pyro_vae.core.rows import Rows
from pyro_vae.core.signals import ending_signals
from pyro_vae.core.traces import Loss
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import Trained, data_hash
from pyro_vae.data.repeats import warn_of_too_small_errors
from pyro_vae.data.rows import data_like, rows_for
from pyro_vae.data.sources import Source, hashes_of, source_of
from pyro_vae.elbo import Estimator
from pyro_vae.elbo.given import as_estimator
from pyro_vae.elbo.per_datum import per_datum_elbo as per_datum_elbo
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.train.callbacks import Callback
from pyro_vae.train.callbacks.base import refuse_callbacks
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.compiled.optimizers import WholeOptimizer
from pyro_vae.train.compiled.steps import Engine
from pyro_vae.train.distributed.group import Group, joined, launched, own_device
from pyro_vae.train.distributed.launch import fit_on_workers
from pyro_vae.train.distributed.reduce import refuse_spread
from pyro_vae.train.resume import Journal
from pyro_vae.train.run import Run
from pyro_vae.train.summary import history_table, in_one_line
from pyro_vae.train.trial import default_batch_size, refuse_batches, warn_of_limits, warn_of_narrow_likelihoods
from pyro_vae.train.validate import (
    Optimizer,
    is_made,
    made_for,
    refuse_engine,
    refuse_schedules,
    refuse_settings,
)

EVALUATION_ROWS = 2048
"""At most so many training data are evaluated after each epoch."""


A = TypeVar("A", bound=Amortised)
"""What is trained, a VAE or a Pair."""


@dataclass(frozen=True)
class Fit(Generic[A]):
    """What :func:`fit` gives back.

    Args:
        vae: the trained VAE, the same object that was given.
        history: per epoch ``objective``, ``train_elbo``, ``train_elbo_se``, ``validation_elbo``,
            ``validation_elbo_se`` (nats per datum; errors over data) and ``seconds``. ``print`` shows a table of it.
        device: where it was trained.
        interrupted: whether Ctrl-C ended it early.

    Example:
        >>> Fit(None, xr.Dataset(), "cpu").interrupted
        False
    """

    vae: A
    history: xr.Dataset
    device: str
    interrupted: bool = False

    def __str__(self) -> str:
        """What training came to, and a table of its epochs."""
        told = in_one_line(self.history, self.device, interrupted=self.interrupted)
        return f"{told}\n{as_text(history_table(self.history))}" if self.history.sizes["epoch"] else told


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The default optimizer: one fused Adam over all parameters, at a learning rate of 1e-3.

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
        ("scheduler", "lr_scheduler"), "optimizer=, what makes a schedule of an optimizer of the parameters"
    ),
    **dict.fromkeys(("loss", "estimator", "objective"), "elbo={value}"),
    **dict.fromkeys(("num_particles", "particles"), "elbo=pyro_vae.elbo.ELBO({value})"),
    **dict.fromkeys(("beta", "kl_weight"), "elbo=pyro_vae.elbo.Beta(pyro_vae.elbo.ELBO(), {value})"),
    **dict.fromkeys(("num_epochs", "n_epochs", "max_epochs"), "epochs={value}"),
    **dict.fromkeys(("num_steps", "n_steps", "steps"), "epochs=, the passes over all data"),
    **dict.fromkeys(("verbose", "verbosity"), "progress={value}"),
    **dict.fromkeys(("validation", "val_data", "x_val"), "validation_data={value}"),
    "on_epoch": "callbacks=[...], a pyro_vae.callbacks.Callback whose epoch(run) looks at run.vae",
    "random_state": "seed={value}",
}
"""What to write in the place of keywords that other libraries have."""


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

    Each epoch visits every datum once, in a new order. After it the ELBO per datum is evaluated on
    at most 2048 training data and on the validation data, with the same random numbers each time,
    apart from those of training: watching changes nothing. Same seed, same machine, same versions: the same numbers.
    Ctrl-C ends after the step under way, and what was learnt is kept. One process trains one VAE at a time, as
    threads share Pyro's handlers: a second thread waits for the first. Hashes of the rows stay on the VAE
    (``vae.trained_on``), so that :func:`pyro_vae.compare_models` can refuse them as held-out data.

    Args:
        vae: trained in place, and moved to ``device``; or a :class:`pyro_vae.Pair` whose parameters are those of
            modules.
        data: shape ``(datum, *features)``; a tensor, an array, what numpy makes one of, or a
            :class:`~pyro_vae.data.Data` with a context and mask of its own; torch's ``TensorDataset``, of which the
            first tensor is taken; or a :func:`pyro_vae.data.stream`, as of a ``DataLoader``.
        elbo: what SVI takes as ``loss=``, or a class of it; ``Trace_ELBO()`` if not given. The history's
            ``objective`` is what it optimises, with any β; ``train_elbo`` beside it is always the true ELBO. Each
            datum has 1/n of the part of a Pair's global sites in it, n the number of training data, and all data of an
            evaluation share one draw of these sites.
        optimizer: from all trainable parameters to one torch optimizer, or to a learning-rate scheduler of
            one, which then goes on after each epoch (``ReduceLROnPlateau`` by the validation ELBO, or that of training
            data); :func:`~pyro_vae.train.fit.adam` if not given. A class is such a function. An optimizer or scheduler
            that was made of the VAE's parameters is used as it is, and goes on with its state; one of ``pyro.optim``
            gives its class and settings.
        epochs: passes over the data, at least 1.
        batch_size: data per step, from 1 to all of them; the last batch of an epoch may be smaller. If not given,
            128, or all data where there are fewer, or slightly less where 128 would leave a last batch of one row.
            Parts or objectives that cannot be trained on one row (batch normalisation,
            :class:`~pyro_vae.elbo.InfoVAE`) are refused such a batch before the first step.
        validation_data: as ``data``, in memory; with a context or mask, as ``Data``.
        device: ``"auto"`` is CUDA where there is one, else the CPU.
        seed: of the order of the data and of the samples of z.
        progress: whether to say where it trains and to show a bar.
        context: what prior, decoder and encoder are given besides, shape ``(datum, c)``.
        mask: booleans of the shape of the data, true where a value was observed; missing values leave
            the likelihood (:func:`pyro_vae.data.mask_nan` takes NaN for missing).
        engine: ``"compiled"`` takes steps by :class:`~pyro_vae.CompiledSVI`, ``"eager"`` by Pyro's SVI, and
            ``"auto"`` by the first where enough steps are left for compiling to pay and the step can be
            compiled. The numbers are the same, but for rounding.
        clip_norm: the gradient of all parameters together is scaled down to at most this norm.
        precision: as :class:`~pyro_vae.CompiledSVI` takes it.
        callbacks: of :mod:`pyro_vae.callbacks`, told of what goes on.
        checkpoints: a new run folder, in which the state of the training is kept every five minutes and at the
            end, or :class:`~pyro_vae.Checkpoints` of one.
        resume: a run folder, to go on from its newest whole checkpoint with the VAE, data and settings that it
            was begun with (``epochs`` may be more): on the same machine to the same weights, bit for bit, as if
            it had never been stopped. Checkpoints go on there too. Not in them are attributes of modules that
            are no tensors, and the generators of Python and numpy.
        devices: the number of workers on this machine that share each batch, each with its own GPU or its share of
            the cores. Arguments are pickled; tensors of the data go to shared memory. After Ctrl-C or SIGTERM, workers
            have a minute for a last checkpoint; a second signal ends them at once. Under torchrun, which starts
            workers on one or many machines, its workers are used and ``devices`` is not.

    Returns:
        The VAE, its labelled history and the device.

    Raises:
        DataError: if the data are not finite numbers in rows.
        ModelError: if data and parts do not fit each other, or it is called inside one of Pyro's handlers.
        SettingsError: if a setting is out of its range, or a schedule longer than the training.
        DivergenceError: if a loss is not finite; the weights are then those after the last good epoch.
        CompileError: if ``engine`` is ``"compiled"`` and the step cannot be compiled.
        ProcessError: if one of several processes dies; the others are then stopped.

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
        if is_made(optimizer):
            raise SettingsError(
                "the optimizer has a state, which workers would not bring back; give what makes one, as "
                "optimizer=torch.optim.Adam"
            )
        return fit_on_workers(devices, fit, vae, data, settings)
    with one_at_a_time(), joined(own_device(device)) as group:
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
    """The training of one process, alone or one of a group."""
    source = source_of(data, vae, context=context, mask=mask)
    batch_size = default_batch_size(len(source)) if batch_size is None else batch_size
    elbo = None if elbo is None else as_estimator(elbo)
    refuse_settings(vae, elbo, epochs, batch_size, len(source), seed)
    refuse_schedules(elbo, epochs * -(-len(source) // batch_size))
    refuse_engine(engine, clip_norm, precision)
    refuse_callbacks(callbacks)
    refuse_spread(vae, elbo or Trace_ELBO(), batch_size, group)
    validation = None
    if isinstance(validation_data, Source):
        raise SettingsError(
            "validation_data is a stream, and all of them are looked at after each epoch; give rows that lie in "
            f"memory, as its sample({EVALUATION_ROWS})"
        )
    if validation_data is not None:
        validation_data = data_like(source, validation_data, source="validation data")
        validation = rows_for(vae, validation_data, source="validation data")
        warn_of_too_small_errors(validation, source="validation data", stacklevel=4)
    if isinstance(elbo, Estimator):
        elbo.restart()
    chosen = own_device(device)
    group.spread([*vae.to(chosen).parameters(), *vae.buffers()])
    refuse_batches(vae, elbo or Trace_ELBO(), source.head().like(vae), batch_size=batch_size, size=len(source))
    optim = WholeOptimizer(made_for(vae.to(chosen), optimizer or adam), clip_norm)
    run = Run(
        vae, source.like(vae), _watched(vae, source, validation), elbo or Trace_ELBO(), optim,
        batch_size=batch_size, seed=seed, device=chosen, callbacks=callbacks, group=group,
    )  # fmt: skip
    hashes = hashes_of(source)
    run.attributes |= {"data_hash": data_hash(hashes), "precision": precision}
    _refuse_other_data(run)
    processes = "" if group.alone else f"{group.ranks} processes, the first on "
    where = f"Training on {processes}{describe_device(chosen)} by {run.attributes['estimator']}"
    with (
        Journal(checkpoints, resume, group) as journal,
        display(where, epochs, epochs * run.steps_per_epoch, show=progress and group.first) as bar,
        _stop_on_signals() as asked,
        _quiet_pyro(),
        seeded(group.seed(seed), chosen),
        torch.enable_grad(),
    ):
        named = {name: getattr(source, name, None) for name in ("columns", "categories", "context_columns")}
        vae.trained_on = Trained.on(hashes, vae.trained_on, **named)
        run.folder = journal.saved.run if journal.saved is not None else None
        journal.find(run, bar.say)
        run.start(epochs, engine, precision, bar, asked)
        journal.begin(run)
        run.train(journal.keep)
    if group.first:
        warn_of_limits(vae, run.watched["train"])
        warn_of_narrow_likelihoods(vae, run.watched["train"], source.columns)
    return Fit(vae, run.history(), describe_device(chosen), run.ending.is_set() and not run.stopped)


def _refuse_other_data(run: Run) -> None:
    """Refuse processes that were not given the same data."""
    every = run.group.gathered(run.attributes["data_hash"])
    if other := next((rank for rank, one in enumerate(every) if one != every[0]), None):
        raise DataError(f"process {other} was given other data than process 0; give all of them the same")


def _watched(vae: Amortised, source: Source, validation: Rows | None) -> dict[str, Rows]:
    """Data whose ELBO is looked at after each epoch."""
    watched = {"train": source.sample(EVALUATION_ROWS).like(vae)}
    return watched if validation is None else {**watched, "validation": validation.like(vae)}


@contextmanager
def _quiet_pyro() -> Iterator[None]:
    """Without Pyro's checks at every step; what they look for is looked for here, once, or in the loss."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first signal to end sets, so that no step is left half done; a second one interrupts."""
    ending = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return

    def handle(*_: Any) -> None:
        if ending.is_set():
            raise KeyboardInterrupt
        ending.set()

    before = {kind: signal.signal(kind, handle) for kind in ending_signals()}
    try:
        yield ending
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
