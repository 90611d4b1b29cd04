"""Validate the settings of a run folder before any class that they name is imported, so that no code of it runs."""

import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pyro.infer import ELBO
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.core.compatibility import in_a_line
from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks import Callback
from pyro_vae.train.checkpoint.rebuild import FUNCTIONS, is_under, part_called

PACKAGES = "pyro_vae", "torch.nn", "torch.optim", "zuko", "pyro.infer"
"""Packages whose classes the settings of a run folder may name."""

KINDS = nn.Module, ELBO, Optimizer, LRScheduler, Callback
"""The kinds of these classes; priors, likelihoods and posteriors are modules."""

PLAIN = str, int, float, bool, Path, NoneType, Ellipsis
"""Types of settings that never import a class."""

NEVER_SAVED = "config", "trust", "cluster"
"""Settings that are never written to a run folder: a cluster is an address that this library connects to."""


@dataclass(frozen=True)
class Trust:
    """The classes that the settings of a run folder may name: those of this library, torch, zuko and trusted packages.

    Args:
        config: the file of the settings, in the run folder.
        trusted: the user's own packages, and folders outside the run folder that callbacks may write to, e.g.
            ``["mypackage", "logs"]``.
        advice: how to trust a package or a folder; its name is appended.
    """

    config: Path
    trusted: Sequence[str] = ()
    advice: str = "add --trust"

    def validate(self, settings: Any, hints: Mapping[str, Any]) -> None:
        """Validate settings.

        Args:
            settings: as read from YAML.
            hints: the type of each setting.

        Raises:
            SettingsError: if a setting names another class, or a folder that is not trusted.

        Example:
            >>> Trust(Path("run/config.yaml")).validate({"prior": {"class_path": "os.system"}}, {})
            Traceback (most recent call last):
            pyro_vae.errors.SettingsError: run/config.yaml: the setting prior names os.system, which is not a class ...
        """
        if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
            raise SettingsError(f"{self.config}: not a table of settings, as a run writes it; copy the run again")
        if odd := next(
            (
                name
                for name in settings
                if (name in NEVER_SAVED and settings[name] is not None) or not name.isidentifier()
            ),
            None,
        ):
            raise SettingsError(f"{self.config}: {odd!r} is not a setting of a run; delete its line")
        self._validate_arguments(settings, hints, "", writes=False)

    def _validate_arguments(self, given: Any, hints: Mapping[str, Any], where: str, *, writes: bool) -> None:
        if not isinstance(given, dict):
            raise SettingsError(f"{self.config}: the setting {where} has no table of arguments; copy the run again")
        for name, value in given.items():
            place, hint = f"{where}.{name}".lstrip("."), hints.get(name)
            if writes and Path in _parts(hint) and isinstance(value, str):
                self._validate_destination(value, place)
            if not _is_plain(hint):
                self._validate_value(value, place)

    def _validate_value(self, value: Any, where: str) -> None:
        if isinstance(value, str):
            self._validate_name(value, where)
        elif isinstance(value, list):
            for item in value:
                self._validate_value(item, where)
        elif isinstance(value, dict) and "class_path" in value:
            self._validate_class(value, where)
        elif isinstance(value, dict):
            self._validate_arguments(value, {}, where, writes=False)

    def _validate_class(self, described: dict[str, Any], where: str) -> None:
        path = described["class_path"]
        if not isinstance(path, str) or {*described} - {"class_path", "init_args", "dict_kwargs"}:
            raise SettingsError(f"{self.config}: the setting {where} describes no class; copy the run again")
        if (cls := self._validate_name(path, where)) is None:  # a short name could be that of any class
            raise SettingsError(
                f"{self.config}: the setting {where} names {path}, not a class with its module, as a run writes it; "
                "copy the run again"
            )
        is_callback = isinstance(cls, type) and issubclass(cls, Callback)
        for key in ("init_args", "dict_kwargs"):
            self._validate_arguments(described.get(key, {}), _hints_of(cls), where, writes=is_callback)

    def _validate_name(self, path: str, where: str) -> Any:
        """Validate that a string names a known class or function; numbers and words without a point import nothing."""
        if path in FUNCTIONS or path.isidentifier() or _is_number(path):
            return FUNCTIONS.get(path)
        if is_under(path, tuple(self.trusted)):
            self._validate_place(path)
            return self._own_part(path, where)
        module, _, name = path.rpartition(".")
        found = part_called(module, name) if is_under(module, PACKAGES) else None
        if not (isinstance(found, type) and issubclass(found, KINDS) and is_under(found.__module__, PACKAGES)):
            raise SettingsError(
                f"{self.config}: the setting {where} names {path}, which is not a class of pyro_vae, torch or zuko for "
                f"VAEs or training; if it is your own and you trust it, {self.advice} {path.split('.')[0]}"
            )
        return found

    def _own_part(self, path: str, where: str) -> Any:
        """Import a class or function of a trusted package; what the package itself imports is not part of it."""
        try:
            found = pkgutil.resolve_name(path)
        except Exception as error:  # a user's package may raise anything
            raise SettingsError(
                f"{self.config}: the setting {where} names {path}, which cannot be imported ({in_a_line(error)}); "
                "install the package, or correct the setting"
            ) from error
        if not (
            (inspect.isfunction(found) or isinstance(found, type)) and is_under(found.__module__, tuple(self.trusted))
        ):
            raise SettingsError(
                f"{self.config}: the setting {where} names {path}, which is no class or function that a trusted "
                "package itself defines; name it by the module that defines it, or correct the setting"
            )
        return found

    def _validate_place(self, path: str) -> None:
        """Validate that no package on the way to a trusted class lies in the run folder; none is imported for it."""
        places: list[str] | None = None
        here, parts = self.config.parent.resolve(), path.split(".")
        for name in parts[:-1]:
            spec = PathFinder.find_spec(name, places)
            if spec is None:  # a class, or a built-in module
                return
            places = [str(place) for place in spec.submodule_search_locations or ()]
            for place in [*places, *([spec.origin] if spec.has_location and spec.origin else [])]:
                if Path(place).resolve().is_relative_to(here):
                    raise SettingsError(
                        f"{self.config}: {path} is code inside the run folder, which is never run; move it elsewhere"
                    )
            if not places:
                return

    def _validate_destination(self, path: str, where: str) -> None:
        to = Path(path).resolve()
        if not any(to.is_relative_to(folder.resolve()) for folder in (self.config.parent, *map(Path, self.trusted))):
            raise SettingsError(
                f"{self.config}: the setting {where} writes to {path}, outside the run folder; to allow this, "
                f"{self.advice} {path}"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parts(hint: Any) -> list[Any]:
    """List the types that a compound type consists of."""
    origin = get_origin(hint)
    if origin is Literal:
        return [str]
    if origin in (list, tuple, Union, UnionType, Sequence):
        return [part for inner in get_args(hint) for part in _parts(inner)]
    return [hint]


def _is_plain(hint: Any) -> bool:
    return hint is not None and all(part in PLAIN for part in _parts(hint))


def _hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of the arguments of a class, as far as they are annotated."""
    if not isinstance(cls, type):
        return {}
    try:
        return get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # the annotations of a user's class may raise anything
        return {}
