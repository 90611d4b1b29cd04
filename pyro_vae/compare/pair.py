"""The subject of a comparison: a VAE or a Pyro model and guide, with data and grouped parameters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_vae.core.component import evaluating
from pyro_vae.core.one_at_a_time import one_at_a_time
from pyro_vae.core.pair import Pair
from pyro_vae.core.rows import Rows
from pyro_vae.core.threads import threads_for_evaluations
from pyro_vae.core.traces import Program, replayed, samples
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import whole
from pyro_vae.data.rows import rows_for, rows_of
from pyro_vae.errors import ModelError


@dataclass(frozen=True)
class Subject:
    """A pair with data, ready to be evaluated.

    Args:
        model: a Pyro model.
        guide: its guide.
        rows: the data, on the device and in the precision of the pair.
        size: n.
        arguments: the arguments of model and guide.
        parameters: name → trainable leaf, those of the model first.
        generative: the number of parameters of the model.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> sorted(subject_of(vae, torch.ones(3, 5), None).groups())
        ['all', 'decoder.net', 'encoder', 'encoder.net', 'Θ', 'φ']
    """

    model: Program
    guide: Program
    rows: Rows
    size: int
    arguments: tuple[Any, ...]
    parameters: dict[str, Tensor]
    generative: int

    def groups(self) -> dict[str, list[int]]:
        """Group the parameters: all, Θ, φ, and those directly in each named module."""
        names = list(self.parameters)
        found = {"all": list(range(len(names))), "Θ": list(range(self.generative))}
        found["φ"] = list(range(self.generative, len(names)))
        for i, name in enumerate(names):
            found.setdefault(name.rpartition(".")[0] or name, []).append(i)
        return {name: members for name, members in found.items() if members}

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        return self.rows.x.device

    @contextmanager
    def evaluating(self, particles: int = 1) -> Iterator[None]:
        """Evaluate inside with modules in evaluation mode, without Pyro's validation and with gradients.

        Uses one thread if an evaluation with this number of particles is small.
        """
        modules = [program for program in (self.model, self.guide) if isinstance(program, nn.Module)]
        weights = {id(p): p for p in (*self.parameters.values(), *(p for m in modules for p in m.parameters()))}
        with ExitStack() as stack:
            stack.enter_context(one_at_a_time())
            stack.enter_context(threads_for_evaluations(weights.values(), particles * len(self.rows)))
            for module in modules:
                stack.enter_context(evaluating(module))
            stack.enter_context(pyro.validation_enabled(False))
            stack.enter_context(torch.enable_grad())
            yield


def subject_of(vae: VAE | Pair, x: Any, size: int | None) -> Subject:
    """Combine a VAE or a pair with data.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of a VAE's likelihood.
        ModelError: if a VAE does not match the data.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> subject_of(vae, torch.ones(3, 5), 30).size
        30
    """
    rows = rows_for(vae, x) if isinstance(vae, VAE) else rows_of(x)
    n = len(rows) if size is None else whole("size", size, 1)
    if torch.is_inference_mode_enabled():
        raise ModelError("inference mode has no gradients to compare; call this outside torch.inference_mode()")
    if isinstance(vae, VAE):
        rows = rows.like(vae)
        arguments = rows.arguments(n)
        parameters = [_trainable(part) for part in (vae.model, vae.guide)]
    else:
        arguments = (rows.x,) if size is None else (rows.x, size)
        parameters = _captured(vae, arguments)
    generative, inference = parameters
    unshared = {name: p for name, p in inference.items() if all(p is not other for other in generative.values())}
    every = {**generative, **{f"guide.{name}" if name in generative else name: p for name, p in unshared.items()}}
    return Subject(vae.model, vae.guide, rows, n, arguments, every, len(generative))


def _validate_no_subsampling(model_trace: Trace, rows: int) -> None:
    for name, site in samples(model_trace):
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.size < (frame.full_size or frame.size) == rows:
                raise ModelError(
                    f"site {name} is in a plate that subsamples {frame.size} of the {rows} rows, so a draw does not "
                    "cover every row; pass a batch as x, with size="
                )


def _trainable(part: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}


def _captured(pair: Pair, arguments: tuple[Any, ...]) -> list[dict[str, Tensor]]:
    """Collect the trainable leaves of the parameters of a model and a guide, by Pyro's names."""
    with torch.random.fork_rng(), torch.no_grad():
        guide_trace = poutine.trace(pair.guide).get_trace(*arguments)
        model_trace = replayed(pair.model, guide_trace, *arguments)
    _validate_no_subsampling(model_trace, len(arguments[0]))
    store = pyro.get_param_store()
    names = ([n for n, site in t.nodes.items() if site["type"] == "param"] for t in (model_trace, guide_trace))
    found = ({name.replace("$$$", "."): store[name].unconstrained() for name in sites} for sites in names)
    return [{name: leaf for name, leaf in part.items() if leaf.requires_grad} for part in found]
