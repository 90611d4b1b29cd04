"""Bad input ends in exit code 2 and one clear sentence, and leaves everything as it was.

A row of the table below is one bad input: what it is, the files to plant, the command line, and what the sentence
must say of it (what is wrong, where, and how to mend it). A new kind of bad input is one more row.
"""

import gzip
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from pyro_vae.cli import main
from pyro_vae.cli.checksums import compute_checksum, record_checksum
from pyro_vae.train.checkpoint.tensor_file import read_tree, write_tree

Content = bytes | Callable[[Path], object] | None
Files = Mapping[str, Content]
NO_FILES: Files = {}

DIVERGED = {"config.yaml", "history.nc", "weights.safetensors", "SHA256SUMS"}


@dataclass(frozen=True)
class Case:
    """A bad input.

    Args:
        title: what is bad.
        says: fragments of the sentence.
        arguments: the command line, given in the folder of the files.
        files: the files to plant, by name.
        left: what may be in ``--out`` afterwards; nothing, except after a divergence.
        trained: whether it needs the folder ``run`` of a finished fit, planted first.
        unless: where it is not bad at all.
    """

    title: str
    says: tuple[str, ...]
    arguments: tuple[str, ...]
    files: Mapping[str, Content] = field(default_factory=dict)
    left: frozenset[str] = frozenset()
    trained: bool = False
    unless: bool = False


GOOD = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
FIT = ("fit", "--out", "out", "--epochs", "1", "--hidden", "[4]", "--batch_size", "4")
COMPARE = ("compare", "--out", "out", "--draws", "2")


# Makers of contents.


def npy(array: np.ndarray) -> Content:
    def write(path: Path) -> None:
        with path.open("wb") as file:  # a file, as np.save would add .npy to any other name
            np.save(file, array, allow_pickle=True)

    return write


def npz(**arrays: np.ndarray) -> Content:
    return lambda path: np.savez(path, **arrays)


def table(**columns) -> Content:
    return lambda path: parquet.write_table(pa.table(columns), path)


def idx(array: np.ndarray, *, magic: bytes = b"\0\0\x08") -> bytes:
    """Bytes in MNIST's format."""
    return magic + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype("u1").tobytes()


def cut(content: Content, keep: float) -> Content:
    """The first part of what would be there."""

    def write(path: Path) -> None:
        plant(path, content)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole))])

    return write


def flipped(content: Content, place: int) -> Content:
    """The same with a byte changed."""

    def write(path: Path) -> None:
        plant(path, content)
        damaged = bytearray(path.read_bytes())
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)

    return write


def plant(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content(path)


def spoilt(value: float) -> np.ndarray:
    """Good numbers, but for row 4, column 1 and one that follows."""
    array = GOOD.astype(float)
    array[4, 1] = array[7, 2] = value
    return array


def as_table(array: np.ndarray) -> Content:
    return table(a=array[:, 0], b=array[:, 1], c=array[:, 2])


def as_csv(array: np.ndarray) -> Content:
    return lambda path: np.savetxt(path, array, delimiter=",", header="a,b,c", comments="")


class Trap:
    """A pickle of it makes a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


TRAPS = np.array([[Trap(), Trap()], [Trap(), Trap()]], dtype=object)
IMAGES = np.random.default_rng(1).integers(0, 256, (6, 4, 4))
GZ = gzip.compress(idx(IMAGES), mtime=0)


# Makers of rows.


def data(title: str, name: str, content: Content, *says: str) -> Case:
    """Bad data, whose sentence begins with the file's name."""
    return Case(title, (f"pyro-vae: {name}: ", *says), (*FIT, "--data", name), {name: content})


def setting(title: str, flags: str, *says: str, files: Files = NO_FILES, **more) -> Case:
    """A bad setting for good data."""
    return Case(title, says, (*FIT, "--data", "good.npy", *flags.split()), {"good.npy": npy(GOOD), **files}, **more)


def config(title: str, content: bytes, *says: str) -> Case:
    """A bad file for --config."""
    return setting(title, "--config a.yaml", *says, files={"a.yaml": content})


def output(title: str, out: str, *says: str, files: Files = NO_FILES, **more) -> Case:
    """A bad place for results."""
    return setting(title, f"--out {out}", f"pyro-vae: {out}: ", *says, files=files, **more)


def compare(title: str, flags: str, *says: str, files: Files = NO_FILES) -> Case:
    """A bad comparison, of the finished run in ``run`` if the flags name it."""
    return Case(title, says, (*COMPARE, *flags.split()), files, trained="--run run" in flags)


def damaged(title: str, name: str, content: Content, *says: str) -> Case:
    """A comparison of a run, one file of which is overwritten."""
    path = os.path.join("run", name)
    return compare(title, "--run run", f"pyro-vae: {path}: ", *says, files={path: content})


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Content:
    """The run's weights, changed, in a file that is whole."""

    def write(path: Path) -> None:
        state, about = read_tree(path)
        change(state)
        write_tree(path, state, about)

    return write


def one_less(state: dict[str, torch.Tensor]) -> None:
    state.pop(next(iter(state)))


def meant(content: Content) -> Content:
    """A file that is listed as it is."""

    def write(path: Path) -> None:
        plant(path, content)
        record_checksum(path.parent, path.name, compute_checksum(path))

    return write


COUNTED = "rows and columns are counted from 0"
COPY = "copy or make it again"
SPOILT = ("2 of 60 values are not finite", "first in row 4, column")
TOO_LARGE = (*SPOILT, "(inf, or too large for float32)", COUNTED)
PICKLED = ("pickled objects", "never loaded", "save numbers")

MISSING = [
    data("a missing file", "nowhere.csv", None, "no such file", "give the path"),
    data("an empty file", "a.csv", b"", "the file is empty", "give a file with data"),
    data(
        "a folder without MNIST",
        "folder",
        Path.mkdir,
        "contains neither MNIST's train-images",
        "give a file",
    ),
    data("an unknown suffix", "a.xlsx", b"123", "unknown file type", "give .csv, .tsv, .txt, .parquet, .npy"),
]

TEXT = [
    data("a word in a CSV", "a.csv", b"a,b\n1,2\n3,4\n5,tall\n", "row 2, column 'b' is 'tall'", "drop it", "from 0"),
    data("a word in a CSV without header", "a.csv", b"1,5\n3,tall\n", "row 1, column 'f1' is 'tall'", "drop it"),
    data("a number only Python reads", "a.csv", b"a,b\n1,2\n3,1_000\n", "row 1, column 'b' is '1_000'", "drop it"),
    data(
        "an empty cell in a CSV", "a.csv", b"a,b\n1,2\n3,\n5,6\n", "1 of 6 values is not", "row 1, column 'b'", "fill"
    ),
    data("NaN in a CSV", "a.csv", as_csv(spoilt(np.nan)), *SPOILT, "column 'b' (nan)", COUNTED),
    data("infinity in a CSV", "a.csv", as_csv(spoilt(-np.inf)), *SPOILT, "column 'b' (-inf", COUNTED),
    data("too large a number in a CSV", "a.csv", as_csv(spoilt(1e300)), *TOO_LARGE, "column 'b'"),
    data(
        "a short row in a CSV", "a.csv", b"a,b\n1,2\n3\n5,6\n", "row 1 has 1 value, but", "2 columns", "make them equal"
    ),
    data(
        "a long row in a CSV", "a.csv", b"1,2\n3,4\n5,6,7\n", "row 2 has 3 values, but", "2 columns", "make them equal"
    ),
    data("a CSV of binary garbage", "a.csv", bytes(range(256)) * 4, "not text in UTF-8", "save the table as CSV"),
    data("a CSV in UTF-16", "a.csv", "a,b\n1,2\n".encode("utf-16-le"), "not text in UTF-8", "NUL", "save the table"),
    data(
        "a CSV in Latin-1", "a.csv", "Größe,b\n1,2\n".encode("latin-1"), "not text in UTF-8", "0xf6", "save the table"
    ),
    data("a CSV with a header only", "a.csv", b"a,b\n", "0 rows and 2 columns", "give at least one of each"),
    data("thousands in a CSV", "a.csv", b'a,b\n"1,234",2\n3,4\n', "row 0, column 'a' is '1,234'", "not a number"),
]

ARRAYS = [
    data("NaN in .npy", "a.npy", npy(spoilt(np.nan)), *SPOILT, "column 1 (nan)", COUNTED),
    data("infinity in .npy", "a.npy", npy(spoilt(np.inf)), *SPOILT, "column 1 (inf", COUNTED),
    data("too large a number in .npy", "a.npy", npy(spoilt(1e300)), *TOO_LARGE, "column 1"),
    data("NaN in .npz", "a.npz", npz(x=spoilt(np.nan)), *SPOILT, "column 1 (nan)", COUNTED),
    data("infinity in .npz", "a.npz", npz(x=spoilt(-np.inf)), *SPOILT, "column 1 (-inf", COUNTED),
    data("too large a number in .npz", "a.npz", npz(x=spoilt(-1e39)), *SPOILT, "(-inf, or too large for float32)"),
    data("one dimension", "a.npy", npy(np.arange(5.0)), "the shape is (5,)", "one row per datum", "reshape(-1, 1)"),
    data("no dimension", "a.npy", npy(np.float64(3)), "the shape is ()", "one row per datum"),
    data("no rows", "a.npy", npy(np.zeros((0, 3))), "the shape is (0, 3)", "at least one row"),
    data("no columns", "a.npy", npy(np.zeros((3, 0))), "the shape is (3, 0)", "at least one row and one feature"),
    data("complex numbers", "a.npy", npy(np.ones((3, 2), complex)), "have type complex128", "give real numbers"),
    data("an array of strings", "a.npy", npy(np.array([["a", "b"]])), "have type <U1", "give real numbers"),
    data("an array of dates", "a.npy", npy(np.zeros((2, 2), "M8[s]")), "have type datetime64[s]", "give real numbers"),
    data("a pickle in .npy", "a.npy", npy(TRAPS), *PICKLED),
    data("a pickle in .npz", "a.npz", npz(x=TRAPS), *PICKLED),
    data("labels that are a pickle", "a.npz", npz(x=GOOD, y=TRAPS), *PICKLED),
    data("a truncated .npy", "a.npy", cut(npy(GOOD), 0.6), "not a valid .npy file", COPY),
    data("an .npy cut in its header", "a.npy", cut(npy(GOOD), 0.1), "not a valid .npy file", "header", COPY),
    data("a truncated .npz", "a.npz", cut(npz(x=GOOD), 0.6), "not a valid .npz file", "not a zip file", COPY),
    data("a damaged .npz", "a.npz", flipped(npz(x=GOOD), 250), "not a valid .npz file", "CRC-32", "x.npy", COPY),
    data("several arrays and no x", "a.npz", npz(p=GOOD, q=GOOD), "contains ['p', 'q']", "name the data x"),
    data("no arrays", "a.npz", npz(), "contains no arrays", "name the data x"),
    data("labels of the wrong length", "a.npz", npz(x=GOOD, y=np.arange(7)), "labels have shape (7,)", "give 20"),
    data("labels that are fractions", "a.npz", npz(x=GOOD, y=np.zeros(20)), "type float64", "give 20 integers"),
    data("one row", "a.npy", npy(GOOD[:1]), "a single row cannot be split", "give at least 2"),
]

PARQUET = [
    data("NaN in Parquet", "a.parquet", as_table(spoilt(np.nan)), *SPOILT, "column 'b' (nan)", COUNTED),
    data("infinity in Parquet", "a.parquet", as_table(spoilt(np.inf)), *SPOILT, "column 'b' (inf", COUNTED),
    data("too large a number in Parquet", "a.parquet", as_table(spoilt(1e300)), *TOO_LARGE, "column 'b'"),
    data("a null in Parquet", "a.parquet", table(a=[1.0, None], b=[1.0, 2.0]), "1 of 4", "row 1, column 'a' (nan)"),
    data("a string column", "a.parquet", table(a=[1.0, 2.0], b=["1", "x"]), "row 1, column 'b' is 'x'", "drop it"),
    data(
        "a list column", "a.parquet", table(a=[1.0], b=[[1, 2]]), "column 'b' has type list<element: int64>", "drop it"
    ),
    data("a Parquet table without rows", "a.parquet", table(a=pa.array([], pa.float64())), "0 rows and 1 columns"),
    data(
        "a truncated .parquet", "a.parquet", cut(table(a=[1.0, 2.0]), 0.5), "not a valid Parquet file", "footer", COPY
    ),
]

IDX = "t-images-idx3-ubyte"
LABELS = "t-labels-idx1-ubyte"
ODD_LABELS = Case(
    "another number of labels than of images",
    (f"pyro-vae: {LABELS}: ", "shape (5,)", "give 6 integers"),
    (*FIT, "--data", IDX),
    {IDX: idx(IMAGES), LABELS: idx(np.arange(5))},
)

MNIST = [
    data("a truncated gzipped IDX file", f"{IDX}.gz", cut(GZ, 0.7), "cannot be read", "end-of-stream", COPY),
    data("a damaged gzipped IDX file", f"{IDX}.gz", flipped(GZ, -6), "cannot be read", "CRC check failed", COPY),
    data("a truncated IDX file", IDX, idx(IMAGES)[:-5], "damaged: 91 bytes follow", "announces 96", "copy it again"),
    data("an IDX file cut in its header", IDX, idx(IMAGES)[:3], "not an IDX file", "00 00 08", "copy it again"),
    data("an IDX file with another magic number", IDX, idx(IMAGES, magic=b"\1\2\3"), "not an IDX file", "01 02 03 03"),
    data("an IDX file of 255 dimensions", IDX, b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"\1", "not an IDX file"),
    data(
        "trailing bytes",
        IDX,
        idx(IMAGES) + b"xx",
        "damaged: more than 96 bytes follow",
        "announces 96",
        "copy it again",
    ),
    data("labels for data", LABELS, idx(np.arange(6)), "1-dimensional", "perhaps labels", "the file of the images"),
    ODD_LABELS,
]

PROC = Path("/proc")
HELD = {"held/mine.txt": b"mine"}
PLAIN = {"plain": b"text"}
OUTPUTS = [
    output("a path below a file", "plain/run", "Not a directory", "choose another folder", files=PLAIN),
    output("a folder that holds a file", "held", "already holds mine.txt", "nothing is overwritten", files=HELD),
    output("a file for a folder", "plain", "File exists", "choose another folder", files=PLAIN),
    output("the data file for a folder", "good.npy", "File exists", "choose another folder"),
    output("a path below /proc", "/proc/pyro-vae", "cannot be written", "another folder", unless=not PROC.is_dir()),
]

FIVE = {"five.npy": npy(np.ones((4, 5)))}
HELP = "see pyro-vae fit --help"
FRACTION = "it must lie between 0 and 1"
CUDA = ("device cuda is not available", "use auto or cpu")
NORMAL = "--likelihood pyro_vae.likelihoods.Normal"
SCALE = "must be a finite number above 0"
SETTINGS = [
    setting("CUDA without a GPU", "--device cuda", *CUDA, unless=torch.cuda.is_available()),
    setting("a device that is none", "--device nonsense", "device nonsense is not available", "use auto or cpu"),
    setting("batch_size 0", "--batch_size 0", "batch_size is 0", "from 1 to the number of training data, 16"),
    setting("a negative batch_size", "--batch_size=-3", "batch_size is -3", "from 1 to"),
    setting("batch_size beyond the data", "--batch_size 17", "batch_size is 17", "training data, 16"),
    setting("batch_size with a dash", "--batch-size 0", "batch_size is 0", "from 1 to"),
    setting("a fraction for batch_size", "--batch_size 2.5", "batch_size: expected int, got 2.5", HELP),
    setting("epochs 0", "--epochs 0", "epochs is 0", "at least 1"),
    setting("a word for epochs", "--epochs many", "epochs: expected int, got many", HELP),
    setting("latent_dim 0", "--latent_dim 0", "latent_dim is 0", "at least 1"),
    setting("latent_dim beyond any memory", f"--latent_dim {10**15}", "cannot build a VAE", "memory", "change them"),
    setting("a hidden layer of width 0", "--hidden [4,0]", "one of the sizes [0, 4, 8, 3] is 0", "at least 1"),
    setting("held_out 0", "--held_out 0", "held-out fraction is 0.0", FRACTION),
    setting("held_out 1", "--held_out 1", "held-out fraction is 1.0", FRACTION),
    setting("held_out 1.5", "--held_out 1.5", "held-out fraction is 1.5", FRACTION),
    setting("a seed beyond 64 bits", f"--seed {10**30}", f"seed is {10**30}", "between -2**62 and 2**62"),
    setting(
        "validation data of other columns", "--validation_data five.npy",
        "five.npy: a row has 5 numbers", "3 in good.npy", "same columns", files=FIVE,
    ),
    setting("missing validation data", "--validation_data gone.npy", "gone.npy: no such file", "give the path"),
    setting("likelihood scale 0", NORMAL + " --likelihood.scale 0", "scale is 0.0", SCALE),
    setting("a negative likelihood scale", NORMAL + " --likelihood.scale=-1", "scale is -1.0", SCALE),
    setting("likelihood scale nan", NORMAL + " --likelihood.scale .nan", "scale is nan", SCALE),
    setting("a word for the scale", NORMAL + " --likelihood.scale x", "likelihood", "got x", HELP),
    setting("a scale of no class", "--likelihood.scale 1", "likelihood: no class is named, got 1", HELP),
    setting(
        "a learning rate that diverges", "--optimizer torch.optim.SGD --optimizer.lr 1e30",
        "the loss became nan at step 2 (epoch 1)", "the VAE now has its initial weights", "lower the learning rate",
        left=frozenset(DIVERGED | {"run.json"}),
    ),
    setting("a negative learning rate", "--optimizer.lr=-1", "optimizer cannot be", "rate: -1.0", "change its"),
    setting("a word for the learning rate", "--optimizer.lr x", "optimizer: lr: expected float, got x", HELP),
    setting("an optimizer that needs a closure", "--optimizer LBFGS", "optimizer cannot be", "'closure'", "change its"),
    setting("an optimizer of sparse gradients", "--optimizer SparseAdam", "does not support dense", "change its"),
    setting("an unknown prior", "--prior Cauchy", "prior: there is no class Cauchy", HELP),
    setting("a prior of no module", "--prior nowhere.Prior", "prior: No module named 'nowhere'", HELP),
    setting("a base class for a prior", "--prior Prior", "cannot build a VAE", "change them, latent_dim 8"),
    setting("a prior for a likelihood", "--likelihood pyro_vae.priors.Prior", "Prior"),
    setting("a setting that a prior has not", "--prior.what 3", "prior: no class is named", "option 'what'", HELP),
    setting("an unknown estimator", "--elbo Nope", "elbo: there is no class Nope", HELP),
    setting(
        "an estimator without particles", "--elbo pyro_vae.elbo.Trace_ELBO --elbo.num_particles 0",
        "num_particles is 0", "at least 1",
    ),
    setting("an unknown flag", "--wat 3", "unrecognized arguments: --wat 3", HELP),
    setting("a flag cut short", "--epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs? See pyro-vae"),
    setting("a missing --config", "--config gone.yaml", "gone.yaml: ", "File does not exist", HELP),
    config("a --config not of YAML", b"a: [1, 2\nb: {", "a.yaml: ", "line 1, column 4", HELP),
    config("a --config of bytes", bytes(range(256)), "a.yaml: ", "'utf-8'", HELP),
    config("a --config of a list", b"- 1\n- 2\n", "a.yaml: not a table of settings", HELP),
    config("an empty --config", b"", "a.yaml: not a table of settings", HELP),
    config("an unknown key in --config", b"epochz: 3\n", "option 'epochz'", HELP),
    config("a wrong type in --config", b"epochs: x\n", "a.yaml: epochs: expected int", HELP),
    config("code in --config", b"seed: !!python/object/apply:os.mkdir [a]", "a.yaml: ", "could not determine", HELP),
    Case("no data", ("arguments are required: fit.data", HELP), ("fit", "--out", "out")),
    Case("an unknown command", ("invalid choice: 'train'", "did you mean pyro-vae fit? See pyro-vae"), ("train",)),
    Case("a demo of 0 epochs", ("epochs is 0", "at least 1"), ("demo", "--out", "out", "--epochs", "0")),
]  # fmt: skip

COMPARES = [
    compare("a missing run", "--run gone", "gone: holds no config.yaml", "give a run folder"),
    compare("a folder that is no run", "--run held", "held: holds no config.yaml", "give a run folder", files=HELD),
    compare("a file for a run", "--run plain", "plain: holds no config.yaml", "give a run folder", files=PLAIN),
    compare("neither run nor data", "", "compare needs RUN", "or --data"),
    compare("draws 1", "--run run --draws 1", "draws is 1", "at least 2"),
    compare("draws 1 before a training", "--data five.npy --draws 1", "draws is 1", "at least 2", files=FIVE),
    compare("particles 0", "--data five.npy --particles [0]", "particles is [0]", "at least 1", files=FIVE),
    compare("no estimators", "--data five.npy --elbos []", "elbos is empty", "pass at least one", files=FIVE),
    compare("one held-out row", "--run run --rows 1", "rows 1", "at least 2"),
    compare("an estimator's bad setting", "--run run --elbos [MIWAE] --particles [3]", "is 3", "a multiple"),
    setting("STL without particles", "--elbo STL --elbo.num_particles 0", "STL: num_particles is 0", "at least 1"),
    setting("groups that do not divide", "--elbo MIWAE --elbo.num_particles 5", "num_particles is 5", "a multiple"),
    setting(
        "a warm-up longer than the training",
        "--elbo Beta --elbo.elbo ELBO --elbo.beta Linear --elbo.beta.steps 999 --epochs 2",
        "ends after 999 steps, but training has only 8",
    ),
    compare("precision float16", "--run run --precision float16", "precision is float16", "float32 or float64"),
    compare("missing data", "--run run --data gone.npy", "gone.npy: no such file", "give the path"),
    compare("the run's own folder for --out", "--run run --out run", "run: already holds ", "choose another folder"),
    compare(
        "data of other columns than the run's", "--run run --data five.npy",
        "five.npy: a row has 5 numbers", "3 in ", "same columns", files=FIVE,
    ),
    damaged("a run whose config.yaml is damaged", "config.yaml", b"data: [", "has changed since it was", "copy the"),
    damaged("a run whose config.yaml is wrong", "config.yaml", meant(b"data: ["), "not the settings of a run", "copy"),
    damaged("a run whose config.yaml is empty", "config.yaml", meant(b""), "not a table of settings", "copy the run"),
    damaged("a run whose config.yaml is of bytes", "config.yaml", meant(bytes(range(256))), "'utf-8'", "copy the run"),
    compare("a run without its list", "--run run", "has no checksum in", "copy", files={"run/SHA256SUMS": b""}),
    damaged("a run without weights", "weights.safetensors", Path.unlink, "No such file", "pass a file"),
    damaged("truncated weights", "weights.safetensors", cut(None, 0.9), "damaged", "bytes instead of", "copy it again"),
    damaged("weights of bytes", "weights.safetensors", b"x" * 100, "or not a weights or checkpoint file", "copy it"),
    damaged("weights that lack one", "weights.safetensors", weights(one_less), "missing weight", "pass a VAE built"),
    damaged(
        "weights of another shape", "weights.safetensors",
        weights(lambda w: w.update({"model.decoder.net.0.bias": torch.zeros(9)})),
        "the architecture differs", "model.decoder.net.0.bias is 9 float32, not 4 float32",
    ),
    damaged(
        "weights that are NaN", "weights.safetensors",
        weights(lambda w: w["model.decoder.log_scale"].fill_(torch.nan)),
        "weight model.decoder.log_scale is not finite", "train again",
    ),
]  # fmt: skip

CASES = [*MISSING, *TEXT, *ARRAYS, *PARQUET, *MNIST, *OUTPUTS, *SETTINGS, *COMPARES]


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything in a folder: files with what they hold, and folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def exit_code(arguments: tuple[str, ...]) -> int:
    try:
        return main(arguments)
    except SystemExit as error:  # the parser's own way out
        return error.code


def sentence(error_stream: str, *, after_training: bool) -> str:
    """The one line that says what was wrong; only a training may have reported of itself before it."""
    assert "Traceback" not in error_stream
    *before, last = error_stream.strip().splitlines()
    assert last.startswith("pyro-vae: ")
    assert after_training or not before, "one line, no more"
    assert len(last) < 500
    return last


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "good.npy", GOOD)
    data, out = str(folder / "good.npy"), str(folder / "run")
    assert main([*FIT, "--data", data, "--out", out]) == 0
    return folder / "run"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.title, marks=pytest.mark.skipif(c.unless, reason="not bad on this machine")) for c in CASES],
)
def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(case, folder, request, capsys):
    if case.trained:
        shutil.copytree(request.getfixturevalue("finished_run"), folder / "run")
    for name, content in case.files.items():
        plant(folder / name, content)
    before = contents(folder)
    capsys.readouterr()

    assert exit_code(case.arguments) == 2

    said = sentence(capsys.readouterr().err, after_training=bool(case.left))
    for fragment in case.says:
        assert fragment in said
    out = folder / "out"
    assert {path.name for path in out.rglob("*")} == case.left
    after = contents(folder)
    assert {path: after[path] for path in after if out not in (path, *path.parents)} == before


def test_a_divergence_leaves_the_last_good_weights(folder):
    np.save("good.npy", GOOD)
    flags = ("--optimizer", "torch.optim.SGD", "--optimizer.lr", "1e30")
    assert main([*FIT, "--data", "good.npy", *flags]) == 2
    assert all(weight.isfinite().all() for weight in load_file("out/weights.safetensors").values())


def test_a_divergence_in_a_comparison_leaves_the_last_good_weights(folder):
    np.save("good.npy", GOOD)
    flags = ("--epochs", "1", "--batch_size", "4", "--optimizer", "torch.optim.SGD", "--optimizer.lr", "1e30")
    assert main([*COMPARE, "--data", "good.npy", *flags]) == 2
    assert {path.name for path in Path("out").iterdir()} == DIVERGED
    assert all(weight.isfinite().all() for weight in load_file("out/weights.safetensors").values())


def test_the_trap_would_spring_if_a_pickle_were_loaded(folder):
    plant(folder / "a.npy", npy(TRAPS))
    np.load("a.npy", allow_pickle=True)
    assert Path("unpickled").exists()


def test_a_mended_command_may_use_the_same_folder(folder):
    np.save("good.npy", GOOD)
    command = [*FIT, "--data", "good.npy"]
    assert main([*command, "--batch_size", "0"]) == 2
    assert main(command) == 0


def test_one_held_out_row_is_enough_to_compare_on(folder, finished_run):
    np.save("one.npy", GOOD[:1])
    assert main([*COMPARE, "--run", str(finished_run), "--data", "one.npy"]) == 0


def test_the_table_holds_many_kinds_of_bad_input():
    assert len(CASES) >= 100
    assert len({case.title for case in CASES}) == len(CASES)
    assert all(case.says for case in CASES)
