"""Try the loss before the first step, and look after the last for clamped numbers and narrow likelihoods."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import pyro
import torch
from pyro.infer import ELBO

from pyro_vae.core.compatibility import in_a_line
from pyro_vae.core.component import at_least_single, evaluating, join
from pyro_vae.core.pair import Amortised
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import Loss, loss_name
from pyro_vae.core.vae import VAE
from pyro_vae.data.spread import moments
from pyro_vae.data.tables import list_names
from pyro_vae.errors import ModelError, PyroVAEError, SettingsError, UnboundedDensityWarning
from pyro_vae.likelihoods import Likelihood

LARGEST = 128
"""The default batch size is at most this."""

LOOKED_AT = 256
"""At most this many rows are decoded to look for clamped numbers, and for narrow likelihoods."""

NARROW = 1e-3
"""A likelihood is narrow below this share of its column's sd."""


def default_batch_size(n: int) -> int:
    """128, or all of n rows where there are fewer; slightly less where a last batch of one row would be left.

    Example:
        >>> [default_batch_size(n) for n in (20, 128, 129, 1000)]
        [20, 128, 127, 128]
    """
    return _without_single_rows(n, min(LARGEST, n)) or n


def refuse_batches(vae: Amortised, loss: Loss, rows: Rows, *, batch_size: int, size: int) -> None:
    """Refuse a batch size or parts with which a step of training would fail.

    The loss is computed on two rows, with the parts in the mode in which they are trained, and on one row where
    a batch has only one. Buffers and random numbers are as before afterwards.

    Args:
        vae: to be trained.
        loss: an ELBO; other functions are not tried, since they may count their calls.
        rows: at least the first two data, as the VAE takes them.
        batch_size: data per step.
        size: the number of training data.

    Raises:
        SettingsError: if a batch of one row fails, naming batch sizes without one.
        ModelError: if a batch of two rows fails.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> refuse_batches(vae, pv.elbo.InfoVAE(pv.elbo.ELBO()), Rows(torch.zeros(2, 4)), batch_size=4, size=9)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: batch_size is 4: of 9 rows it leaves a last batch of one row, ...
    """
    if not isinstance(loss, ELBO):
        return
    if batch_size > 1 and (error := _failure(vae, loss, rows.take(slice(2)), size)):
        if isinstance(error, PyroVAEError):
            raise error
        raise ModelError(
            f"{loss_name(loss)} cannot be computed on a batch of 2 rows in training mode ({in_a_line(error)}); "
            "make the parts take tensors of shape (*batch, features)"
        ) from error
    single = batch_size == 1 or size % batch_size == 1
    if single and (error := _failure(vae, loss, rows.take(slice(1)), size)):
        reason = str(error) if isinstance(error, PyroVAEError) else in_a_line(error)
        raise SettingsError(_sentence(batch_size, size, reason)) from error


@torch.no_grad()
def warn_of_limits(vae: Amortised, rows: Rows) -> None:
    """Warn if the decoder's numbers for these rows lie beyond a limit at which its likelihood clamps them.

    Args:
        vae: after training.
        rows: data, as the VAE takes them.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> warn_of_limits(vae, Rows(torch.zeros(2, 4)))  # a Normal clamps nothing
    """
    decoder, rows = getattr(vae, "decoder", None), rows.take(slice(LOOKED_AT))
    if not isinstance(vae, VAE) or not isinstance(decoder, Likelihood) or type(decoder).beyond is Likelihood.beyond:
        return
    with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), evaluating(vae):
        z = vae.posterior(rows).sample()
        found = decoder.beyond(at_least_single(decoder.net(join(z, rows.context))))
    for limit, over in found.items():
        if number := int(over.flatten(1).any(1).sum()):
            warnings.warn(
                f"{type(decoder).__name__}: for {number} of {len(rows)} training rows the network gives {limit}, where "
                "they are clamped and no gradient flows; scale the data down, or train at a lower learning rate",
                stacklevel=3,
            )


@torch.no_grad()
def warn_of_narrow_likelihoods(vae: Amortised, rows: Rows, columns: Sequence[str] | None = None) -> None:
    """Warn if the likelihood of a column has become far narrower than the column itself.

    Where a scale is learned and the column is one value, or the network knows its values exactly, the density has no
    upper bound, and an ELBO that rises for that reason tells nothing about the model.

    Args:
        vae: after training.
        rows: data, as the VAE takes them.
        columns: their names.

    Warns:
        UnboundedDensityWarning: naming the columns.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> warn_of_narrow_likelihoods(vae, Rows(torch.randn(20, 4)))  # its scale is 0.5 in each column
    """
    decoder, rows = getattr(vae, "decoder", None), rows.take(slice(LOOKED_AT))
    if not isinstance(vae, VAE) or not isinstance(decoder, Likelihood) or rows.x.dim() != 2:
        return
    real = decoder.real_columns(rows.x.shape[1:]).to(rows.x.device)
    if not bool(real.any()):
        return
    with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), evaluating(vae, len(rows)):
        try:
            widths = vae.likelihood(vae.posterior(rows).sample(), Rows(rows.x, rows.context)).variance.sqrt()
        except (AttributeError, NotImplementedError):  # of the user's own, which may know no variance
            return
    center, sd = moments(rows)
    given = center.abs().clamp(min=1.0) if decoder.standardize is None else decoder.standardize.unit
    narrow = real & (widths.amin(0) < NARROW * sd.where(sd > 0, given.double()))
    if places := narrow.nonzero().flatten().tolist():
        names = list_names([columns[i] for i in places]) if columns is not None else ", ".join(map(str, places))
        warnings.warn(
            f"the likelihood of {len(places)} of {narrow.numel()} columns ({names}) is less than {NARROW:g} times as "
            "wide as the column: its density has no upper bound, and an ELBO that rises so is no progress; "
            "drop the columns, or bound their scale (min_scale of HeteroscedasticNormal, a scale that is not learned)",
            UnboundedDensityWarning,
            stacklevel=3,
        )


def _sentence(batch_size: int, n: int, reason: str) -> str:
    """What is wrong with batches of one row, and which sizes avoid them."""
    if n == 1:
        return f"the data are one row, which cannot be trained on ({reason}); give at least two"
    what = "every batch has one row" if batch_size == 1 else f"of {n} rows it leaves a last batch of one row"
    below, above = _without_single_rows(n, batch_size), next(b for b in range(batch_size + 1, n + 1) if n % b != 1)
    sizes = " or ".join(str(b) for b in (below, above) if b)
    return f"batch_size is {batch_size}: {what}, which cannot be trained on ({reason}); pass batch_size={sizes}"


def _without_single_rows(n: int, most: int) -> int | None:
    """The largest batch size of at most ``most``, and at least 2, with which no batch of n rows has one row."""
    return next((b for b in range(most, 1, -1) if n % b != 1), None)


def _failure(vae: Amortised, loss: ELBO, rows: Rows, size: int) -> Exception | None:
    """What computing the loss raises, if anything."""
    try:
        with _unchanged(vae, rows), torch.no_grad():
            loss.loss(vae.model, vae.guide, *rows.arguments(size))
    except Exception as error:  # the parts may be the user's own, and raise anything
        return error
    return None


@contextlib.contextmanager
def _unchanged(vae: Amortised, rows: Rows) -> Iterator[None]:
    """Inside, compute as training does; put back buffers and random numbers behind it."""
    before = [(buffer, buffer.detach().clone()) for buffer in vae.buffers()]
    devices = [rows.x.device] if rows.x.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training warns of the same
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if buffer.layout is not torch.strided or not torch.equal(buffer, value):
                    buffer.copy_(value)
