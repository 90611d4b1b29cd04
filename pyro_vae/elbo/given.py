"""Conversion of a user's ``elbo`` argument to an estimator."""

import inspect
from typing import Any

from pyro.infer import ELBO

from pyro_vae import elbo as estimators
from pyro_vae.core.traces import Loss
from pyro_vae.errors import SettingsError, did_you_mean


def as_estimator(given: Any, name: str = "elbo") -> Loss:
    """Return an estimator; instantiate it with its defaults if given a class.

    Args:
        given: an estimator, an estimator class, or a function of (model, guide, ...).
        name: the name of the argument, for messages.

    Raises:
        SettingsError: if ``given`` is none of these, or a class whose settings have no defaults.

    Example:
        >>> import pyro_vae as pv
        >>> as_estimator(pv.elbo.IWAE), as_estimator(pv.elbo.IWAE(8))
        (IWAE(1), IWAE(8))
    """
    if isinstance(given, type) and issubclass(given, ELBO):
        try:
            estimator: ELBO = given()
        except TypeError as error:
            raise SettingsError(f"{name} is a class that needs settings ({error}); pass an instance") from error
        return estimator
    if callable(given) and not isinstance(given, type):
        return given
    names = [member for member in estimators.__all__ if _is_estimator_class(getattr(estimators, member))]
    match = did_you_mean(given, names) if isinstance(given, str) else ""
    hint = f"did you mean {name}=pyro_vae.elbo.{match}()?" if match else f"pass, e.g., {name}=pyro_vae.elbo.ELBO();"
    raise SettingsError(f"{name} is {given!r}; {hint} pyro_vae.elbo has {', '.join(names)}")


def _is_estimator_class(member: Any) -> bool:
    """Whether a member of the package is a concrete class of estimators."""
    return isinstance(member, type) and issubclass(member, ELBO) and not inspect.isabstract(member)
