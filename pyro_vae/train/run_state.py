"""What a training run goes on from, as a tree, and back in place."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.elbo.nested import counters
from pyro_vae.train.checkpoint.optimizer_state import (
    Tree,
    as_tree,
    like,
    load_optimizer,
    random_state,
    set_random_state,
    unsaved,
)

if TYPE_CHECKING:
    from pyro_vae.train.run import Run


def state_of(run: "Run") -> Tree:
    """All that a run goes on from, but the last good state: tensors and plain values; views, not copies."""
    scheduler = run.scheduler
    return {
        "weights": dict(run.vae.state_dict()),
        "buffers": unsaved(run.vae),
        "optimizer": as_tree(run.optimizer.state_dict()),
        "scheduler": None if scheduler is None else as_tree(scheduler.state_dict()),
        "estimator": counters(run.loss),
        "random": run.group.gathered(random_state(run.device)),
        "progress": {
            "step": run.step, "seen": run.seen, "total": run.total, "seconds": run.seconds,
            "epochs": run.epochs, "stopped": run.stopped, "values": run.values,
        },
        "engine": run.stepping.state(),
        "callbacks": [[type(callback).__name__, callback.state()] for callback in run.remembering],
    }  # fmt: skip


def copied(state: Tree) -> Tree:
    """A copy of a state; the rows of the history, which never change and may be many, are shared."""
    epochs = state["progress"]["epochs"]
    return copy.deepcopy(state, {id(epochs): list(epochs)})


def restore(run: "Run", tree: Tree) -> None:
    """Have a run go back, or on, to a state, in place."""
    tree = copied(tree)
    with torch.no_grad():
        run.vae.load_state_dict(_changed(tree["weights"], run.vae.state_dict()), strict=False)
        own = unsaved(run.vae)
        for name, value in _changed(tree["buffers"], own).items():
            own[name].copy_(value)
        load_optimizer(run.optimizer, tree["optimizer"])
        for counter, value in zip(counters(run.loss), tree["estimator"], strict=True):
            counter.copy_(value)
    if run.scheduler is not None and tree["scheduler"] is not None:
        run.scheduler.load_state_dict(like(tree["scheduler"], run.scheduler.state_dict()))
    progress = tree["progress"]
    if len(tree["random"]) == run.ranks:
        set_random_state(tree["random"][run.rank], run.device)
    else:  # saved by another number of processes
        torch.manual_seed(run.group.seed(run.seed, progress["step"]))
    run.step, run.seen = progress["step"], progress["seen"]
    run.total, run.seconds, run.epochs = progress["total"], progress["seconds"], progress["epochs"]
    run.stopped, run.values = progress["stopped"], progress["values"]
    for callback, (_, state) in zip(run.remembering, tree["callbacks"], strict=True):
        callback.load(state)
    run.stepping.moved()


def _changed(tensors: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Those that are not the same to the bit; who has looked at the others is to see that nobody wrote to them."""
    return {name: value for name, value in tensors.items() if name in own and not _same_bits(value, own[name])}


def _same_bits(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if (one.dtype, one.shape) != (other.dtype, other.shape) or {one.layout, other.layout} != {torch.strided}:
        return False
    first, second = (tensor.to(other.device).contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
