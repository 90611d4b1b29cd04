"""The files of a run, each cut or flipped at random: what is read of them is exact or refused."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from pyro_vae.cli.checksums import SUMS, read_checksums, validate_unchanged
from pyro_vae.errors import PyroVAEError
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.checkpoint.save_load import load
from pyro_vae.train.checkpoint.tensor_file import read_tree

Outcome = str
EXACT, REFUSED, FELL_BACK, WRONG = "exact", "refused", "fell back to the one before", "wrong"


def state(tree: object) -> object:
    """A tree as what can be compared to the bit."""
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(tree, dict):
        return [(key, state(value)) for key, value in tree.items()]
    return [state(item) for item in tree] if isinstance(tree, list) else repr(tree)


def readers(run: Path) -> dict[str, Callable[[], object]]:
    """By name, what is read of a run folder, in a form that can be compared; each is what the commands read it by."""
    found: dict[str, Callable[[], object]] = {}
    for name in dict(read_checksums(run)):
        found[name] = lambda path=run / name: (validate_unchanged(path), path.read_bytes())
    found["the VAE"] = lambda: state(dict(load(run).state_dict()))
    for path in sorted((run / "checkpoints").glob("step-*")):
        found[f"checkpoints/{path.name}"] = lambda path=path: state(list(read_tree(path)))
    return found


def newest(run: Path, say: Callable[[str], None] = lambda _: None) -> object:
    """The checkpoint that a resumed run goes on from."""
    found = Checkpoints(run, say=say).newest()
    return None if found is None else (found[0], state(found[1]), state(found[2]))


def damaged(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The same bytes cut, with a bit flipped, or with some of them overwritten by others."""
    kind = chance.choice(["cut", "flipped", "overwritten"])
    place = chance.randrange(len(data))
    if kind == "cut":
        return kind, data[:place]
    if kind == "flipped":
        return kind, data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
    length = min(len(data) - place, chance.choice([8, 64, 512]))
    return kind, data[:place] + chance.randbytes(length) + data[place + length :]


def outcome(read: Callable[[], object], truth: object) -> Outcome:
    """What comes of reading: the truth, a sentence, or a wrong answer (or an error that is not ours)."""
    try:
        return EXACT if read() == truth else WRONG
    except PyroVAEError as error:
        return REFUSED if "\n" not in str(error) and ";" in str(error) else WRONG
    except Exception:  # a traceback for the user
        return WRONG


def of_the_newest(run: Path, whole: dict[str, object]) -> Outcome:
    """What resuming would go on from: a checkpoint that was written, and a sentence where it is not the last."""
    said: list[str] = []
    try:
        found = newest(run, said.append)
    except PyroVAEError:
        return REFUSED
    except Exception:
        return WRONG
    if found == whole["last"]:
        return EXACT
    return FELL_BACK if found == whole["before"] and len(said) == 1 else WRONG


def trials(run: Path, number: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Damage a file of a run at random and read the run, so many times.

    Args:
        run: a finished run with at least two checkpoints; it is as it was afterwards.
        number: of trials.
        seed: of the damages.

    Returns:
        By the file that was damaged and how, the counts of outcomes of whatever was read of it.
    """
    chance, counts = random.Random(seed), dict[str, Counter[str]]()
    truths = {name: read() for name, read in readers(run).items()}
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    whole = {"last": newest(run)}
    data = checkpoints[-1].read_bytes()
    checkpoints[-1].unlink()
    whole["before"] = newest(run)
    checkpoints[-1].write_bytes(data)
    paths = sorted(path for path in run.rglob("*") if path.is_file())
    for i in range(number):
        path = paths[i % len(paths)]
        before = path.read_bytes()
        kind, after = damaged(before, chance)
        path.write_bytes(after)
        try:
            name = str(path.relative_to(run))
            told = counts.setdefault(f"{'checkpoint' if path in checkpoints else name}, {kind}", Counter())
            now = readers(run)
            which = [*truths] if name == SUMS else [name] + ["the VAE"] * (name == "weights.safetensors")
            for one in which:
                told[outcome(now.get(one, truths_missing), truths[one])] += 1
            if path in checkpoints:
                told[of_the_newest(run, whole)] += 1
        finally:
            path.write_bytes(before)
    return {name: dict(count) for name, count in sorted(counts.items())}


def truths_missing() -> object:
    """A file that the list has lost is not read at all, since its reader asks the list first."""
    raise PyroVAEError("not listed; refused")
