"""What tests of callbacks need: weights and states as flat vectors, and what TensorBoard was told."""

import json

import pytest
import torch


def flat(vae):
    return torch.cat([p.detach().clone().flatten() for p in vae.parameters()])


def flattened(vae, state):
    return torch.cat([state[name].flatten() for name, _ in vae.named_parameters()])


def plain(tree):
    """A tree as JSON has it, its tensors as lists; anything else is refused."""

    def tensors(value):
        assert isinstance(value, torch.Tensor), type(value)
        return {"dtype": str(value.dtype), "numbers": value.tolist()}

    return json.dumps(tree, default=tensors)


def scalars(folder):
    """All scalars of a folder, as TensorBoard reads them: by name, pairs of step and number."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def single(number):
    return torch.tensor(number, dtype=torch.float32).item()
