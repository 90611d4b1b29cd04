"""Collect the state of a training run as a tree, and restore it in place."""

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.elbo.nested import counters
from pyro_vae.train.checkpoint.describe import unsaved
from pyro_vae.train.checkpoint.tensor_file import Tree, same_bits

if TYPE_CHECKING:
    from pyro_vae.train.run import Run


def state_of(run: "Run") -> Tree:
    """Collect the state that a run resumes from, without its last good state; tensors are views, not copies."""
    scheduler = run.scheduler
    return {
        "weights": dict(run.vae.state_dict()),
        "buffers": unsaved(run.vae),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "estimator": counters(run.loss),
        "random": run.group.all_gather(random_state(run.device)),
        "progress": {
            "step": run.step, "seen": run.seen, "total": run.total, "seconds": run.seconds,
            "epochs": run.epochs, "stopped": run.stopped, "values": run.values, "best": run.best,
        },
        "engine": run.stepping.state(),
        "callbacks": [[type(callback).__name__, callback.state()] for callback in run.stateful_callbacks],
    }  # fmt: skip


def copied(state: Tree) -> Tree:
    """Copy a state, except the rows of the history, which never change and may be many."""
    epochs = state["progress"]["epochs"]
    return copy.deepcopy(state, {id(epochs): list(epochs)})


def restore(run: "Run", tree: Tree) -> None:
    """Set a run to a state, in place."""
    tree = copied(tree)
    with torch.no_grad():
        run.vae.load_state_dict(_changed(tree["weights"], run.vae.state_dict()), strict=False)
        buffers = unsaved(run.vae)
        for name, value in _changed(tree["buffers"], buffers).items():
            buffers[name].copy_(value)
        load_optimizer(run.optimizer, tree["optimizer"])
        for counter, value in zip(counters(run.loss), tree["estimator"], strict=True):
            counter.copy_(value)
    if run.scheduler is not None and tree["scheduler"] is not None:
        run.scheduler.load_state_dict(tree["scheduler"])
    progress = tree["progress"]
    if len(tree["random"]) == run.ranks:
        set_random_state(tree["random"][run.rank], run.device)
    else:  # saved by another number of processes
        torch.manual_seed(run.group.seed(run.seed, progress["step"]))
    run.step, run.seen = progress["step"], progress["seen"]
    run.total, run.seconds, run.epochs = progress["total"], progress["seconds"], progress["epochs"]
    run.stopped, run.values = progress["stopped"], progress["values"]
    run.best = tuple(best) if (best := progress.get("best")) else None  # a checkpoint turns tuples into lists
    for callback, (_, state) in zip(run.stateful_callbacks, tree["callbacks"], strict=True):
        callback.load(state)
    run.stepping.refresh()


def validate_state(run: "Run", tree: Tree) -> None:
    """Validate the numbers of a state that restoring would take as they are.

    Raises:
        ArithmeticError, AttributeError, KeyError, TypeError, ValueError: if one is not of a state of this run.
    """
    progress = tree["progress"]
    step, seen, best = progress["step"], progress["seen"], progress.get("best")
    _validate(type(step) is int and 0 <= step < 2**62, "step", step)
    _validate(type(seen) is int and 0 <= seen <= len(run.source), "rows seen", seen)
    for name in ("total", "seconds"):
        _validate(math.isfinite(progress[name]), name, progress[name])
    _validate(isinstance(progress["stopped"], str), "stopped", progress["stopped"])
    for row in progress["epochs"]:
        _validate({"objective", "seconds", "step"} <= row.keys(), "row of the history", row)
        _validate(all(isinstance(number, int | float) for number in row.values()), "row of the history", row)
        int(row["step"])
    watched = [*progress["values"].items(), *([("validation", best[1])] if best else [])]
    for name, values in watched:
        _validate(values.shape == (len(run.watched[name].x),), f"ELBO of the {name} data", values)
    _validate(not best or (type(best[0]) is int and len(best) == 2), "best epoch", best)
    buffers = unsaved(run.vae)
    _validate(tree["buffers"].keys() == buffers.keys(), "list of buffers", [*tree["buffers"]])
    for name, value in tree["buffers"].items():
        _validate(value.shape == buffers[name].shape and not value.isnan().any(), f"buffer {name}", value)
    _validate_optimizer(tree["optimizer"], run.optimizer.state_dict())
    if run.scheduler is not None and tree["scheduler"] is not None:
        known = run.scheduler.state_dict()
        for name, value in tree["scheduler"].items():
            is_same = (
                isinstance(value, float | int) if isinstance(known[name], float) else type(value) is type(known[name])
            )
            _validate(is_same, f"{name} of the schedule", value)


def _validate_optimizer(tree: Tree, now: Tree) -> None:
    """Validate the state of an optimizer against one that took a step: torch's fused steps read it without checks."""
    for then, group in zip(tree["param_groups"], now["param_groups"], strict=True):
        _validate(then.keys() == group.keys() and then["params"] == group["params"], "optimizer", [*then])
        _validate(0 <= float(then["lr"]) < math.inf, "learning rate", then["lr"])
        for name, value in group.items():
            if value is None or isinstance(value, bool | str):
                _validate(type(then[name]) is type(value) and then[name] == value, f"setting {name}", then[name])
    for number, values in tree["state"].items():
        for name, value in now["state"].get(number, {}).items():
            then = values[name]
            _validate(type(then) is type(value), f"state {name} of the optimizer", then)
            if isinstance(value, Tensor):
                same = (then.shape, then.dtype) == (value.shape, value.dtype)
                _validate(same and not then.isnan().any(), f"state {name} of the optimizer", then)


def _validate(is_right: bool, name: str, value: object) -> None:
    if not is_right:
        raise ValueError(f"its {name} is {str(value)[:80]}")


def try_step(optimizer: Optimizer) -> None:
    """Take a step of no gradient, whose effects the caller must undo: an optimizer reads its state only in a step.

    Raises:
        ValueError: if a parameter is not finite afterwards.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if optimizer.state:  # SGD without momentum has none, and others have none of parameters without a gradient
        parameters = [p for p in parameters if optimizer.state.get(p)]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise ValueError("a step of its optimizer gives numbers that are not finite")


def _changed(tensors: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Select the tensors whose bits differ; writing to the others would invalidate caches keyed on ``_version``."""
    return {name: value for name, value in tensors.items() if name in current and not _equal(value, current[name])}


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and same_bits(one, other)


def load_optimizer(optimizer: Optimizer, tree: Tree) -> None:
    """Fill an optimizer in place: its groups and tensors stay the same objects."""
    groups, state = optimizer.param_groups, optimizer.state
    before = {parameter: dict(values) for parameter, values in state.items()}
    optimizer.load_state_dict(tree)
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        group.update({name: value for name, value in loaded.items() if name != "params"})
    filled = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    for parameter, values in filled.items():
        for name, value in values.items():
            current = before.get(parameter, {}).get(name)
            if isinstance(current, Tensor) and isinstance(value, Tensor) and current.shape == value.shape:
                values[name] = current.copy_(value)
    state.clear()
    state.update(filled)
    optimizer.param_groups, optimizer.state = groups, state


def random_state(device: torch.device) -> Tree:
    """Read the states of torch's generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(tree: Tree, device: torch.device) -> None:
    """Set torch's generators; that of CUDA only if the state has one."""
    torch.set_rng_state(tree["cpu"])
    if device.type == "cuda" and tree["cuda"] is not None:
        torch.cuda.set_rng_state(tree["cuda"], device)
