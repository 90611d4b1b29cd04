"""State trees in files: what was written comes back to the bit, or the file is refused."""

import math
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pyro_vae.errors import DataError, OutputError, SettingsError
from pyro_vae.train.checkpoint.rotation import Checkpoints, locked
from pyro_vae.train.checkpoint.tensor_file import read_tree, write_tree

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SHARED = torch.arange(6.0).reshape(2, 3)

TREE = {
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"betas": (0.9, 0.999)}]},
    "milestones": Counter({30: 1, 80: 2}),
    "numbers": [0, -1, 2**80, -0.0, 1e-320, math.nan, math.inf, -math.inf, True, None, "ä\ud800\"\\"],
    "bits": {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
    "shapes": [torch.zeros(()), torch.zeros(0), torch.zeros(2, 0, 3), SHARED.T, SHARED[:, ::2], SHARED, SHARED],
    "odd": {"$": "tensor", "__metadata__": torch.ones(1), "": [], "\ud800": SHARED},
    "names": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
}  # fmt: skip


def same(one, other) -> bool:
    """Equal to the bit: tensors by their bytes, floats by their digits."""
    if isinstance(one, torch.Tensor):
        alike = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)] if alike else [one]
        return alike and torch.equal(*flat)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and repr(one) == repr(other)


def test_a_tree_comes_back_to_the_bit(tmp_path):
    write_tree(tmp_path / "a", TREE, {"of": "a test"})
    tree, about = read_tree(tmp_path / "a")
    assert same(TREE, tree)
    assert about == {"of": "a test"}
    assert not same(TREE, {**tree, "shapes": [*tree["shapes"][:-1], SHARED + 1e-6]}), "the test would see a difference"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tensors_of_one_memory_are_written_once_and_come_back_apart(tmp_path):
    large = torch.arange(10_000.0)
    write_tree(tmp_path / "a", [large, large.detach(), large[:5], large[:5].double()])
    assert (tmp_path / "a").stat().st_size < 41_000
    one, other, *rest = read_tree(tmp_path / "a")[0]
    one += 1
    assert same([other, *rest], [large, large[:5], large[:5].double()])


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return tensor.to(draw(st.sampled_from(DTYPES))).transpose(0, -1) if shape else tensor


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | tensors()
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
)


@settings(max_examples=200, deadline=None)
@given(tree=TREES)
def test_any_tree_comes_back_to_the_bit(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_tree(path, tree)
    assert same(tree, read_tree(path)[0])


def test_the_library_of_the_format_reads_the_file(tmp_path):
    write_tree(tmp_path / "a", {"w": SHARED, "b": torch.tensor(True)})
    assert same(dict(sorted(load_file(tmp_path / "a").items())), {"b": torch.tensor(True), "w": SHARED})


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "a"
    write_tree(path, {"w": torch.tensor([1.0, math.nan]), "n": 3}, {"of": "a test"})
    return path.read_bytes()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_tree(path)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "says how to mend it"
    return str(caught.value)


def test_every_flipped_bit_is_refused(tmp_path, small):
    """All of them, in header, checksum and tensors."""
    for bit in range(8 * len(small)):
        flipped = bytearray(small)
        flipped[bit // 8] ^= 1 << bit % 8
        assert "damaged" in refusal(tmp_path / "a", bytes(flipped))


def test_every_other_length_is_refused(tmp_path, small):
    for length in range(len(small)):
        refusal(tmp_path / "a", small[:length])
    refusal(tmp_path / "a", small + b"\0")


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae.train.checkpoint.tensor_file.FORMAT", 3)
    write_tree(tmp_path / "a", {})
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"has format 3, but this pyro-vae reads formats up to 2; use a newer"):
        read_tree(tmp_path / "a")


@pytest.mark.parametrize("path", ["nowhere", ".", "a\0b"])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(DataError, match=r"cannot be read|is a folder, not a file"):
        read_tree(path)


@pytest.mark.parametrize(
    "value",
    [object(), 1j, {1.5: 0}, torch.zeros(2, dtype=torch.complex64), {"a": {2, 3}}],
    ids=["object", "complex", "float key", "complex tensor", "set"],
)
def test_what_no_file_holds_is_refused_and_nothing_written(tmp_path, value):
    with pytest.raises(SettingsError, match=r"callbacks\.0.* is .*; make it"):
        write_tree(tmp_path / "a", {"callbacks": [value]})
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_tree(tmp_path / "a", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_failed_write_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for a disk without space."""
    write_tree(tmp_path / "a", {"w": torch.ones(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"a: cannot be written \(File too large\); raise the limit"):
            write_tree(tmp_path / "a", {"w": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert same(read_tree(tmp_path / "a")[0], {"w": torch.ones(10)})


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_tree(tmp_path / "no" / "a", {})


def names(folder: Path) -> list[int]:
    return [int(path.stem.split("-")[1]) for path in sorted((folder / "checkpoints").iterdir())]


def test_the_last_few_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 30, 4 * 10**9):
        checkpoints.write(step, {"step": step}, {})
    assert names(tmp_path) == [30, 4 * 10**9]


def test_the_clock_changes_nothing(tmp_path, monkeypatch):
    """Files of the future and the past, and a clock that is set back: the step in the name decides."""
    checkpoints = Checkpoints(tmp_path, minutes=5.0)
    for step, year in ((1, 60), (2, -50), (3, 10)):
        path = checkpoints.write(step, {"step": step}, {})
        os.utime(path, (time.time() - year * 3e7,) * 2)
    assert Checkpoints(tmp_path).newest()[0] == 3
    now = time.monotonic()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert not checkpoints.due(4)
    monkeypatch.setattr(time, "monotonic", lambda: now + 301)
    assert checkpoints.due(4)
    checkpoints.write(4, {"step": 4}, {})
    assert not checkpoints.due(5)
    assert names(tmp_path) == [2, 3, 4]


@pytest.mark.parametrize(("taken", "due"), [(99, False), (100, True), (170, True)])
def test_one_is_due_after_so_many_steps(tmp_path, taken, due):
    checkpoints = Checkpoints(tmp_path, steps=50, minutes=None)
    checkpoints.written(55)
    assert checkpoints.due(taken) is due


def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    paths = [checkpoints.write(step, {"step": step}, {}) for step in (10, 20, 30)]
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    step, tree, about, path = checkpoints.newest()
    assert (step, tree, about, path) == (20, {"step": 20}, {"step": 20}, paths[1])
    assert len(said) == 1
    assert "step-000000030.safetensors: is damaged" in said[0]
    assert said[0].endswith("trying the previous checkpoint")
    checkpoints.write(25, {}, {})
    assert names(tmp_path) == [10, 20, 25], "the damaged one is of a step that comes again"
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 3 checkpoints is intact"):
        checkpoints.newest()


def test_a_checkpoint_under_another_name_is_passed_over(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    paths = [checkpoints.write(step, {}, {}) for step in (10, 20)]
    paths[0].rename(paths[0].with_name("step-000000090.safetensors"))
    assert checkpoints.newest()[0] == 20
    assert "holds step 10" in said[0]


def test_what_a_killed_write_left_is_cleared(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, {}, {})
    (tmp_path / "checkpoints" / ".step-000000002.safetensors.part-77").write_bytes(b"half")
    assert checkpoints.newest()[0] == 1
    checkpoints.write(3, {}, {})
    assert names(tmp_path) == [1, 3]


HOLDER = "import sys, time; from pyro_vae.train.checkpoint.rotation import locked\nwith locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"  # fmt: skip # noqa: E501


def test_a_second_run_in_one_folder_is_refused_and_a_killed_one_lets_go(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(OutputError, match="another run is writing to this folder; wait until it ends"),
            locked(tmp_path),
        ):
            pass
        holder.kill()
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_without_locks_a_sentence_says_so(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    said = []
    with locked(tmp_path, said.append), locked(tmp_path, said.append):
        pass
    assert len(said) == 2
    assert "the file system has no locks (Operation not supported)" in said[0]
