"""What is trained and evaluated: a Pyro model and its guide, of which a VAE is one case."""

import functools
import inspect
import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.core.compatibility import in_a_line
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded
from pyro_vae.core.joined import JoinedPosterior
from pyro_vae.core.param_store import Picklable
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import Program, global_sites, samples, traces
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import ModelError, PyroVAEError

if TYPE_CHECKING:
    from pyro_vae.data.fingerprint import Trained


class Amortised(Picklable):
    """A model and a guide of ``(x, size=None, context=None, mask=None)``, whose sites lie in a plate over data.

    All that is done with log-weights, the loss and parameters alone takes one: training, the evidence from the guide's
    draws, k̂ and comparisons. What needs a prior, a decoder and an encoder takes a :class:`pyro_vae.VAE`.
    """

    model: nn.Module
    guide: nn.Module
    trained_on: "Trained | None" = None
    """What :func:`pyro_vae.fit` trained it on, as hashes; no part of its state."""

    def like(self, x: Tensor) -> Tensor:
        """``x`` on the device and in the precision of the parameters (itself, where it is so already)."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        own = next((t for t in tensors if t.is_floating_point()), self._without_parameters(x))
        return x.to(own.device, own.dtype)

    def _without_parameters(self, x: Tensor) -> Tensor:
        """A tensor on the device and in the precision that are taken where there is no parameter."""
        return torch.empty(())

    def log_joint_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        """The function ``log p(x, z)`` of latents, shape ``(*, datum, latent)``, at these rows."""
        return functools.partial(self.log_joint, rows=rows)

    @abstractmethod
    def log_joint(self, z: Tensor, rows: Rows) -> Tensor:
        """``log p(x, z)`` of rows at latents ``(*, datum, latent)``, in nats, shape ``(*, datum)``."""

    @abstractmethod
    def check(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Refuse data that do not fit model and guide, by a ModelError."""


class NoPart(ModelError, AttributeError):
    """A pair has no such part."""


class Pair(Amortised):
    """A Pyro model and its guide, used as a VAE is where no prior, decoder or encoder is asked for.

    :func:`pyro_vae.fit`, :func:`~pyro_vae.log_evidence` (``"iw"`` and ``"psis"``), :func:`~pyro_vae.diagnose.khat`,
    :func:`~pyro_vae.compare_models`, :func:`~pyro_vae.compare_elbos` and :class:`~pyro_vae.CompiledSVI` take one. To be
    trained by :func:`~pyro_vae.fit` its parameters must be those of modules: model and guide are modules
    (``PyroModule``, or ``nn.Module`` with ``pyro.module``), or bound methods of one.

    Args:
        model: a callable of as many of ``(x, size=None, context=None, mask=None)`` as it needs; its sample sites lie in
            one plate over data, ``pyro.plate("data", len(x) if size is None else size, subsample=x)``. One of ``x``
            alone cannot be told that a batch stands for more data. Latents outside the plate are **global**: one draw
            belongs to all data. ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``ELBO`` and ``STL`` train them, and what
            needs log-weights per datum takes the pair given a draw of them (:meth:`condition`).
        guide: its guide, of the same arguments.

    Raises:
        ModelError: if one cannot be called.

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
        self.model, self.guide = _Called(model, "model"), _Called(guide, "guide")
        self.loose: list[str] = []
        """Parameters of Pyro's store that no module has, as :meth:`check` found them."""
        self.global_sites: list[str] = []
        """The latents outside the plate over data, as :meth:`check` found them."""

    @torch.no_grad()
    @takes_settings
    def draw_globals(
        self, x: Tensor, *, draws: int = 1, seed: int = 0, context: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Draw the global sites, those outside the plate over data, from the guide.

        Args:
            x: data, shape ``(datum, *features)``, of which the guide sees the first two rows.
            draws: at least 1.
            seed: of the draws.
            context: shape ``(datum, c)``.

        Returns:
            By site, shape ``(draw, *event)``; empty if all sites lie in the plate over data.

        Raises:
            ModelError: if model or guide cannot be run.

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
            found = [poutine.trace(self.guide).get_trace(*rows.arguments()) for _ in range(draws)]
        return {name: torch.stack([t.nodes[name]["value"] for t in found]) for name in self.global_sites}

    def posterior(self, rows: Rows) -> JoinedPosterior:
        """``q(z|x)`` of rows, z the continuous latents of all sites joined."""
        return JoinedPosterior(self, rows)

    def log_joint_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        return self.posterior(rows).log_joint

    def log_joint(self, z: Tensor, rows: Rows) -> Tensor:
        """``log p(x, z)`` of rows, z as :meth:`posterior` joins it."""
        return self.posterior(rows).log_joint(z)

    def condition(self, values: Mapping[str, Tensor]) -> "Pair":
        """Return the pair given values of its global sites; parameters are shared.

        .. math:: p(x_i, z_i \\mid g), \\qquad q(z_i \\mid x_i, g)

        All estimators and diagnostics that need log-weights per datum take the pair given one draw of its global sites.
        So :func:`pyro_vae.log_evidence` estimates :math:`\\log p(x_i | g)`.

        Args:
            values: by site, the shape of its event; all global sites.

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
        return Pair(_Given(self.model, values), _Given(self.guide, values))

    def __getattr__(self, name: str) -> Any:
        if name in ("prior", "decoder", "encoder", "likelihood"):
            raise NoPart(
                f"this takes a VAE, of which it needs the {name}; a Pair is a model and a guide, whose sites may be any"
            )
        return super().__getattr__(name)

    def _without_parameters(self, x: Tensor) -> Tensor:
        return x

    @torch.no_grad()
    def check(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Run both on two rows.

        Args:
            x: data, shape ``(datum, *features)``.
            context: shape ``(datum, c)``.
            mask: true where a value was observed, the shape of ``x``.

        Raises:
            ModelError: if one cannot be run, or the guide lacks a latent of the model.
        """
        rows = Rows(x, context, mask).take(slice(2)).like(self)
        try:
            with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), evaluating(self):
                model_trace, guide_trace = traces(self.model, self.guide, *rows.arguments())
        except PyroVAEError:
            raise
        except Exception as error:  # a program of the user's own, which may raise anything
            raise ModelError(f"model and guide cannot be run on two rows of the data ({in_a_line(error)})") from error
        latents = {name for name, site in samples(model_trace) if not site["is_observed"]}
        if lacks := sorted(latents - {name for name, _ in samples(guide_trace)}):
            raise ModelError(f"the guide has no site {lacks[0]}, which is a latent of the model; sample it there too")
        self.global_sites = global_sites(model_trace, guide_trace)
        own = {id(parameter) for parameter in self.parameters()}
        found = [name for t in (model_trace, guide_trace) for name, site in t.nodes.items() if site["type"] == "param"]
        store = pyro.get_param_store()
        self.loose = [name for name in found if id(store[name].unconstrained()) not in own]


class _Given(nn.Module):
    """A program at given values of some sites, which no handler around it sees."""

    def __init__(self, program: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.program, self.values = program, dict(values)

    def forward(
        self, x: Tensor | None, size: int | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        given = poutine.block(poutine.condition(self.program, data=self.values), hide=list(self.values))
        return given(x, size, context, mask)


class _Called(nn.Module):
    """A program, called with as many of (x, size, context, mask) as it takes."""

    def __init__(self, program: Program, role: str) -> None:
        super().__init__()
        if not callable(program):
            raise ModelError(f"the {role} is a {type(program).__name__}, which cannot be called; give a Pyro program")
        self.program, self.role = program, role
        owner = getattr(program, "__self__", None)
        if isinstance(owner, nn.Module):
            self.owner = owner  # whose parameters a bound method trains
        called = program.forward if isinstance(program, nn.Module) else program
        kinds = [p.kind for p in inspect.signature(called).parameters.values()]
        every = inspect.Parameter.VAR_POSITIONAL in kinds
        self.takes = 4 if every else sum(kind is not inspect.Parameter.KEYWORD_ONLY for kind in kinds)

    def forward(
        self, x: Tensor | None, size: int | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        given = [x, size, context, mask]
        if size is not None and self.takes < 2 and x is not None and size == len(x):
            given[1] = None  # all data, of which x alone tells the number
        while len(given) > 1 and given[-1] is None:
            given.pop()
        if len(given) > self.takes:
            lacks = ("x", "size", "context", "mask")[len(given) - 1]
            why = "a batch of it could not stand for all data" if lacks == "size" else f"its {lacks} would be lost"
            raise ModelError(
                f"the {self.role} takes {self.takes} argument{'s' * (self.takes != 1)} and no {lacks}, so {why}; let "
                "it take (x, size=None, context=None, mask=None) as far as the last of these"
            )
        return self.program(*given)
