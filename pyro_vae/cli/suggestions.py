"""Suggest the flag, command or class that was probably meant by a mistake on the command line."""

import inspect
import re
import sys
from collections.abc import Collection

from pyro_vae.errors import did_you_mean

MEMBERS = {
    "prior": ("pyro_vae.priors", "pyro_vae.priors", "Prior"),
    "likelihood": ("pyro_vae.likelihoods", "pyro_vae.likelihoods", "Likelihood"),
    "posterior": ("pyro_vae.posteriors", "pyro_vae.posteriors", "Posterior"),
    "elbo": ("pyro_vae.elbo", "pyro.infer", "ELBO"),
    "callback": ("pyro_vae.train.callbacks", "pyro_vae.train.callbacks", "Callback"),
    "optimizer": ("torch.optim", "torch.optim", "Optimizer"),
    "scheduler": ("torch.optim.lr_scheduler", "torch.optim.lr_scheduler", "LRScheduler"),
}
"""For each setting that names a class: the module of the classes, and the module and name of their base class."""

ELSEWHERE = {
    "lr": "optimizer.lr", "learning_rate": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
    "num_epochs": "epochs", "num_particles": "elbo.num_particles", "loss": "elbo", "output": "out",
}  # fmt: skip
"""Names that other programs use for these settings."""


def suggestion(message: str, options: Collection[str]) -> str:
    """Return a suggestion to append to an error message: the flag that was meant, or the available classes.

    Args:
        message: from :func:`pyro_vae.cli.messages.plain`.
        options: the flags of the command, without their dashes.

    Example:
        >>> suggestion("unrecognized arguments: --epoch 3", ["epochs", "elbo"])
        '; did you mean --epochs?'
        >>> suggestion("hidden: expected list, got 64", [])
        '; write --hidden [64]'
    """
    if flag := re.search(r"nrecognized arguments: --([\w.]+)", message):
        meant = ELSEWHERE.get(flag[1]) or did_you_mean(flag[1], options)
        return f"; did you mean --{meant}?" if meant else ""
    if choice := re.search(r"invalid choice: '(\w+)'", message):
        meant = "fit" if choice[1] == "train" else did_you_mean(choice[1], options)
        return f"; did you mean pyro-vae {meant}?" if meant else ""
    if literal := re.search(r"(\w+): Expected a typing\.Literal\[(.*?)\], got (\w+)", message):
        meant = did_you_mean(literal[3], re.findall(r"\w+", literal[2]))
        return f"; did you mean --{literal[1]} {meant}?" if meant else ""
    if option := re.search(r"(\w+): no class is named that has an option '(\w+)'", message):
        meant = did_you_mean(option[2], _settings_of(option[1]))
        return f"; did you mean --{option[1]}.{meant}?" if meant else ""
    if given := re.search(r"(\w+): expected list, got ([\w.,]+)$", message):
        return f"; write --{given[1]} [{given[2]}]"
    if named := re.search(r"(\w+): there is no class ([\w.]+)", message):
        names = members(named[1].removesuffix("s"))
        if meant := did_you_mean(named[2].rpartition(".")[2], names):
            return f"; did you mean {meant}?"
        return f"; there are {', '.join(names)}" if names else ""
    return ""


def _settings_of(setting: str) -> set[str]:
    """Return the arguments of all classes that a setting may name."""
    home = sys.modules[MEMBERS[setting][0]] if setting in MEMBERS else None
    return {each for name in members(setting) for each in inspect.signature(getattr(home, name)).parameters}


def members(setting: str) -> list[str]:
    """List the classes of this library or of torch that a setting may name."""
    if setting not in MEMBERS:
        return []
    place, home, name = MEMBERS[setting]
    base = getattr(sys.modules[home], name)
    found = {n: v for n, v in vars(sys.modules[place]).items() if isinstance(v, type) and issubclass(v, base)}
    return sorted(n for n, v in found.items() if v is not base and not inspect.isabstract(v) and n[0] != "_")
