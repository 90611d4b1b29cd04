"""``fit``: data, steps, history."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
import xarray as xr
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae import __about__
from pyro_vae._hashes import Trained, data_hash, row_hashes
from pyro_vae.core import VAE, evaluating
from pyro_vae.device import choose_device, describe_device, refuse_seed, seeded
from pyro_vae.elbo import Estimator, log_weights
from pyro_vae.engine.optimizers import WholeOptimizer, refuse_clip_norm
from pyro_vae.engine.steps import ENGINES, Engine, Steps
from pyro_vae.errors import DivergenceError, SettingsError
from pyro_vae.progress import Bar, display
from pyro_vae.rows import Rows, rows_for, rows_of
from pyro_vae.traces import Loss, loss_name

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer | LRScheduler]

EVALUATION_ROWS = 2048
"""At most so many training data are evaluated after each epoch."""


@dataclass(frozen=True)
class Fit:
    """What :func:`fit` gives back.

    Args:
        vae: the trained VAE, the same object that was given.
        history: per epoch ``objective``, ``train_elbo``, ``train_elbo_se``, ``validation_elbo``,
            ``validation_elbo_se`` (nats per datum) and ``seconds``.
        device: where it was trained.
        interrupted: whether Ctrl-C ended it early.

    Example:
        >>> Fit(None, xr.Dataset(), "cpu").interrupted
        False
    """

    vae: VAE
    history: xr.Dataset
    device: str
    interrupted: bool = False


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The default optimizer: one fused Adam over all parameters, at a learning rate of 1e-3.

    References:
        | Adam (Kingma & Ba, 2014), https://arxiv.org/abs/1412.6980

    Example:
        >>> adam([torch.zeros(2, requires_grad=True)]).defaults["lr"]
        0.001
    """
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def fit(
    vae: VAE,
    data: Any,
    *,
    elbo: Loss | None = None,
    optimizer: Optimizer | None = None,
    epochs: int = 100,
    batch_size: int | None = None,
    validation_data: Any = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
    context: Any = None,
    mask: Any = None,
    on_epoch: Callable[[int, VAE], None] | None = None,
    engine: Engine = "auto",
    clip_norm: float | None = None,
) -> Fit:
    """Train a VAE by stochastic variational inference.

    .. math:: \\max_{\\Theta, \\phi} \\sum_i \\mathcal L_i, \\qquad
        \\nabla \\mathcal L \\approx \\frac nm \\sum_{i \\in \\mathrm{batch}} \\nabla \\mathcal L_i

    Each epoch visits every datum once, in a new order. After it the ELBO per datum is evaluated on
    at most 2048 training data and on the validation data, with the same random numbers each time,
    apart from those of training: watching changes nothing. Same seed, same machine, same versions:
    the same numbers. Ctrl-C ends after the step under way, and what was learnt is kept. One process
    trains one VAE at a time: Pyro's handlers are not made for threads. Hashes of the rows stay on the VAE
    (``vae.trained_on``), so that :func:`pyro_vae.compare_models` can refuse them as held-out data.

    Args:
        vae: trained in place, and moved to ``device``.
        data: shape ``(datum, *features)``; a tensor, an array, what numpy makes one of, or a
            :class:`~pyro_vae.data.Data` with a context and mask of its own.
        elbo: what SVI takes as ``loss=``; ``Trace_ELBO()`` if not given. The history's ``objective`` is
            what it optimises, with any β; ``train_elbo`` beside it is always the true ELBO.
        optimizer: from all trainable parameters to one torch optimizer, or to a learning-rate scheduler of
            one, which then goes on after each epoch; :func:`adam` if not given.
        epochs: passes over the data, at least 1.
        batch_size: data per step, from 1 to all of them; the last batch of an epoch may be smaller.
            If not given, 128, or all data where there are fewer.
        validation_data: as ``data``; with a context or mask, as ``Data``.
        device: ``"auto"`` is CUDA where there is one, else the CPU.
        seed: of the order of the data and of the samples of z.
        progress: whether to say where it trains and to show a bar.
        context: what prior, decoder and encoder are given besides, shape ``(datum, c)``.
        mask: booleans of the shape of the data, true where a value was observed; missing values leave
            the likelihood (:func:`pyro_vae.data.mask_nan` takes NaN for missing).
        on_epoch: called after each epoch with its number and the VAE; it may look, and keep a copy.
        engine: ``"compiled"`` takes steps by :class:`~pyro_vae.CompiledSVI`, ``"eager"`` by Pyro's SVI, and
            ``"auto"`` by the first where enough steps are left for compiling to pay and the step can be
            compiled. The numbers are the same, but for rounding.
        clip_norm: the gradient of all parameters together is scaled down to at most this norm.

    Returns:
        The VAE, its labelled history and the device.

    Raises:
        DataError: if the data are not finite numbers in rows.
        ModelError: if data and parts do not fit each other.
        SettingsError: if a setting is out of its range, or a schedule longer than the training.
        DivergenceError: if a loss is not finite; the weights are then those after the last good epoch.
        CompileError: if ``engine`` is ``"compiled"`` and the step cannot be compiled.

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
    rows = rows_for(vae, data, context=context, mask=mask)
    batch_size = min(128, len(rows)) if batch_size is None else batch_size
    _refuse_settings(vae, elbo, epochs, batch_size, len(rows), seed)
    _refuse_schedules(elbo, epochs * -(-len(rows) // batch_size))
    _refuse_engine(engine, clip_norm)
    watched = {"train": rows}
    if validation_data is not None:
        watched["validation"] = rows_for(vae, validation_data, source="validation data")
    if isinstance(elbo, Estimator):
        elbo.restart()
    chosen = choose_device(device)
    optim = WholeOptimizer(_made(optimizer or adam, vae.to(chosen)), clip_norm)
    run = _Run(vae, watched, elbo or Trace_ELBO(), optim, chosen, seed, batch_size)
    hashes = row_hashes(rows)
    run.attributes["data_hash"] = data_hash(hashes)
    where = f"Training on {describe_device(chosen)} by {run.attributes['estimator']}"
    steps = epochs * -(-len(rows) // batch_size)
    with (
        display(where, epochs, steps, show=progress) as bar,
        _stop_on_interrupt() as stop,
        _quiet_pyro(),
        seeded(seed, chosen),
        torch.enable_grad(),
    ):
        vae.trained_on = Trained.on(hashes, vae.trained_on)
        run.start(engine, steps, bar)
        for epoch in range(1, epochs + 1):
            run.epoch(epoch, bar, stop)
            if on_epoch is not None:
                on_epoch(epoch, vae)
            if stop.is_set():
                break
    return Fit(vae, run.history(), describe_device(chosen), stop.is_set())


def _refuse_settings(vae: VAE, elbo: Loss | None, epochs: int, batch_size: int, n: int, seed: int) -> None:
    for name, number in {"epochs": epochs, "batch_size": batch_size}.items():
        if not isinstance(number, int):
            raise SettingsError(f"{name} is {number!r}; it must be a whole number")
    if epochs < 1:
        raise SettingsError(f"epochs is {epochs}; it must be at least 1")
    if not 1 <= batch_size <= n:
        raise SettingsError(f"batch_size is {batch_size}; it must be from 1 to the number of training data, {n}")
    refuse_seed(seed)
    if isinstance(elbo, type):
        raise SettingsError(f"elbo is a class; give an instance, {elbo.__name__}()")
    if getattr(elbo, "num_particles", 1) < 1:
        raise SettingsError(f"elbo: num_particles is {elbo.num_particles}; it must be at least 1")  # type: ignore[union-attr]
    if isinstance(elbo, RenyiELBO) and batch_size < n:
        raise SettingsError(f"Pyro's RenyiELBO is no bound on minibatches: n/m enters inside its logarithm; take {n}")
    if torch.is_inference_mode_enabled():
        raise SettingsError("inference mode is on, where nothing can be trained; call fit outside of it")
    if not any(p.requires_grad for p in vae.parameters()):
        raise SettingsError("every parameter of the VAE is frozen; set requires_grad on those to be trained")


def _refuse_schedules(elbo: Loss | None, steps: int) -> None:
    for schedule in elbo.schedules() if isinstance(elbo, Estimator) else ():
        if schedule.steps > steps:
            raise SettingsError(
                f"elbo: {schedule} would end after {schedule.steps} steps, and training has {steps}, so it would end "
                "before its objective is the one that was meant; shorten it or train longer"
            )


def _refuse_engine(engine: str, clip_norm: float | None) -> None:
    if engine not in ENGINES:
        raise SettingsError(f"engine is {engine!r}; it must be {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    refuse_clip_norm(clip_norm)


def _made(optimizer: Optimizer, vae: VAE) -> torch.optim.Optimizer | LRScheduler:
    made = optimizer([p for p in vae.parameters() if p.requires_grad])
    if isinstance(getattr(made, "optimizer", made), torch.optim.LBFGS):
        raise SettingsError("LBFGS needs a closure and noise that is fixed; take Adam, or another that steps alone")
    if isinstance(made, ReduceLROnPlateau):
        raise SettingsError("ReduceLROnPlateau needs a number at each epoch; take a schedule that steps alone")
    return made


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        vae: VAE,
        watched: dict[str, Rows],
        loss: Loss,
        optim: WholeOptimizer,
        device: torch.device,
        seed: int,
        batch_size: int,
    ) -> None:
        self.vae, self.loss, self.optim = vae, loss, optim
        self.device, self.seed, self.batch_size = device, seed, batch_size
        self.watched = {name: part.like(vae) for name, part in watched.items()}
        self.rows = self.watched["train"]
        with seeded(seed, device):
            self.watched["train"] = self.rows.take(torch.randperm(len(self.rows), device=device)[:EVALUATION_ROWS])
        self.attributes = {
            "estimator": loss_name(loss),
            "optimizer": type(optim.optimizer).__name__,
            "batch_size": batch_size,
            "data": len(self.rows),
            "seed": seed,
            "device": describe_device(device),
            **__about__.versions(),
        }
        self.epochs: list[dict[str, float]] = []
        self.steps = 0
        self.good = _copy_of(vae)

    def start(self, engine: Engine, steps: int, bar: Bar) -> None:
        """Make ready for so many steps."""
        self.stepping = Steps(
            self.vae, self.loss, self.optim, self.rows, batch_size=self.batch_size, engine=engine, steps=steps,
            say=bar.say,
        )  # fmt: skip

    def epoch(self, epoch: int, bar: Bar, stop: threading.Event) -> None:
        """One pass over the data, and what it came to."""
        started, n = time.perf_counter(), len(self.rows)
        total, seen = 0.0, 0
        for losses in self.stepping.along(torch.randperm(n, device=self.device)):
            for loss in losses:
                self.steps += 1
                if not math.isfinite(loss):
                    self._diverged(f"the loss became {loss} at step {self.steps} (epoch {epoch})")
                size = min(self.batch_size, n - seen)
                total, seen = total - loss / n * size, seen + size
                bar.step(total / seen)
            if stop.is_set():
                break
        if isinstance(self.optim.made, LRScheduler):
            self.optim.made.step()
        row = {"objective": total / seen, "seconds": time.perf_counter() - started, "step": self.steps}
        for name, rows in self.watched.items():
            row[f"{name}_elbo"], row[f"{name}_elbo_se"] = _mean_elbo(self.vae, rows, self.seed)
        if not math.isfinite(row["train_elbo"]):
            self._diverged(f"the ELBO became {row['train_elbo']} after step {self.steps} (epoch {epoch})")
        self.epochs.append(row)
        self.good = _copy_of(self.vae)
        bar.epoch(epoch, row)

    def _diverged(self, what: str) -> None:
        self.vae.load_state_dict(self.good)
        kept = f"those after epoch {len(self.epochs)}" if self.epochs else "the initial ones"
        error = DivergenceError(f"{what}; the weights kept are {kept}; lower the learning rate")
        error.history = self.history()
        raise error

    def history(self) -> xr.Dataset:
        """The epochs so far, labelled."""
        columns = ["objective", *(f"{name}_elbo{end}" for name in self.watched for end in ("", "_se"))]
        variables = {c: ("epoch", [r[c] for r in self.epochs], {"units": "nats per datum"}) for c in columns}
        variables["seconds"] = ("epoch", [r["seconds"] for r in self.epochs], {"units": "s"})
        coordinates = {
            "epoch": range(1, len(self.epochs) + 1),
            "step": ("epoch", [int(r["step"]) for r in self.epochs]),
        }
        engine = {"engine": self.stepping.used, "engine_reason": self.stepping.reason}
        return xr.Dataset(variables, coordinates, self.attributes | engine)


def _copy_of(vae: VAE) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in vae.state_dict().items()}


@torch.no_grad()
def per_datum_elbo(vae: VAE, x: Any, *, num_particles: int = 1, chunk: int = 4096) -> Tensor:
    """The ELBO of each datum, by the mean of its log-weights.

    .. math:: \\mathcal L_i \\approx \\frac1K \\sum_k \\log p(x_i, z_{ki}) - \\log q(z_{ki} | x_i)

    Args:
        vae: the VAE, which is left as it is: nothing is trained.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        num_particles: K, at least 1.
        chunk: so many data at a time.

    Returns:
        Nats, shape ``(datum,)``.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x = torch.ones(3, 5).double()
        >>> bool((per_datum_elbo(linear.as_vae(), x) - linear.log_marginal(x)).abs().max() < 1e-12)
        True
    """
    with evaluating(vae):
        parts = [
            log_weights(vae.model, vae.guide, rows.x, None, rows.context, rows.mask, num_particles=num_particles).mean(
                0
            )
            for rows in rows_of(x).like(vae).split(chunk)
        ]
    return torch.cat(parts)


def _mean_elbo(vae: VAE, rows: Rows, seed: int) -> tuple[float, float]:
    """The mean over data and its standard error, which covers both the data and the sampling of z."""
    with seeded(seed + 1, rows.x.device):
        values = per_datum_elbo(vae, rows).double()
    spread = values.std() if len(values) > 1 else values.new_tensor(math.nan)
    return values.mean().item(), (spread / math.sqrt(len(values))).item()


@contextmanager
def _quiet_pyro() -> Iterator[None]:
    """Without Pyro's checks at every step; what they look for is looked for here, once, or in the loss."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step is never left half done; a second one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
