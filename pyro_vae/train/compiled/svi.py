"""``CompiledSVI``: Pyro's SVI with a traced, compiled and replayed step."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, TraceEnum_ELBO
from pyro.optim import PyroOptim
from pyro.poutine import runtime
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.core.compatibility import in_a_line
from pyro_vae.core.traces import Loss, Program, differentiable, loss_name
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.given import as_estimator
from pyro_vae.elbo.nested import counters, losses_in
from pyro_vae.errors import CompileError, ModelError, PyroVAEError, SettingsError
from pyro_vae.train.compiled.backends import Backend
from pyro_vae.train.compiled.cuda import feed_of
from pyro_vae.train.compiled.feed import Arguments, BatchArguments, CallArguments, Feed, GatheredArguments, validate_run
from pyro_vae.train.compiled.graph_cache import Replays
from pyro_vae.train.compiled.optimizers import Maker, Updates, WholeOptimizer, validate_clip_norm, validate_optimizer
from pyro_vae.train.compiled.precision import computing_in, validate_precision
from pyro_vae.train.compiled.watch import Watch
from pyro_vae.train.distributed.reduce import GradientAllReduce

CHUNK = 16
"""The steps between two returns to Python."""

MOST_CHANGES = 16
"""The most changes of values that are constants of a trace."""


class CompiledSVI(SVI):
    """Pyro's ``SVI`` with ELBO, gradient and update compiled to one graph per shape.

    .. math:: \\theta_{t+1} = u(\\theta_t, \\nabla_\\theta \\hat{\\mathcal L}(x_t, \\epsilon_t; \\theta_t))

    The first step is Pyro's own: it creates the parameters and the optimizer's state, and runs Pyro's validation.
    From the second step on, Pyro's handlers do not run. The same seed gives the same noise as ``SVI``, and the same
    losses up to rounding. Model and guide must have a static structure: they may depend on shapes, on numbers among
    the arguments and on attributes of modules and of the loss (a change of these leads to a new first step), but on
    no other Python state.

    Args:
        model: a Pyro model.
        guide: its guide.
        optim: Adam, AdamW or SGD: a torch optimizer, a function from the parameters to one, or an optimizer of
            ``pyro.optim``. Its state stays in the optimizer, and its learning rate may change.
        loss: a Pyro ELBO with a ``differentiable_loss``, its class, or a function of (model, guide, ...).
        clip_norm: scale the gradient of all parameters together down to at most this norm.
        backend: as in ``torch.compile``; ``"eager"`` replays the trace without compiling it.
        precision: ``"float32"`` computes in the parameters' precision, ``"tf32"`` allows TF32 matrix
            products on CUDA, ``"bf16"`` casts to bfloat16 where autocast does.

    Raises:
        SettingsError: if the optimizer is not supported, or a setting is out of range.
        ModelError: if the loss has no ``differentiable_loss``.
        CompileError: at a step, if it cannot be traced or compiled; nothing has changed then.

    References:
        | Automated Variational Inference in Probabilistic Programming (Wingate & Weber, 2013),
          https://arxiv.org/abs/1301.1299
        | PyTorch 2 (Ansel et al., 2024), https://doi.org/10.1145/3620665.3640366

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StandardNormal(2),
        ...     decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [], 5)),
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [], 4)),
        ... )
        >>> adam = torch.optim.Adam(vae.parameters(), lr=0.01)
        >>> svi = CompiledSVI(vae.model, vae.guide, adam, pv.elbo.Trace_ELBO(), backend="eager")
        >>> losses = svi.run(torch.randn(256, 5), steps=100, batch_size=64, size=256)
        >>> losses.shape, bool(losses[-10:].mean() < losses[:10].mean())
        (torch.Size([100]), True)
    """

    @takes_settings
    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: Optimizer | Maker | PyroOptim,
        loss: Loss | type[ELBO],
        *,
        clip_norm: float | None = None,
        backend: Backend = "inductor",
        precision: str = "float32",
    ) -> None:
        validate_clip_norm(clip_norm)
        validate_precision(precision)
        if isinstance(optim, PyroOptim) and clip_norm is not None:
            raise SettingsError(
                "clip_norm needs a torch optimizer: it clips the gradient of all parameters together; pass a torch "
                "optimizer, or use the clip_args of the Pyro optimizer"
            )
        loss = as_estimator(loss, "loss")
        if isinstance(loss, ELBO) and not hasattr(loss, "differentiable_loss"):
            raise ModelError(f"{loss_name(loss)} has no differentiable_loss, so its step cannot be compiled; use SVI")
        whole = optim if isinstance(optim, PyroOptim) else WholeOptimizer(optim, clip_norm)
        validate_optimizer(whole)
        super().__init__(model, guide, whole, loss)
        self.estimator, self.precision = loss, precision
        self._replays = Replays(backend)
        self._all_reduce: GradientAllReduce | None = None
        self._updates: Updates | None = None
        self._watch = Watch(())
        self._counters: list[tuple[Tensor, float]] = []
        self._changes = 0

    def distribute(self, together: GradientAllReduce) -> None:
        """Take all following steps together with other processes, each on its own rows.

        Args:
            together: the all-reduce of loss and gradient.
        """
        self.loss_and_grads = self._all_reduce = together
        self._replays.group = together.group

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step.

        Args:
            args, kwargs: passed to model and guide.

        Returns:
            The loss before the step.
        """
        given = CallArguments(args, kwargs)
        return self._steps(given, 1, [t.unsqueeze(0) for t in given.tensors], ())[0].item()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Evaluate the loss without a gradient step.

        Args:
            args, kwargs: passed to model and guide.
        """
        if self._stale():
            return super().evaluate_loss(*args, **kwargs)
        given = CallArguments(args, kwargs)
        with self._computing(), torch.no_grad(), _explain_enumeration(self.estimator):
            replay = self._replays.get(("loss", given), self._loss_of(given), (), given.tensors, self._watch.restore)
            return replay.once(given.tensors).item()

    @takes_settings
    def run(self, data: Tensor | Sequence[Tensor], *, steps: int, batch_size: int, **kwargs: Any) -> Tensor:
        """Take many steps on resident data, in a new order in each pass over them.

        .. math:: \\text{batch } t = x_{\\pi(tm)}, \\dots, x_{\\pi(tm + m - 1)}

        The last batch of a pass may be smaller; batch normalization fails if it has one row. If the parameters are on
        a GPU, the data are moved there, or streamed if they do not fit.

        Args:
            data: shape ``(datum, ...)``, or several such tensors, passed to model and guide as positional arguments.
            steps: the number of steps, at least 1.
            batch_size: rows per step, from 1 to all.
            kwargs: passed to model and guide unchanged, such as ``size=len(data)``.

        Returns:
            The loss before each step, shape ``(steps,)``.

        Raises:
            SettingsError: if a number is out of range.
            DataError: if there are no data, or the tensors differ in length.
        """
        tensors = (data,) if isinstance(data, Tensor) else tuple(data)
        validate_run(tensors, steps, batch_size)
        feed, rows = feed_of(tensors, self._device(tensors[0])), BatchArguments(kwargs)
        losses: list[Tensor] = []
        while (left := steps - sum(map(len, losses))) > 0:
            order = torch.randperm(len(tensors[0]), device=feed.device)
            losses += self.steps_over(feed, order[: left * batch_size], batch_size, rows)
        return torch.cat(losses)

    def steps_over(self, feed: Feed, order: Tensor, batch_size: int, arguments: Arguments) -> Iterator[Tensor]:
        """Take steps over the rows of ``feed`` in the given order; the last batch may be smaller.

        Args:
            feed: the data.
            order: indices of rows.
            batch_size: rows per step.
            arguments: a hashable function from one batch of each tensor of the feed to the arguments of model and
                guide.

        Returns:
            An iterator over the losses of a few steps at a time.
        """
        whole = len(order) // batch_size * batch_size if batch_size else 0
        chunks = [*order[:whole].view(-1, batch_size).split(CHUNK)] if whole else []
        if whole < len(order) or not batch_size:  # an empty batch is a step too, if other processes have rows
            chunks.append(order[whole:].unsqueeze(0))
        if chunks and self._stale():
            chunks[0:1] = [part for part in (chunks[0][:1], chunks[0][1:]) if len(part)]
        for chunk in chunks:
            index, data = feed.chunk(chunk)
            with _explain_single_row(chunk.shape[1] == 1 < batch_size):
                losses = self._steps(GatheredArguments(arguments), len(index), [index], data)
            yield losses

    @property
    def has_started(self) -> bool:
        """Whether the first step, Pyro's own, was taken."""
        return self._updates is not None

    def refresh(self) -> None:
        """Update after parameters or the optimizer's state were changed in place from outside."""
        if self._updates is not None and not self._updates.recount():
            self._updates = None
            self._replays.clear()

    def _steps(self, given: Arguments, steps: int, changing: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensor:
        """Take one step per row of the tensors in ``changing``; return the losses."""
        if self._stale():
            first = self._first(*given(*(tensor[0] for tensor in changing), *fixed))
            rest = [tensor[1:] for tensor in changing]
            return first if steps == 1 else torch.cat([first, self._steps(given, steps - 1, rest, fixed)])
        assert self._updates is not None
        with self._computing(), torch.no_grad(), _explain_enumeration(self.estimator):
            numbers = self._updates.numbers(steps).to(self._updates.parameters[0].device, non_blocking=True)
            inputs = [numbers, *changing]
            replay = self._replays.get(("step", given), self._step_of(given), inputs, fixed, self._watch.restore)
            losses = replay(inputs, fixed)
            self._updates.advance(steps)
        return losses

    def _first(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Take a step like ``pyro.infer.SVI``, and record the parameters and values for the compiled steps."""
        for owner in losses_in(self.estimator):  # in a CUDA graph, a counter in main memory would be a constant
            if isinstance(getattr(owner, "step", None), Tensor):
                owner.step = owner.step.to(self._device(owner.step))
        before = [(counter, counter.item()) for counter in counters(self.estimator)]
        with self._computing(), poutine.trace(param_only=True) as met:
            loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        sites = met.trace.nodes
        parameters = list({id(p): p for site in sites.values() for p in [site["value"].unconstrained()]}.values())
        if self._all_reduce is not None:  # a process without rows has no parameter sites
            parameters = self._all_reduce.trained
        if not parameters:
            raise CompileError("model and guide register no parameter with Pyro, so none is trained; use pyro.module")
        self.optim(parameters)
        self._updates = Updates(self.optim, parameters)
        for parameter in parameters:
            parameter.grad = None
        self._counters = [(counter, counter.item() - then) for counter, then in before]
        store = pyro.get_param_store()
        spaces = [("ParamStoreDict", vars(store), ["_params"]), ("pyro.param", store._params, list(sites))]
        self._watch = Watch((self.model, self.guide, self.estimator), [*spaces, *self._updates.spaces()])
        like = self._updates.parameters[0]
        return torch.as_tensor(loss, dtype=like.dtype, device=like.device).detach().reshape(1)

    def _stale(self) -> bool:
        """Return whether the next step must be Pyro's own: the first, after a change, or inside a handler."""
        if runtime._PYRO_STACK:
            return True
        if self._updates is not None and (what := self._watch.changed()):
            self._changes += 1
            if self._changes > MOST_CHANGES:
                raise CompileError(
                    f"{what} has changed again, after {MOST_CHANGES} changes that were retraced; "
                    "make it a buffer, or pass it as a tensor argument"
                )
            self._updates = None
            self._replays.clear()
        return self._updates is None

    def _step_of(self, given: Arguments) -> Callable[..., Tensor]:
        """Make the whole step as a function of tensors."""
        updates, differentiable_loss, all_reduce = self._updates, differentiable(self.estimator), self._all_reduce
        assert updates is not None

        def step(numbers: Tensor, *tensors: Tensor) -> Tensor:
            args, kwargs = given(*tensors)
            gradients: Sequence[Tensor]
            with torch.enable_grad():
                if all_reduce is None or len(args[0]):
                    loss = differentiable_loss(self.model, self.guide, *args, **kwargs)
                    gradients = torch.autograd.grad(loss, updates.parameters, materialize_grads=True)
                else:
                    gradients = [torch.zeros_like(p) for p in updates.parameters]
                    loss = gradients[0].new_zeros(())
            if all_reduce is not None:
                loss, gradients = all_reduce.traced(loss, gradients, len(args[0]))
            updates.apply(gradients, numbers)
            for counter, by in self._counters:
                counter.add_(by)
            return loss.detach()

        return step

    def _loss_of(self, given: Arguments) -> Callable[..., Tensor]:
        def loss(*tensors: Tensor) -> Tensor:
            args, kwargs = given(*tensors)
            return torch.as_tensor(self.loss(self.model, self.guide, *args, **kwargs))

        return loss

    def _device(self, data: Tensor) -> torch.device:
        """Return the device of the parameters, or of the data if model and guide are not modules."""
        known = (p for part in (self.model, self.guide) for p in getattr(part, "parameters", tuple)())
        return next(known, data).device

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        return computing_in(self.precision, "cuda" if self._device(torch.empty(0)).type == "cuda" else "cpu")


@contextlib.contextmanager
def _explain_enumeration(loss: Any) -> Iterator[None]:
    """Name the estimators to use instead if a step of TraceEnum_ELBO cannot be compiled."""
    try:
        yield
    except CompileError as error:
        if not isinstance(loss, TraceEnum_ELBO):
            raise
        raise CompileError(
            f"a step of TraceEnum_ELBO, which leaves out values of probability 0, cannot be compiled ({error}); use "
            "ELBO, IWAE or M2 of pyro_vae.elbo, which sum enumerated sites out, or pyro.infer.SVI"
        ) from error


@contextlib.contextmanager
def _explain_single_row(is_single: bool) -> Iterator[None]:
    """Raise a SettingsError about the batch size if a step fails on a last batch of one row."""
    try:
        yield
    except Exception as error:  # a user's component may raise anything
        if not is_single:
            raise
        reason = str(error) if isinstance(error, PyroVAEError) else in_a_line(error)
        raise SettingsError(
            f"the step failed on the last batch of a pass, which has one row ({reason}); "
            "choose a batch_size that leaves no batch of one row, or drop one row of the data"
        ) from error
