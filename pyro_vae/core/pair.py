"""A Pyro model and its guide, the pair that this package trains and evaluates; a VAE is a special case."""

import functools
import inspect
import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.core.compatibility import drawn, in_a_line
from pyro_vae.core.component import Distribution, evaluating
from pyro_vae.core.device import seeded
from pyro_vae.core.joined import JoinedPosterior, JoinedPrior, validate_generative
from pyro_vae.core.param_store import Picklable
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import Program, global_sites, samples, traces
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import ModelError, PyroVAEError

if TYPE_CHECKING:
    from pyro_vae.data.fingerprint import Trained


class Amortized(Picklable):
    """A model and a guide of ``(x, size=None, context=None, mask=None)`` whose sites lie in a plate over data.

    The latents of a datum are a vector z of shape ``(latent,)``, of all sites together. Functions use the distributions
    of z and of x given z (:meth:`prior_of`, :meth:`posterior`, :meth:`likelihood`), the log-weights, the loss and the
    parameters. Functions that vary a prior, decoder or encoder take a :class:`pyro_vae.VAE`.
    """

    model: nn.Module
    guide: nn.Module
    trained_on: "Trained | None" = None
    """Hashes of the training data of :func:`pyro_vae.fit`; not part of the state."""

    def like(self, x: Tensor) -> Tensor:
        """Return ``x`` on the device and in the precision of the parameters; no copy if ``x`` already matches."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        reference = next((t for t in tensors if t.is_floating_point()), self._default_tensor(x))
        return x.to(reference.device, reference.dtype)

    def _default_tensor(self, x: Tensor) -> Tensor:
        """Return a tensor on the default device and in the default precision, for models without parameters."""
        return torch.empty(())

    @abstractmethod
    def posterior(self, rows: Rows) -> Any:
        """Return ``q(z|x)`` of rows, a distribution of batch shape ``(datum,)``."""

    @abstractmethod
    def prior_of(self, rows: Rows) -> Any:
        """Return ``p(z)`` given the contexts of rows, a distribution of batch shape ``(datum,)`` or ``()``."""

    @abstractmethod
    def likelihood(self, z: Tensor, rows: Rows) -> Distribution:
        """Return ``p(x|z)`` at latents ``(*, datum, latent)`` of rows, without their missing values."""

    @abstractmethod
    def latent_names(self, rows: Rows) -> list[str]:
        """Return the name of each latent: its site and its index within the site."""

    @abstractmethod
    def closed_form_posterior(self, rows: Rows) -> Any:
        """Return ``q(z|x)`` of rows as one distribution of pyro.distributions, if there is one."""

    @abstractmethod
    def part_names(self) -> dict[str, str]:
        """Return the class or function of each part of the model and the guide, by role."""

    @abstractmethod
    def stand_in(self, number: int) -> Tensor:
        """Return stand-ins for the data of ``number`` rows, for draws of new data."""

    def validate_draws(self, rows: Rows) -> None:
        """Raise a ModelError if data cannot be drawn from the model."""

    def draw_latents(self, rows: Rows, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw z from the prior given the contexts of rows, shape ``(*shape, datum, latent)``."""
        self.validate_draws(rows)
        prior = self.prior_of(rows)
        return drawn("prior", prior, shape if prior.batch_shape else (*shape, len(rows)))

    def log_joint_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        """Return ``log p(x, z)`` at these rows as a function of latents of shape ``(*, datum, latent)``."""
        return functools.partial(self.log_joint, rows=rows)

    @abstractmethod
    def log_joint(self, z: Tensor, rows: Rows) -> Tensor:
        """Compute ``log p(x, z)`` of rows at latents ``(*, datum, latent)``, in nats, shape ``(*, datum)``."""

    @abstractmethod
    def check(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Raise a ModelError if the data do not fit model and guide."""


class NoPart(ModelError, AttributeError):
    """A Pair has no prior, decoder or encoder as components."""


class Pair(Amortized):
    """A Pyro model and its guide, for all functions that do not vary a prior, decoder or encoder.

    .. math:: p(x, z_1, \\dots, z_L), \\qquad q(z_1, \\dots, z_L | x)

    Training, the evidence, comparisons, :func:`pyro_vae.check` and its diagnostics, :func:`~pyro_vae.sample`,
    :func:`~pyro_vae.encode`, :func:`~pyro_vae.reconstruct`, :func:`~pyro_vae.score` and :func:`~pyro_vae.to_datatree`
    take a Pair. The latents of all sites are joined to one vector per datum, in the order of the model. Draws of data
    come from the model with x unobserved, so it may use x only as ``obs=x`` and for the number of rows.
    :func:`~pyro_vae.fit` trains the parameters of modules only, so model and guide must be modules (``PyroModule``, or
    ``nn.Module`` with ``pyro.module``) or bound methods of a module.

    Args:
        model: a callable that takes the first arguments of ``(x, size=None, context=None, mask=None)``, as many as it
            needs. Its sample sites lie in one plate over data,
            ``pyro.plate("data", len(x) if size is None else size, subsample=x)``. A model of ``x`` alone cannot be
            trained on minibatches, since n/m scaling needs ``size``. Latents outside the plate are **global**: all data
            share one draw. ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``ELBO`` and ``STL`` train them; functions that
            need log-weights per datum take the pair conditioned on a draw of them (:meth:`condition`).
        guide: the guide of the model, with the same arguments.

    Raises:
        ModelError: if model or guide is not callable.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     scale = pyro.param("s", torch.ones(()), constraint=dist.constraints.positive)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, scale).to_event(1))
        >>> pyro.clear_param_store()
        >>> x = torch.randn(9, 2)
        >>> table = pv.compare_elbos(Pair(model, guide), x, {"STL": pv.elbo.STL()}, draws=4)
        >>> table.parameter_group.values.tolist()
        ['all', 'φ', 's']
        >>> found = pv.log_evidence(Pair(model, guide), x, num_particles=2000)
        >>> exact = dist.Normal(torch.zeros(2), 2**0.5).to_event(1).log_prob(x)
        >>> bool((abs(found.log_evidence - exact.numpy()) < 5 * found.mcse).all())
        True
    """

    def __init__(self, model: Program, guide: Program) -> None:
        super().__init__()
        self.model, self.guide = _ProgramAdapter(model, "model"), _ProgramAdapter(guide, "guide")
        self.unowned: list[str] = []
        """Parameters of Pyro's parameter store that belong to no module; set by :meth:`check`."""
        self.unregistered: list[str] = []
        """Parameters that neither model nor guide registers with Pyro; set by :meth:`check`."""
        self.global_sites: list[str] = []
        """The latents outside the plate over data; set by :meth:`check`."""
        self.blank_row: Tensor | None = None
        """A row of zeros of the shape of the data; set by :meth:`check`."""

    @torch.no_grad()
    @takes_settings
    def draw_globals(
        self, x: Tensor, *, draws: int = 1, seed: int = 0, context: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Draw the global sites (outside the plate over data) from the guide.

        Args:
            x: data, shape ``(datum, *features)``; the guide runs on the first two rows.
            draws: number of draws, at least 1.
            seed: seed of the draws.
            context: shape ``(datum, c)``.

        Returns:
            A tensor of shape ``(draw, *event)`` for each site; empty if all sites lie in the plate over data.

        Raises:
            ModelError: if model or guide fails.

        Example:
            >>> import pyro.distributions as dist
            >>> def model(x, size=None):
            ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(x) if size is None else size, subsample=x):
            ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
            >>> def guide(x, size=None):
            ...     pyro.sample("mean", dist.Normal(0.3, 0.1))
            >>> Pair(model, guide).draw_globals(torch.zeros(5), draws=3)["mean"].shape
            torch.Size([3])
        """
        whole("draws", draws, 1)
        self.check(x, context)
        rows = Rows(x, context).take(slice(2)).like(self)
        with seeded(seed, rows.x.device), evaluating(self):
            runs = [poutine.trace(self.guide).get_trace(*rows.arguments()) for _ in range(draws)]
        return {name: torch.stack([t.nodes[name]["value"] for t in runs]) for name in self.global_sites}

    def posterior(self, rows: Rows) -> JoinedPosterior:
        """Return ``q(z|x)`` of rows, where z joins the latents of all sites in the order of the model."""
        return JoinedPosterior(self, rows)

    def prior_of(self, rows: Rows) -> JoinedPrior:
        """Return ``p(z)`` given the contexts of rows, with z as in :meth:`posterior`."""
        return JoinedPrior(self, rows)

    def likelihood(self, z: Tensor, rows: Rows) -> Distribution:
        """Return ``p(x|z)``, the distribution of the site that observes x, at latents ``(*, datum, latent)``."""
        return self.prior_of(rows).likelihood(z)

    def latent_names(self, rows: Rows) -> list[str]:
        """Return the name of each latent: its site and its index within the site."""
        return self.prior_of(rows).names

    def validate_draws(self, rows: Rows) -> None:
        """Validate that data can be drawn from the model.

        Raises:
            ModelError: if the model uses the values of x other than as ``obs=x``, or observes other data too.
        """
        validate_generative(self.model, rows)

    def closed_form_posterior(self, rows: Rows) -> Distribution:
        """Return ``q(z|x)`` of rows as one normal distribution.

        Raises:
            ModelError: if a site is not normal, or depends on another site.
        """
        return self.posterior(rows).as_normal()

    def part_names(self) -> dict[str, str]:
        """Return the names of the two programs, by role."""
        programs = {"model": self.model, "guide": self.guide}
        return {role: getattr(program, "name", type(program).__name__) for role, program in programs.items()}

    def stand_in(self, number: int) -> Tensor:
        """Return zeros of the shape of the rows that :meth:`check` saw last, for draws of new data.

        Raises:
            ModelError: if the pair has seen no data.
        """
        if self.blank_row is None:
            raise ModelError("the shape of a row is unknown; train the pair, or call pair.check(x) first")
        return self.like(self.blank_row).expand(number, *self.blank_row.shape[1:]).clone()

    def log_joint_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        return self.posterior(rows).log_joint

    def log_joint(self, z: Tensor, rows: Rows) -> Tensor:
        """Compute ``log p(x, z)`` of rows at z, joined as in :meth:`posterior`."""
        return self.posterior(rows).log_joint(z)

    def condition(self, values: Mapping[str, Tensor]) -> "Pair":
        """Condition model and guide on values of the global sites; parameters are shared.

        .. math:: p(x_i, z_i \\mid g), \\qquad q(z_i \\mid x_i, g)

        Estimators and diagnostics that need log-weights per datum take the conditioned pair. Thus
        :func:`pyro_vae.log_evidence` estimates :math:`\\log p(x_i | g)`.

        Args:
            values: the value of each global site, of the shape of its event.

        Example:
            >>> import pyro.distributions as dist, pyro_vae as pv
            >>> def model(x, size=None):
            ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(x) if size is None else size, subsample=x):
            ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
            ...         pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)
            >>> def guide(x, size=None):
            ...     mean = pyro.sample("mean", dist.Normal(0.3, 0.1))
            ...     with pyro.plate("data", len(x) if size is None else size, subsample=x):
            ...         pyro.sample("z", dist.Normal((x[:, 0] + mean) / 2, 0.5**0.5))
            >>> given = Pair(model, guide).condition({"mean": torch.tensor(0.5)})
            >>> found = pv.log_evidence(given, torch.zeros(2, 1), num_particles=3).log_evidence.values
            >>> exact = float(dist.Normal(0.5, 2**0.5).log_prob(torch.tensor(0.0)))
            >>> bool((abs(found - exact) < 1e-6).all())
            True
        """
        conditioned = Pair(_Conditioned(self.model, values), _Conditioned(self.guide, values))
        conditioned.blank_row, conditioned.trained_on = self.blank_row, self.trained_on
        return conditioned

    def __getattr__(self, name: str) -> Any:
        if name in ("prior", "decoder", "encoder"):
            raise NoPart(f"this function needs the {name} of a VAE, which a Pair does not have; pass a pyro_vae.VAE")
        return super().__getattr__(name)

    def _default_tensor(self, x: Tensor) -> Tensor:
        return x

    @torch.no_grad()
    def check(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Run model and guide on two rows.

        Args:
            x: data, shape ``(datum, *features)``.
            context: shape ``(datum, c)``.
            mask: true where a value was observed, shape of ``x``.

        Raises:
            ModelError: if model or guide fails, or the guide lacks a latent of the model.
        """
        rows = Rows(x, context, mask).take(slice(2)).like(self)
        try:
            with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), evaluating(self):
                model_trace, guide_trace = traces(self.model, self.guide, *rows.arguments())
        except PyroVAEError:
            raise
        except Exception as error:  # user code may raise anything
            advice = "; it was called without a context" if context is None and self._takes_context() else ""
            raise ModelError(f"model or guide fails on two rows of the data ({in_a_line(error)}){advice}") from error
        latents = {name for name, site in samples(model_trace) if not site["is_observed"]}
        if missing := sorted(latents - {name for name, _ in samples(guide_trace)}):
            raise ModelError(f"the guide has no site {missing[0]}, a latent of the model; sample it in the guide too")
        self.global_sites = global_sites(model_trace, guide_trace)
        self.blank_row = torch.zeros_like(rows.x[:1])
        owned = {id(parameter) for parameter in self.parameters()}
        used = [name for t in (model_trace, guide_trace) for name, site in t.nodes.items() if site["type"] == "param"]
        store = pyro.get_param_store()
        registered = {name: id(store[name].unconstrained()) for name in used}
        self.unowned = [name for name, parameter in registered.items() if parameter not in owned]
        self.unregistered = self._unregistered({*registered.values()})

    def _takes_context(self) -> bool:
        return any(isinstance(p, _ProgramAdapter) and p.takes_context for p in (self.model, self.guide))

    def _unregistered(self, registered: set[int]) -> list[str]:
        """Name the trainable parameters that Pyro does not see; a PyroModule shows each parameter when it is used."""
        shown = {id(p) for module in self.modules() if isinstance(module, PyroModule) for p in module.parameters()}
        trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return [name.split(".owner.")[-1] for name, p in trainable.items() if id(p) not in registered | shown]


class _Conditioned(nn.Module):
    """A program conditioned on values of some sites, which are hidden from outer handlers."""

    def __init__(self, program: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.program, self.values = program, dict(values)

    def forward(
        self, x: Tensor | None, size: int | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        conditioned = poutine.block(poutine.condition(self.program, data=self.values), hide=list(self.values))
        return conditioned(x, size, context, mask)


class _ProgramAdapter(nn.Module):
    """A program, called with as many of (x, size, context, mask) as its signature takes."""

    def __init__(self, program: Program, role: str) -> None:
        super().__init__()
        if not callable(program):
            raise ModelError(f"the {role} has type {type(program).__name__} and is not callable; pass a Pyro program")
        self.program, self.role = program, role
        self.name = getattr(program, "__qualname__", type(program).__qualname__)
        owner = getattr(program, "__self__", None)
        if isinstance(owner, nn.Module):
            self.owner = owner  # registers the parameters that a bound method trains
        called = program.forward if isinstance(program, nn.Module) else program
        kinds = [p.kind for p in inspect.signature(called).parameters.values()]
        every = inspect.Parameter.VAR_POSITIONAL in kinds
        self.takes = 4 if every else sum(kind is not inspect.Parameter.KEYWORD_ONLY for kind in kinds)
        self.takes_context = self.takes > 2 and not every

    def forward(
        self, x: Tensor | None, size: int | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        arguments = [x, size, context, mask]
        if size is not None and self.takes < 2 and x is not None and size == len(x):
            arguments[1] = None  # x is the whole data set, so the program can infer size from it
        while len(arguments) > 1 and arguments[-1] is None:
            arguments.pop()
        if len(arguments) > self.takes:
            missing = ("x", "size", "context", "mask")[len(arguments) - 1]
            why = "minibatches cannot be scaled by n/m" if missing == "size" else f"the {missing} would be ignored"
            raise ModelError(
                f"the {self.role} takes {self.takes} argument{'s' * (self.takes != 1)} and no {missing}, so {why}; "
                f"give it the arguments of (x, size=None, context=None, mask=None) up to {missing}"
            )
        return self.program(*arguments)
