"""Record the iterates of SVI as chains: the ELBO and its parts after each epoch, and means of the weights."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import make_generator, seeded, validate_seed
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import above_zero, takes_settings, whole
from pyro_vae.data.rows import rows_for
from pyro_vae.elbo.log_weights import weigh
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.train.callbacks.base import Callback, Run, Tree

BLOCKS = 16
"""The largest number of stored means of weights; with more epochs, each is a mean over several."""

INVARIANT = ("elbo", "log_likelihood", "kl")
"""Quantities that are invariant to rotations of the latents, so that runs with different seeds can be compared."""


@dataclass
class _Block:
    """The mean weights over consecutive epochs."""

    first: int
    count: int
    mean: list[Tensor]

    def merge(self, other: "_Block") -> "_Block":
        share = other.count / (self.count + other.count)
        mean = [torch.lerp(a, b, share) for a, b in zip(self.mean, other.mean, strict=True)]
        return _Block(self.first, self.count + other.count, mean)


class Iterates(Callback):
    """Records the iterates during training; one of the ``callbacks`` of :func:`pyro_vae.fit`.

    After each epoch it evaluates the VAE on the same data with the same random numbers, so that only the weights
    change. It records the ELBO, the expected log-likelihood and the KL (which are invariant to rotations of the
    latents), and, for this run alone, the means of q for some data and a few weights. A resumed training continues the
    record; at most 16 means of weights are stored. At the end of training it also stores the history, with the
    validation ELBO for :func:`converged`: list it after callbacks that choose the weights, such as EarlyStopping.

    Args:
        x: data to evaluate on: a tensor, an array or :class:`~pyro_vae.data.Data`; at most ``data`` rows are used.
        data: the number of rows, chosen at random.
        num_particles: the number of draws of z for each row, at least 1.
        weights: the number of weights to record, chosen at random.
        seed: of rows, weights and draws of z. Runs to be compared need the same seed.

    Raises:
        SettingsError: if a setting is out of its range.

    References:
        | Robust, Accurate Stochastic Optimization for Variational Inference (Dhaka et al., 2020),
          https://arxiv.org/abs/2009.00666

    Example:
        >>> import pyro_vae as pv
        >>> x = torch.ones(8, 5)
        >>> vae, iterates = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae(), Iterates(x)
        >>> _ = pv.fit(vae, x, epochs=3, callbacks=[iterates], progress=False)
        >>> dict(iterates.history().sizes)
        {'epoch': 3, 'quantity': 3, 'own': 47}
    """

    @takes_settings
    def __init__(self, x: Any, *, data: int = 256, num_particles: int = 16, weights: int = 100, seed: int = 0) -> None:
        for name, value in {"data": data, "num_particles": num_particles, "weights": weights}.items():
            whole(name, value, 1)
        validate_seed(seed)
        self.x, self.seed = x, seed
        self.sizes = {"data": data, "num_particles": num_particles, "weights": weights}
        self._vae: VAE | None = None
        self._forget()

    def _forget(self) -> None:
        self.epochs: list[int] = []
        self._values: list[list[float]] = []
        self._own: list[Tensor] = []
        self._blocks: list[_Block] = []
        self.fitted: xr.Dataset | None = None

    def __repr__(self) -> str:
        return f"Iterates(epochs={len(self.epochs)})"

    def start(self, run: Run) -> None:
        """Discard the record of an earlier training, and choose rows and weights."""
        if not isinstance(run.vae, VAE):
            raise ModelError("Iterates needs a VAE, since it records the mean of q(z|x), which a Pair does not define")
        self.begin(run.vae)

    def epoch(self, run: Run) -> None:
        """Record the VAE after an epoch."""
        self.look(len(run.epochs))

    def end(self, run: Run) -> None:
        """Store the history of the training."""
        self.fitted = run.history()

    def state(self) -> Tree:
        blocks = [[block.first, block.count, block.mean] for block in self._blocks]
        return {"epochs": self.epochs, "values": self._values, "own": self._own, "blocks": blocks}

    def load(self, state: Tree) -> None:
        self.epochs, self._values, self._own = list(state["epochs"]), list(state["values"]), list(state["own"])
        self._blocks = [_Block(first, count, self._to_device(mean)) for first, count, mean in state["blocks"]]

    def _to_device(self, weights: list[Tensor]) -> list[Tensor]:
        """Move weights from a checkpoint to the devices of the VAE's weights."""
        assert self._vae is not None
        return [mean.to(p.device) for mean, p in zip(weights, _trainable(self._vae).values(), strict=True)]

    @torch.no_grad()
    def look(self, epoch: int) -> None:
        """Record the VAE after an epoch."""
        assert self._vae is not None
        vae = self._vae
        at_once = self.sizes["num_particles"] * len(self._rows)
        with seeded(self.seed, self._rows.x.device), evaluating(vae, at_once):
            w = weigh(vae.model, vae.guide, *self._rows.arguments(), num_particles=self.sizes["num_particles"])
            few = self._rows.take(slice(0, 8))
            means = vae.posterior(few).mean
        elbo, likelihood = w.log.double().mean().item(), w.likelihood.double().mean().item()
        weights = [p.detach().clone() for p in _trainable(vae).values()]
        flat = torch.cat([p.flatten() for p in weights])
        self._values.append([elbo, likelihood, likelihood - elbo])
        self._own.append(torch.cat([means.flatten(), flat[self._index]]).double().cpu())
        self.epochs.append(epoch)
        self._blocks.append(_Block(len(self.epochs) - 1, 1, weights))
        if len(self._blocks) > BLOCKS:
            self._halve()

    def begin(self, vae: VAE) -> None:
        """Choose the rows and weights of a VAE to record, and discard the record of another VAE."""
        self._forget()
        rows = rows_for(vae, self.x).like(vae)
        generator = make_generator(self.seed)
        self._rows: Rows = rows.take(torch.randperm(len(rows), generator=generator)[: self.sizes["data"]])
        total = sum(p.numel() for p in _trainable(vae).values())
        index = torch.randperm(total, generator=generator)[: self.sizes["weights"]]
        self._index, self._vae = index.sort().values.to(rows.x.device), vae

    def _validate_recorded(self) -> None:
        if not self.epochs:
            raise DataError("these Iterates have recorded no epoch; pass them to fit, as callbacks=[iterates]")

    def _halve(self) -> None:
        """Merge pairs of blocks of equal length, except for an incomplete last one, so that memory is bounded."""
        size = self._blocks[0].count
        while len(self._blocks) > BLOCKS:
            merged: list[_Block] = []
            for block in self._blocks:
                if merged and merged[-1].count + block.count <= size:
                    merged[-1] = merged[-1].merge(block)
                else:
                    merged.append(block)
            self._blocks, size = merged, 2 * size

    def history(self) -> xr.Dataset:
        """Return the record: ``value`` over ``epoch, quantity``, and ``own_value`` over ``epoch, own``."""
        self._validate_recorded()
        own = torch.stack(self._own).numpy()
        kind = np.where(np.arange(own.shape[1]) < own.shape[1] - len(self._index), "mean of q", "weight")
        return xr.Dataset(
            {
                "value": (("epoch", "quantity"), np.array(self._values), {"units": "nats per datum"}),
                "own_value": (("epoch", "own"), own),
            },
            {"epoch": self.epochs, "quantity": list(INVARIANT), "kind": ("own", kind)},
            {"seed": self.seed, **self.sizes},
        )

    @takes_settings
    def average(self, tail: float = 0.5) -> VAE:
        """Copy the VAE with the mean of the last iterates as weights, which has less noise than the last iterate.

        If the iterates still drift, the mean lags behind, so check :func:`converged` first. Buffers, such as the
        running means of batch normalization, are copied unchanged.

        Args:
            tail: the share of the epochs to average over, above 0 and at most 1.

        Raises:
            DataError: if no epoch was recorded.
            SettingsError: if ``tail`` is out of its range.

        Example:
            >>> import pyro_vae as pv
            >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
            >>> iterates = Iterates(torch.ones(8, 5))
            >>> iterates.begin(vae)
            >>> for epoch in (1, 2):
            ...     with torch.no_grad():
            ...         _ = vae.decoder.net.bias.fill_(epoch)
            ...     iterates.look(epoch)
            >>> iterates.average(1.0).decoder.net.bias[0].item()
            1.5
        """
        self._validate_recorded()
        assert self._vae is not None
        start = len(self.epochs) - tail_length(tail, len(self.epochs))
        chosen = [b for b in self._blocks if b.first >= start] or self._blocks[-1:]
        whole_tail = chosen[0]
        for block in chosen[1:]:
            whole_tail = whole_tail.merge(block)
        vae = copy.deepcopy(self._vae)
        with torch.no_grad():
            for parameter, mean in zip(_trainable(vae).values(), whole_tail.mean, strict=True):
                parameter.copy_(mean)
        return vae


def _trainable(vae: VAE) -> dict[str, Tensor]:
    return {name: p for name, p in vae.named_parameters() if p.requires_grad}


def tail_length(tail: float, epochs: int) -> int:
    """Return the number of iterates at the end of a run to judge."""
    if above_zero("tail", tail) > 1:
        raise SettingsError(f"tail is {tail}; the share of the epochs to judge is at most 1")
    return max(1, round(tail * epochs))
