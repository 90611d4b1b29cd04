"""State of optimizers, schedules and generators as trees of tensors, numbers and strings, and back in place."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Tree = Any
"""Dicts with string keys, lists, tensors, numbers, strings and None, nested."""

PAIRS = "(key, value)"
"""The only key of a dict whose keys were no strings."""


def as_tree(value: Any) -> Tree:
    """A state as a tree; an object of another kind stays as it is, and is refused when it is to be written.

    Args:
        value: as ``state_dict()`` gives it.

    Example:
        >>> as_tree({"milestones": {30: 1}, "betas": (0.9, 0.999)})
        {'milestones': {'(key, value)': [[30, 1]]}, 'betas': [0.9, 0.999]}
    """
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: as_tree(item) for key, item in value.items()}
        return {PAIRS: [[key, as_tree(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [as_tree(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.detach()
    return value.item() if isinstance(value, np.generic) else value


def like(saved: Tree, now: Any) -> Any:
    """What :func:`as_tree` made a tree of, with the types of another such state.

    Example:
        >>> like({"(key, value)": [[30, 1]]}, Counter()), like([0.9, 0.999], (0.5, 0.5))
        (Counter({30: 1}), (0.9, 0.999))
    """
    if isinstance(saved, Mapping):
        held = saved[PAIRS] if set(saved) == {PAIRS} else list(saved.items())
        known = now if isinstance(now, Mapping) else {}
        made = {key: like(item, known.get(key)) for key, item in held}
        return Counter(made) if isinstance(now, Counter) else made
    if isinstance(saved, list):
        others = now if isinstance(now, list | tuple) else []
        items = [like(item, others[i] if i < len(others) else None) for i, item in enumerate(saved)]
        return tuple(items) if isinstance(now, tuple) else items
    return saved


def load_optimizer(optimizer: Optimizer, tree: Tree) -> None:
    """Fill an optimizer in place: its groups and tensors stay the objects that they are.

    Raises:
        ValueError, KeyError: if the tree is of another optimizer.
    """
    groups, state = optimizer.param_groups, optimizer.state
    before = {parameter: dict(values) for parameter, values in state.items()}
    optimizer.load_state_dict(like(tree, optimizer.state_dict()))
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        group.update({name: value for name, value in loaded.items() if name != "params"})
    filled = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    for parameter, values in filled.items():
        for name, value in values.items():
            own = before.get(parameter, {}).get(name)
            if isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor) and own.shape == value.shape:
                values[name] = own.copy_(value)
    state.clear()
    state.update(filled)
    optimizer.param_groups, optimizer.state = groups, state


def unsaved(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that ``state_dict()`` leaves out, under each of their names.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> module.register_buffer("seen", torch.zeros(1), persistent=False)
        >>> unsaved(module)
        {'seen': tensor([0.])}
    """
    saved = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers(remove_duplicate=False) if name not in saved}


def random_state(device: torch.device) -> Tree:
    """The states of torch's generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(tree: Tree, device: torch.device) -> None:
    """What :func:`random_state` gave; on another kind of device than then, as far as it goes."""
    torch.set_rng_state(tree["cpu"])
    if device.type == "cuda" and tree["cuda"] is not None:
        torch.cuda.set_rng_state(tree["cuda"], device)
