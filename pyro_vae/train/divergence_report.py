"""Find where a non-finite loss came from: which datum, which site and which value."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor
from torch.distributions.utils import lazy_property

from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import Loss, differentiable, samples, traces

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortized

DRAWS = 16
"""The most draws of the sites that are inspected: an estimator may have used more than one draw."""
ALONE = 512
"""The most rows that are tried one at a time."""
NOT_REPRODUCED = "it did not recur at the same data and weights with new noise"
"""The answer where nothing was found."""
FAR = 10.0
"""A row is reported as large if its largest value exceeds this multiple of a typical row's."""


def origin(
    vae: "Amortized", loss: Loss, rows: Rows, *, size: int | None = None, numbers: Sequence[int] | None = None
) -> str:
    """Find where a non-finite loss or gradient came from, as a clause of a sentence.

    Inspects the weights first, then, in the order in which they are computed, the parameters of q(z|x), the sample
    and the log-densities, and finally the loss and its gradient, also row by row. The noise continues from torch's
    generators, whose state is restored.

    Args:
        vae: the VAE with the weights before the failed step; it is not changed.
        loss: the minimized loss.
        rows: the batch of that step, on the device of the VAE.
        size: the n of n/m.
        numbers: the row numbers in the data set; by default the positions in the batch.

    Returns:
        The datum, the site and the value, as far as they can be determined.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> x = torch.zeros(3, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1e30))
        >>> origin(linear.as_vae(), pv.elbo.Trace_ELBO(), Rows(x), numbers=[7, 8, 9])
        'log p(z) is -inf for row 8, latent 0 (z is 2.35e+29, loc 0, scale 1); its largest value is 1e+30, ...'
    """
    inspection = _Inspection(vae, loss, rows, len(rows) if size is None else size, numbers)
    if weights := broken_weights(vae):
        return weights
    buffers = [(buffer, buffer.clone()) for buffer in vae.buffers()]
    try:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = inspection.sites() or inspection.step()
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return found or NOT_REPRODUCED


def broken_weights(vae: "Amortized") -> str:
    """Name the first weight that is not finite; return an empty string if there is none.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> broken_weights(vae)
        ''
    """
    places = [(name, weight, ~weight.isfinite()) for name, weight in vae.named_parameters()]
    # A buffer may be infinite on purpose.
    bad = [place for place in [*places, *((n, b, b.isnan()) for n, b in vae.named_buffers())] if place[2].any()]
    if not bad:
        return ""
    name, weight, which = bad[0]
    more = f" and in {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    values = f"{int(which.sum())} of {weight.numel()} values"
    return f"the weights were not finite before this step: {values} in {name}{more}"


@dataclass(frozen=True)
class _Inspection:
    """The inspection of one batch."""

    vae: "Amortized"
    loss: Loss
    rows: Rows
    size: int
    numbers: Sequence[int] | None

    @torch.no_grad()
    def sites(self) -> str:
        """Describe the first site with a non-finite value, over several draws of the noise."""
        x = self.rows.x
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            for _ in range(DRAWS):
                try:
                    model, guide = traces(self.vae.model, self.vae.guide, *self.rows.arguments(self.size))
                except Exception:  # a component may raise anything; the step reports it
                    return ""
                q = [(f"q({name}|x)", site) for name, site in samples(guide)]
                p = [(f"p({name})", site) for name, site in samples(model) if not site["is_observed"]]
                p += [(f"p({name}|z)", site) for name, site in samples(model) if site["is_observed"]]
                for name, site in q + p:
                    if found := self.site(name, site):
                        return found
        return ""

    def site(self, name: str, site: dict[str, Any]) -> str:
        """Describe what is not finite at a site; return an empty string if nothing is."""
        fn, value, kind = site["fn"], site["value"], "feature" if site["is_observed"] else "latent"
        for what, number, bad in _wrong_parameters(fn):
            if bad.any():
                first = bad.nonzero()[0]
                return f"the {what} of {name} is {number[tuple(first)].item() + 0.0:.4g}{self.place(bad, fn, kind)}"
        if not value.isfinite().all():
            bad = ~value.isfinite()
            shown = value[tuple(bad.nonzero()[0])].item()
            return f"the sample of {name} is {shown:.4g}{self.place(bad, fn, kind)}"
        log = _by_feature(fn, value)
        if not (bad := ~log.isfinite()).any():
            return ""
        at = bad.nonzero()[0]
        shown = _format_value(site["name"], fn, value, at)
        return f"log {name} is {log[tuple(at)].item():.4g}{self.place(bad, fn, kind, shown)}"

    def place(self, bad: Tensor, fn: Any, kind: str, shown: str = "") -> str:
        """Name the first bad row and feature, and say what is unusual about them."""
        dim, first = len(fn.batch_shape) - 1, bad.nonzero()[0].tolist()
        if bad.dim() <= dim or bad.shape[dim] != len(self.rows):
            return f", for every row{self.largest_weight()}"
        rows = bad.movedim(dim, 0).flatten(1).any(1)
        if rows.all() and len(rows) > 1:
            return f", for every row{self.largest_weight()}"
        row, *rest = first[dim:]
        which = "" if not rest else f", {kind} {rest[0] if len(rest) == 1 else tuple(rest)}"
        others = f", and for {int(rows.sum()) - 1} more" if rows.sum() > 1 else ""
        return f" for row {self.number(row)}{which}{shown}{others}{self.size_of(row)}"

    def number(self, row: int) -> str:
        """Return the number of a row in the data set, or its position in the batch."""
        return f"{row} of the batch" if self.numbers is None else str(int(self.numbers[row]))

    def size_of(self, row: int) -> str:
        """Say so if a row is far larger than a typical one."""
        largest = self.rows.x.flatten(1).abs().amax(1)
        typical = largest.median().item()
        if largest[row].item() <= FAR * typical:
            return ""
        return f"; its largest value is {largest[row].item():.3g}, that of a typical row {typical:.3g}"

    def largest_weight(self) -> str:
        """Name the largest weight, which shows whether the weights have diverged."""
        name, weight = max(self.vae.named_parameters(), key=lambda named: named[1].abs().max().item())
        return f"; the largest weight is {weight.abs().max().item():.3g}, in {name}"

    def step(self) -> str:
        """Say whether the loss or a gradient is not finite, and which rows cause it."""
        loss, gradients = self.loss_and_gradients(self.rows)
        if not math.isfinite(loss):
            return f"the loss is {loss:.4g}{self.by_rows(lambda rows: self.loss_and_gradients(rows)[0])}"
        broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if not broken:
            return ""
        more = f" (and of {len(broken) - 1} more)" if len(broken) > 1 else ""

        def total(rows: Rows) -> float:
            gradients = self.loss_and_gradients(rows)[1]
            return sum(gradients[name].sum().item() for name in broken)

        by = self.by_rows(total)
        return f"the gradient of {broken[0]}{more} is not finite while the loss is{by}"

    def loss_and_gradients(self, rows: Rows) -> tuple[float, dict[str, Tensor]]:
        """Compute both with noise from the current state of the generators, which is restored."""
        if not callable(getattr(self.loss, "differentiable_loss", None)) and hasattr(self.loss, "loss"):
            return 0.0, {}
        trained = {name: p for name, p in self.vae.named_parameters() if p.requires_grad}
        with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), torch.enable_grad():
            value = differentiable(self.loss)(self.vae.model, self.vae.guide, *rows.arguments(self.size))
            gradients = torch.autograd.grad(value, list(trained.values()), materialize_grads=True)
        return float(value), dict(zip(trained, gradients, strict=True))

    def by_rows(self, number: Callable[[Rows], float]) -> str:
        """Name the rows that make a number non-finite on their own."""
        every = torch.arange(len(self.rows), device=self.rows.x.device)
        parts = every.split(math.isqrt(len(every) - 1) + 1)
        suspects = [row for part in parts if self.fails(number, part) for row in part.tolist()][:ALONE]
        alone = [row for row in suspects if self.fails(number, every[row : row + 1])]
        if not alone or len(alone) == len(every) or len(alone) == ALONE:
            return f", and {'every' if alone else 'no'} row alone reproduces it{self.largest_weight()}"
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        return f", caused by row {self.number(alone[0])}{more}{self.size_of(alone[0])}"

    def fails(self, number: Callable[[Rows], float], index: Tensor) -> bool:
        """Return whether the number is not finite on the given rows."""
        try:
            return not math.isfinite(number(self.rows.take(index)))
        except Exception:  # as above; for example, batch norm rejects a single row
            return False


def _unwrap(fn: Any) -> Any:
    """Return the base distribution, without wrappers that reshape, mask or transform it."""
    while (inner := getattr(fn, "base_dist", None)) is not None:
        fn = inner
    return fn


def _wrong_parameters(fn: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the parameters of a distribution, and where each is not finite or violates its constraint."""
    fn = _unwrap(fn)
    for name, constraint in fn.arg_constraints.items():
        if name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property):
            continue
        value = getattr(fn, name, None)
        if not isinstance(value, Tensor):
            continue
        # A logit of minus infinity is a probability of 0.
        bad = value.isnan() | (value == math.inf) if name == "logits" else ~value.isfinite()
        valid = constraint.check(value)
        outside = ~valid.reshape(valid.shape + (1,) * (value.dim() - valid.dim())).expand(value.shape)
        yield name, value, bad | outside


def _by_feature(fn: Any, value: Tensor) -> Tensor:
    """Compute log-densities per datum and, where features are independent, per feature."""
    base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    log: Tensor = base.log_prob(value)
    return log


def _format_value(name: str, fn: Any, value: Tensor, at: Tensor) -> str:
    """Format the value and the parameters of a log-density."""
    if len(at) != value.dim():
        return ""
    base, index = _unwrap(fn), tuple(at)
    known = {name: vars(base).get(name) for name in base.arg_constraints}
    parts = [f"{n} {p[index].item():.3g}" for n, p in known.items() if isinstance(p, Tensor) and p.shape == value.shape]
    return f" ({', '.join([f'{name} is {value[index].item():.3g}', *parts])})"
