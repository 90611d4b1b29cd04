"""``fit`` on several processes: what each is given, and what comes back."""

import dataclasses
import io
import pickle
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from pickletools import genops
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import DivergenceError, SettingsError
from pyro_vae.train.distributed.launch import Machines, launch

if TYPE_CHECKING:
    from pyro_vae.core.vae import VAE
    from pyro_vae.train.fit import Fit

LARGE = 2**20
"""Arrays of at least so many bytes go by a file that all processes map, where each would have a copy of its own."""


def fit_on(machines: Machines, fit: "Callable[..., Fit]", vae: "VAE", data: Any, settings: dict[str, Any]) -> "Fit":
    """Run :func:`pyro_vae.fit` on several processes of this machine.

    Args:
        machines: how many.
        fit: the function that each of them calls.
        vae: gets the weights that they come to.
        data: as ``fit`` takes it.
        settings: the other arguments of ``fit``.

    Raises:
        SettingsError: if an argument cannot be handed to another process.
    """
    with tempfile.TemporaryDirectory(prefix="pyro-vae-") as folder:
        given = _sent({"vae": vae, "data": data, **settings}, folder)
        weights, trained_on, came = launch(machines, partial(fit_here, fit), given, folder=folder)
    with torch.no_grad():
        vae.load_state_dict(weights)
    vae.trained_on = trained_on
    if isinstance(came, DivergenceError):
        raise came
    return dataclasses.replace(came, vae=vae)


def fit_here(fit: "Callable[..., Fit]", given: dict[str, bytes]) -> tuple[dict[str, Tensor], Any, Any]:
    """What each process does: the weights, what they were trained on, and the fit or why there is none."""
    settings = {name: _Receiver(io.BytesIO(one)).load() for name, one in given.items()}
    vae = settings.pop("vae")
    came: Any
    try:
        came = dataclasses.replace(fit(vae, settings.pop("data"), **settings), vae=None)  # type: ignore[arg-type]
    except DivergenceError as error:
        came = error
    return {name: value.detach().cpu() for name, value in vae.state_dict().items()}, vae.trained_on, came


def _sent(given: dict[str, Any], folder: str) -> dict[str, bytes]:
    """Each argument as processes are given it; what they could not make of it is refused here."""
    sent = {}
    for name, value in given.items():
        packed = io.BytesIO()
        try:
            _Sender(packed, folder).dump(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SettingsError(
                f"{name} cannot be handed to another process ({error}); make it of classes and functions of a module, "
                "as functools.partial(torch.optim.Adam, lr=1e-3), or take devices=1"
            ) from error
        sent[name] = packed.getvalue()
        _refuse_notebook(name, sent[name])
    return sent


def _refuse_notebook(name: str, packed: bytes) -> None:
    """Refuse classes that were typed in, which no other process has."""
    if hasattr(sys.modules["__main__"], "__file__"):
        return
    strings = [argument for _, argument, _ in genops(packed) if isinstance(argument, str)]
    for module, own in pairwise(strings):
        if module == "__main__" and hasattr(sys.modules["__main__"], own):
            raise SettingsError(
                f"{name} holds {own}, which was defined in this notebook or console, where another process cannot find "
                "it; put it in a module (a .py file), and import it"
            )


class _Sender(pickle.Pickler):
    """Pickles; large arrays go to files."""

    def __init__(self, file: Any, folder: str) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.folder = folder

    def persistent_id(self, value: Any) -> tuple[str, str, Any] | None:
        if isinstance(value, np.memmap) and value.filename and isinstance(value.base, mmap):
            return "mapped", str(Path(value.filename).resolve()), (value.offset, value.dtype.str, value.shape)
        if isinstance(value, np.ndarray) and value.nbytes >= LARGE and not value.dtype.hasobject:
            return "array", self._file(value), None
        if type(value) is Tensor and value.nbytes >= LARGE and value.device.type == "cpu" and not value.requires_grad:
            bits = value.detach().contiguous().view(torch.uint8) if value.dim() else value
            return "tensor", self._file(bits.numpy()), value.dtype
        return None

    def _file(self, array: np.ndarray) -> str:
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".npy", delete=False) as file:
            np.save(file, array)
        return file.name


class _Receiver(pickle.Unpickler):
    """What :class:`_Sender` sent; a page of a file that a process writes to becomes its own."""

    def persistent_load(self, sent: tuple[str, str, Any]) -> Any:
        kind, path, more = sent
        if kind == "mapped":
            offset, dtype, shape = more
            return np.memmap(path, np.dtype(dtype), "c", offset, shape)
        array = np.load(path, mmap_mode="c")
        return array if kind == "array" else torch.from_numpy(array).view(more)
