"""Save a VAE to one file and load it; damaged files are rejected, and no code in a file is ever run."""

import inspect
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.nn import Parameter

from pyro_vae import __about__
from pyro_vae.core.pair import Amortized
from pyro_vae.core.vae import VAE
from pyro_vae.data.fingerprint import Trained
from pyro_vae.errors import DataError, SettingsError, UnfinishedRunWarning, WeightsOnlyWarning, type_of
from pyro_vae.train.checkpoint.describe import describe_vae
from pyro_vae.train.checkpoint.rebuild import is_under, make_vae, named_tensors
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.checkpoint.tensor_file import Tree, read_tree, write_tree

VAE_KEY, WEIGHTS_KEY = "vae", "weights"
"""The keys of the description and the weights in a checkpoint; a saved VAE has its weights at the top level."""

WEIGHTS_FILE = "weights.safetensors"
"""The file of the final weights in a run folder."""


def save(vae: Amortized, path: str | Path) -> None:
    """Save a VAE to one safetensors file: weights, architecture and hashes of the training data.

    The file has a checksum and is written atomically. It describes the VAE by the classes of its components and
    their constructor arguments: plain values, tensors, classes, partials and modules. Your own classes are stored by
    name, and :func:`load` uses them only if you pass them. The weights have the names of ``vae.state_dict()``, so that
    other programs can read them.

    Args:
        vae: any VAE; if a component has no description, only the weights are saved, and a
            :class:`~pyro_vae.errors.WeightsOnlyWarning` names the component.
        path: the file; an existing file is replaced.

    Raises:
        OutputError: if the file cannot be written; an existing file is kept.

    References:
        | safetensors (Hugging Face), https://github.com/huggingface/safetensors

    Example:
        >>> import tempfile, torch, pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StudentT(2, df=12.0),
        ...     decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 5)),
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 4)),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(vae, Path(folder, "vae.safetensors"))
        ...     load(Path(folder, "vae.safetensors")).prior
        StudentT(latent_dim=2, df=12)
    """
    if why := write_vae(vae, path):
        warnings.warn(f"{path}: {why}", WeightsOnlyWarning, stacklevel=2)


def write_vae(vae: Amortized, path: str | Path, step: int | None = None) -> str:
    """Save a VAE as :func:`save` does, with the last step of its run; return why only the weights were saved."""
    described, why = describe_vae(vae)
    known = vae.trained_on.as_text() if vae.trained_on else None
    about = {"kind": "VAE", "versions": __about__.versions(), "trained_on": known, "step": step}
    write_tree(path, {**vae.state_dict(), VAE_KEY: described}, about)
    return f"contains only the weights, as {why}; load them with into=, a VAE built like this one" if why else ""


def load(path: str | Path, *, into: VAE | None = None, classes: Iterable[Any] = ()) -> VAE:
    """Load a VAE that :func:`save` or a run wrote; no code in a file is ever run.

    A file may only name classes of this library, of ``torch.nn`` and of zuko, and the ones in ``classes``.

    Args:
        path: a file, or a run folder: its ``weights.safetensors``, or its newest intact checkpoint if the run has not
            ended. If the run was resumed after its end and has not ended again, the weights are those of its last end,
            and a :class:`~pyro_vae.errors.UnfinishedRunWarning` names the file of the newer weights.
        into: a VAE of the same architecture to fill with the weights; if it does not match, it is not changed.
        classes: your own classes that the VAE contains, and functions that its partials call.

    Returns:
        The VAE, on the CPU in the saved precision; ``into``, if given.

    Raises:
        DataError: if the file is damaged, has a newer format, another architecture, unknown classes or no description;
            or if a weight is not finite.
        SettingsError: if ``classes`` holds anything but classes and functions.

    Example:
        >>> load("nowhere.safetensors")
        Traceback (most recent call last):
        pyro_vae.errors.DataError: nowhere.safetensors: cannot be read (No such file or directory); ...
    """
    classes = list(classes)
    if wrong := [cls for cls in classes if not (_is_class(cls) or inspect.isfunction(cls))]:
        raise SettingsError(f"classes holds {wrong[0]!r}; it must hold module classes, such as MyPrior, or functions")
    path, described, weights, about = _read(Path(path))
    if warning := _resumed_since(path, about):
        warnings.warn(warning, UnfinishedRunWarning, stacklevel=2)
    trained_on = read_trained_on(about, path)
    if into is not None:
        validate_weights(into, weights, path)
        into.load_state_dict(weights)
        vae = into
    elif described is None:
        raise DataError(f"{path}: contains only weights; pass into=, a VAE built like the saved one")
    else:
        try:
            vae = make_vae(described, weights, classes)
        except DataError as error:
            raise DataError(f"{path}: {error}{_of_version(about)}") from error
        validate_finite(vae, dict(named_tensors(vae)), path)
    vae.trained_on = trained_on
    return vae


OURS = "pyro_vae", "zuko"
"""Packages whose buffers are finite, as torch's running means are; others may hold infinities, such as a mask."""

POSITIVE = "unit", "fixed_scale"
"""Buffers of this library that are above 0."""


def validate_finite(vae: Amortized, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise a DataError that names the first of a VAE's tensors that is not finite, or not above 0 as it must be."""
    for place, module in vae.named_modules(remove_duplicate=False):
        for name, current in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{place}.{name}".lstrip(".")
            if (tensor := tensors.get(full)) is None:
                continue
            is_ours = is_under(type(module).__module__, OURS)
            must_be_finite = isinstance(current, Parameter) or is_ours or name.startswith("running_")
            if tensor.isnan().any() or (must_be_finite and not tensor.isfinite().all()):
                raise DataError(f"{path}: weight {full} is not finite; train again")
            if name in POSITIVE and is_ours and not (tensor > 0).all():
                raise DataError(f"{path}: weight {full} is not above 0; train again")


def read_trained_on(about: dict[str, Any], path: Path) -> Trained | None:
    """Decode the fingerprint of the training data; a DataError names the file."""
    known = about.get("trained_on")
    try:
        return Trained.from_text(known) if known else None
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _is_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module | Distribution | Transform)


def _read(path: Path) -> tuple[Path, Tree, dict[str, Tensor], dict[str, Any]]:
    """Find and read a file; return its path, the description or None, the weights and ``about``."""
    if os.path.isdir(path) and not os.path.exists(path / WEIGHTS_FILE):
        found = Checkpoints(path).newest()
        if found is None:
            raise DataError(f"{path}: contains no {WEIGHTS_FILE} and no checkpoint; pass a run folder or a file")
        _, tree, about, path = found
    else:
        path = path / WEIGHTS_FILE if os.path.isdir(path) else path
        tree, about = read_tree(path)
    for name, kind in {"step": int, "versions": dict}.items():
        if not isinstance(about.get(name), kind | None):
            raise DataError(
                f"{path}: its {name} is {type_of(about[name])}, unlike in a file of pyro-vae; copy it again"
            )
    if isinstance(tree, dict) and about.get("kind") == "VAE":
        return path, tree.pop(VAE_KEY, None), tree, about
    if isinstance(tree, dict) and WEIGHTS_KEY in tree:
        return path, tree.get(VAE_KEY), tree[WEIGHTS_KEY], about
    raise DataError(f"{path}: contains no VAE; pass a file that pv.save or a run wrote")


def _resumed_since(path: Path, about: dict[str, Any]) -> str:
    """Say so if the run of these weights was resumed and has not ended again."""
    step = about.get("step")
    if path.name != WEIGHTS_FILE or step is None:
        return ""
    try:
        files = Checkpoints(path.parent).files()
    except DataError:  # the checkpoints were not requested
        return ""
    if not files or (newest := max(files)) <= step:
        return ""
    return (
        f"{path}: has the weights of step {step}, but the run was resumed, reached step {newest} or later and has not "
        f"ended again; finish it (pyro-vae fit --resume {path.parent}), or load {files[newest]}"
    )


def validate_weights(vae: Amortized, weights: dict[str, Tensor], path: Path) -> None:
    """Raise a DataError that names the first weight that does not match the VAE's architecture, or is not finite."""
    expected = vae.state_dict()
    missing = [f"missing weight {name}" for name in expected if name not in weights]
    unexpected = [f"unexpected weight {name}" for name in weights if name not in expected]
    different = [
        f"weight {name} is {_kind(weights[name])}, not {_kind(value)}"
        for name, value in expected.items()
        if name in weights and _kind(weights[name]) != _kind(value)
    ]
    if wrong := [*missing, *unexpected, *different]:
        raise DataError(f"{path}: the architecture differs ({wrong[0]}); pass a VAE built like the saved one")
    validate_finite(vae, weights, path)


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{' × '.join(map(str, value.shape)) or 'a single'} {str(value.dtype).removeprefix('torch.')}"


def _of_version(about: dict[str, Any]) -> str:
    then = {**about, **about.get("versions", {})}.get("pyro_vae")
    return f" (written by pyro-vae {then}; this is {__about__.__version__})" if then else ""
