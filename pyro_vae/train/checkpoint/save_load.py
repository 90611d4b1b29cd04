"""Save a VAE to one file and load it; a file is whole or refused, and no code in it is ever run."""

import inspect
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_vae import __about__
from pyro_vae.core.pair import Amortised
from pyro_vae.core.vae import VAE
from pyro_vae.data.fingerprint import Trained
from pyro_vae.errors import DataError, SettingsError, UnfinishedRunWarning, WeightsOnlyWarning
from pyro_vae.train.checkpoint.describe import describe_vae
from pyro_vae.train.checkpoint.rebuild import make_vae
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.checkpoint.tensor_file import Tree, read_tree, write_tree

VAE_KEY, WEIGHTS_KEY = "vae", "weights"
"""Where a checkpoint holds the description and the weights; a saved VAE holds its weights by their own names."""

WEIGHTS_FILE = "weights.safetensors"
"""What a finished run folder holds."""


def save(vae: Amortised, path: str | Path) -> None:
    """Save a VAE: its weights, what it is made of and what it was trained on, in one safetensors file.

    The file has a checksum and is written whole or not at all. It describes the VAE by the classes of its
    components and the arguments they were made of: plain values, tensors, classes, partials and modules. A class of
    your own is named, and :func:`load` uses it only if you hand it over. The weights have the names of
    ``vae.state_dict()``, for other programs.

    Args:
        vae: any; a VAE with a part that has no description is saved as weights only, and a
            :class:`~pyro_vae.errors.WeightsOnlyWarning` names the part.
        path: of the file; an existing one is replaced.

    Raises:
        OutputError: if the file cannot be written; an existing one stays.

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


def write_vae(vae: Amortised, path: str | Path, step: int | None = None) -> str:
    """Do what :func:`save` does, for a run that has ended at a step; a sentence, if only the weights were saved."""
    described, why = describe_vae(vae)
    known = vae.trained_on.as_text() if vae.trained_on else None
    about = {"kind": "VAE", "versions": __about__.versions(), "trained_on": known, "step": step}
    write_tree(path, {**vae.state_dict(), VAE_KEY: described}, about)
    return f"holds the weights only, as {why}; load it with into=, a VAE made as this one" if why else ""


def load(path: str | Path, *, into: VAE | None = None, classes: Iterable[Any] = ()) -> VAE:
    """Load a VAE that :func:`save` or a run wrote; no code in a file is ever run.

    A file may only name classes of this library, of ``torch.nn`` and of zuko, and those that you hand over.

    Args:
        path: of the file, or a run folder: its ``weights.safetensors``, or its newest whole checkpoint if the run has
            not ended yet. If the run was resumed since and has not ended again, the weights are those of its last
            end, and a :class:`~pyro_vae.errors.UnfinishedRunWarning` says where the newer ones are.
        into: a VAE of the same architecture to fill with the weights; one that does not fit is left as it is.
        classes: of your own, that the VAE may be made of, and functions that its partials call.

    Returns:
        The VAE, on the CPU in the precision in which it was saved; ``into``, if that was given.

    Raises:
        DataError: if the file is damaged, of a newer format, of another architecture or of unknown classes, or holds
            no description; or if a weight is not a number.
        SettingsError: if ``classes`` holds anything but classes and functions.

    Example:
        >>> load("nowhere.safetensors")
        Traceback (most recent call last):
        pyro_vae.errors.DataError: nowhere.safetensors: cannot be read (No such file or directory); ...
    """
    classes = list(classes)
    if wrong := [cls for cls in classes if not (_is_class(cls) or inspect.isfunction(cls))]:
        raise SettingsError(f"classes holds {wrong[0]!r}; it must hold classes of modules, as [MyPrior], or functions")
    path, described, weights, about = _read(Path(path))
    if told := _gone_on(path, about):
        warnings.warn(told, UnfinishedRunWarning, stacklevel=2)
    if bad := [name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.isnan().any()]:
        raise DataError(f"{path}: the weights in {bad[0]} are not all finite numbers; train again")
    known = about.get("trained_on")
    trained_on = Trained.from_text(known) if known else None
    if into is not None:
        validate_weights(into, weights, path)
        _validate_finite(path, {name: weights[name] for name, _ in into.named_parameters()})
        into.load_state_dict(weights)
        vae = into
    elif described is None:
        raise DataError(f"{path}: holds weights only; load them into a VAE made as that one was, by into=")
    else:
        try:
            vae = make_vae(described, weights, classes)
        except DataError as error:
            raise DataError(f"{path}: {error}{_of_version(about)}") from error
        _validate_finite(path, dict(vae.named_parameters()))
    vae.trained_on = trained_on
    return vae


def _validate_finite(path: Path, weights: dict[str, Tensor]) -> None:
    if bad := next((name for name, weight in weights.items() if not weight.isfinite().all()), None):
        raise DataError(f"{path}: the weights in {bad} are not all finite numbers; train again")


def _is_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module | Distribution | Transform)


def _read(path: Path) -> tuple[Path, Tree, dict[str, Tensor], dict[str, Any]]:
    """Find and read a file: its path, the description or None, the weights and ``about``."""
    if path.is_dir() and not (path / WEIGHTS_FILE).exists():
        found = Checkpoints(path).newest()
        if found is None:
            raise DataError(f"{path}: holds no {WEIGHTS_FILE} and no checkpoint; give the folder of a run, or a file")
        _, tree, about, path = found
    else:
        path = path / WEIGHTS_FILE if path.is_dir() else path
        tree, about = read_tree(path)
    if isinstance(tree, dict) and about.get("kind") == "VAE":
        return path, tree.pop(VAE_KEY, None), tree, about
    if isinstance(tree, dict) and WEIGHTS_KEY in tree:
        return path, tree.get(VAE_KEY), tree[WEIGHTS_KEY], about
    raise DataError(f"{path}: holds no VAE; give a file that pv.save or a run wrote")


def _gone_on(path: Path, about: dict[str, Any]) -> str:
    """Say so, if the run of these weights was resumed and has not ended again."""
    step = about.get("step")
    if path.name != WEIGHTS_FILE or step is None:
        return ""
    try:
        files = Checkpoints(path.parent).files()
    except DataError:  # which are not what was asked for
        return ""
    if not files or (newest := max(files)) <= step:
        return ""
    return (
        f"{path}: is of step {step}, where the run had ended; it has gone on since, to step {newest} at least, and has "
        f"not ended again: end it (pyro-vae fit --resume {path.parent}), or load {files[newest]}"
    )


def validate_weights(vae: Amortised, weights: dict[str, Tensor], path: Path) -> None:
    """Raise a DataError that names the first weight that is not of this VAE's architecture."""
    own = vae.state_dict()
    lacks = [f"{name} is missing" for name in own if name not in weights]
    more = [f"{name} is unexpected" for name in weights if name not in own]
    other = [
        f"{name} is {_kind(weights[name])} and not {_kind(value)}"
        for name, value in own.items()
        if name in weights and _kind(weights[name]) != _kind(value)
    ]
    if wrong := [*lacks, *more, *other]:
        raise DataError(
            f"{path}: the weights are of another architecture ({wrong[0]}); give a VAE made as that one was"
        )


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{' × '.join(map(str, value.shape)) or 'a single'} {str(value.dtype).removeprefix('torch.')}"


def _of_version(about: dict[str, Any]) -> str:
    then = {**about, **about.get("versions", {})}.get("pyro_vae")
    return f" (it was written by pyro-vae {then}, and this is {__about__.__version__})" if then else ""
