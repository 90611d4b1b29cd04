"""Run folders from strangers: nothing in them is run, nothing grows, nothing outside them is read or written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli.checksums import compute_checksum, record_checksum
from pyro_vae.errors import DataError
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.checkpoint.tensor_file import read_tree, write_tree

X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
OWN = """
import pathlib

import pyro_vae as pv

pathlib.Path("RAN").touch()


class Own(pv.priors.StandardNormal):
    pass
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "x.npy", X)
    settings = ["--epochs", "1", "--latent_dim", "2", "--hidden", "[4]", "--engine", "eager", "--device", "cpu"]
    assert main(["fit", "--data", str(folder / "x.npy"), "--out", str(folder / "run"), *settings]) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "runs" / "stranger")).relative_to(tmp_path)


def with_settings(run: Path, **changed) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text()) | changed
    with_text(run, "config.yaml", yaml.safe_dump(settings))


def with_text(run: Path, name: str, text: str | bytes) -> None:
    """Plant a file with its sum, as a stranger can."""
    (run / name).write_bytes(text.encode() if isinstance(text, str) else text)
    record_checksum(run, name, compute_checksum(run / name))


def refused(capsys, arguments: list[str]) -> str:
    """The one sentence that a command refuses its input with."""
    code = main(arguments)
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert code == 2, said
    assert said.startswith("pyro-vae: ")
    assert "; " in said
    return said


def of_class(path: str, **arguments) -> dict:
    return {"class_path": path, "init_args": arguments} if arguments else {"class_path": path}


LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
NAMED = {
    "a class of the folder": {"prior": of_class("runs.stranger.payload.Own")},
    "a name instead of a class": {"prior": "runs.stranger.payload.Own"},
    "a callable that ends the process": {"scheduler": of_class(LAMBDA, lr_lambda="os._exit")},
    "a callable in a list": {"scheduler": of_class(LAMBDA, lr_lambda=["builtins.print"])},
    "a class of another kind": {"prior": of_class("json.JSONDecoder")},
    "a class of this library, of another kind": {"prior": of_class("pyro_vae.errors.DataError")},
    "a function of torch": {"optimizer": of_class("torch.optim.swa_utils.update_bn")},
    "a module that this library imports": {"prior": of_class("pyro_vae.cli.fit.json.loads")},
    "a class in a class": {"likelihood": of_class("pyro_vae.likelihoods.Blocks", blocks=[[of_class("os.system"), 3]])},
    "a class in keywords": {"optimizer": {"class_path": "torch.optim.Adam", "dict_kwargs": {"fused": "os.system"}}},
    "YAML in a string": {"prior": "{class_path: os.system}"},
    "a setting within a setting": {"prior.class_path": "os.system"},
    "another file of settings": {"config": "/etc/passwd"},
    "a cluster to connect to": {"cluster": "ray://evil.example:10001"},
    "trust in itself": {"trust": "runs", "prior": of_class("runs.stranger.payload.Own")},
    "another folder to write to": {"callbacks": [of_class("pyro_vae.callbacks.TensorBoard", folder="/tmp/elsewhere")]},
    "that folder, of a class by its short name": {"callbacks": [of_class("TensorBoard", folder="elsewhere")]},
    "a number as a class": {"prior": of_class("1")},
    "no class at all": {"prior": {"class_path": 3}},
    "a table of numbers": {"prior": {1: 2}},
}


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED.keys())
def test_a_run_folder_names_parts_only(named, run, capsys):
    (run / "payload.py").write_text(OWN)
    with_settings(run, **named)
    assert str(run) in refused(capsys, ["fit", "--resume", str(run), "--epochs", "2"])
    assert not Path("RAN").exists()


@pytest.mark.parametrize("arguments", ["check --run", "compare --run", "encode --run", "sample --run", "fit --config"])
def test_no_command_imports_from_a_run_folder(arguments, run, capsys):
    (run / "payload.py").write_text(OWN)
    with_settings(run, prior=of_class("runs.stranger.payload.Own"))
    config = ["/config.yaml"] if "--config" in arguments else [""]
    assert "payload.Own" in refused(capsys, [*arguments.split(), f"{run}{config[0]}"])
    assert not Path("RAN").exists()


@pytest.mark.parametrize("place", ["", "runs", "runs/stranger/inside"])
def test_a_run_folder_with_code_is_refused_where_python_imports_from_it(place, run, monkeypatch, capsys):
    """Python would import such a file in place of an installed module of the same name."""
    (run / "inside").mkdir()
    (run / "inside" / "payload.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [str(Path(place).resolve()), *sys.path])
    if place.startswith(str(run)):
        told = refused(capsys, ["sample", str(run), "--n", "2"])
        assert "runs/stranger: holds code (inside/payload.py), which is never run from a run folder; call" in told
    else:
        assert main(["sample", str(run), "--n", "2"]) == 0
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "path", ["", *sys.path[1:]])
    assert "which is never run from a run folder" in refused(capsys, ["sample", ".", "--n", "2"])


def test_nothing_is_imported_to_learn_its_type(run, capsys):
    with_settings(run, prior=of_class("antigravity.fly"))
    refused(capsys, ["fit", "--resume", str(run), "--epochs", "2"])
    assert "antigravity" not in sys.modules


def test_trust_names_a_package_of_ones_own_but_none_below_the_run_folder(run, capsys):
    Path("trusted_package.py").write_text(OWN)
    (run / "payload.py").write_text(OWN)
    with_settings(run, prior=of_class("runs.stranger.payload.Own"))
    told = refused(capsys, ["encode", str(run), "--trust", "runs"])
    assert "payload.Own is code inside the run folder, which is never run" in told
    assert not Path("RAN").exists()
    with_settings(run, prior=of_class("trusted_package.Own"))
    assert "add --trust trusted_package" in refused(capsys, ["compare", str(run)])
    assert not Path("RAN").exists()
    assert main(["sample", str(run), "--n", "2", "--trust", "trusted_package"]) == 0
    with_settings(run, callbacks=[of_class("pyro_vae.callbacks.TensorBoard", folder="logs")])
    assert "outside the run folder" in refused(capsys, ["sample", str(run)])
    assert main(["sample", str(run), "--n", "2", "--trust", "trusted_package,logs"]) == 0


HELPED = """from pyro_vae.priors import StandardNormal


class Part:
    pass


class Helped(StandardNormal):
    def __init__(self, latent_dim: int, part: Part | None = None):
        super().__init__(latent_dim)
"""


def test_a_trusted_package_may_define_any_class(run):
    Path("helped_package.py").write_text(HELPED)
    with_settings(run, prior=of_class("helped_package.Helped", part=of_class("helped_package.Part")))
    assert main(["sample", str(run), "--n", "2", "--trust", "helped_package"]) == 0


IMPORTED = "import json, os\n\nimport torch\nfrom pyro_vae.errors import DataError\n\n" + OWN
PLACES = "prior", "likelihood", "posterior", "optimizer", "scheduler", "elbo", "callbacks"


PATHS = "torch.load", "os.abort", "os.getcwd", "json.JSONDecoder", "DataError", "os", "no"


@pytest.mark.parametrize(
    ("place", "path"), [*((place, "torch.load") for place in PLACES), *(("prior", path) for path in PATHS[1:])]
)
def test_what_a_trusted_package_imports_is_not_trusted(place, path, run, capsys, monkeypatch):
    Path("mine_of_imports.py").write_text(IMPORTED)
    torch.save(EvilPickle(), run / "evil")
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(Path("../..").resolve()))
    named = of_class(f"mine_of_imports.{path}", **({"f": "evil", "weights_only": False} if "load" in path else {}))
    with_settings(Path(), **{place: [named] if place == "callbacks" else named})
    message = refused(capsys, ["fit", "--resume", ".", "--epochs", "2", "--trust", "mine_of_imports"])
    assert f"names mine_of_imports.{path}, which" in message
    assert not Path("OPENED").exists()


class EvilPickle:
    """An object that touches a file when it is unpickled."""

    def __reduce__(self):
        return Path("OPENED").touch, ()


GROWING = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9))
TOO_MANY = {"aliases that grow": GROWING, "3,000 levels": f"seed: {'[' * 3000}{']' * 3000}", "no table": "[1, 2]"}


@pytest.mark.parametrize("text", TOO_MANY.values(), ids=TOO_MANY.keys())
def test_settings_are_counted_before_they_are_read(text, run, capsys):
    with_text(run, "config.yaml", text)
    assert "config.yaml: has more than" in refused(capsys, ["encode", str(run)]) or text == "[1, 2]"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"seed: {'9' * 5000}", "has a number of more than 1,000 characters; give a smaller one"),
        (f"seed: 0x{'f' * 5000}", "has a number of more than 1,000 characters; give a smaller one"),
        (f"seed: 1{':1' * 10**6}", "has a number of more than 1,000 characters; give a smaller one"),
        (f"seed: '1{':1' * 10**6}'", "has a number of more than 1,000 characters; give a smaller one"),
        (f"seed: !!int ' _1{':1' * 10**6}'", "has a number of more than 1,000 characters; give a smaller one"),
        (f"seed: 0x{'f' * 17}", "has an integer of more than 64 bits; give a smaller one"),
        (f"seed: {{a: [!!int '0x{'f' * 17}']}}", "has an integer of more than 64 bits; give a smaller one"),
        ("seed: 2001-99-99", "not the settings of a run (month must be in 1..12"),
        ("seed: 2001-01-01T00:00:00+99:99", "not the settings of a run (offset must be a timedelta"),
        ("seed: &a [*a]", "not the settings of a run (maximum recursion depth"),
        ("{[]: 1}", "not the settings of a run (while constructing a mapping"),
    ],
)
def test_values_that_python_cannot_make_are_refused(text, why, run, capsys):
    with_text(run, "config.yaml", text)
    assert why in refused(capsys, ["encode", str(run)])


def scheduled(name: str, **arguments) -> dict:
    return {"scheduler": of_class(f"torch.optim.lr_scheduler.{name}", **arguments)}


UNUSABLE = [
    scheduled("StepLR", step_size=0), scheduled("StepLR", step_size=3, last_epoch=5),
    scheduled("CosineAnnealingLR", T_max=0), scheduled("CyclicLR", base_lr=0.1, max_lr=0.2, step_size_up=0),
    scheduled("OneCycleLR", max_lr=0.1, total_steps=1), scheduled("ExponentialLR", gamma=1e300),
    scheduled("MultiStepLR", milestones=[1], gamma=1e308), scheduled("ExponentialLR", gamma=-1.0),
    {"optimizer": of_class("torch.optim.ASGD", t0=0, alpha=1e308, lambd=1e308)},
    {"device": "hpu"}, {"device": ""}, {"data": "x" * 5000}, {"data": "x" * 5000 + ".npy"}, {"data": "/x" * 5000},
]  # fmt: skip


@pytest.mark.parametrize("changed", UNUSABLE, ids=lambda changed: f"{changed!s:.90}")
def test_settings_that_only_training_would_refuse_are_refused_before_it(changed, run, capsys):
    shutil.rmtree(run / "checkpoints")
    with_settings(run, **changed)
    refused(capsys, ["fit", "--resume", str(run), "--epochs", "2"])


@pytest.mark.parametrize("read", [pv.data.load, pv.data.stream, pv.load])
@pytest.mark.parametrize("path", ["x" * 5000 + ".npy", "x\0y.npy", "/x" * 5000])
def test_paths_that_no_system_takes_are_refused(read, path):
    with pytest.raises(DataError, match="; "):
        read(path)


@pytest.mark.parametrize("sizes", [{"latent_dim": 10**9}, {"hidden": [10**9]}])
def test_networks_are_measured_before_they_are_made(sizes, run, capsys):
    with_settings(run, **sizes)
    assert "GiB of memory or more; the limit is 0.3 GiB" in refused(capsys, ["check", str(run)])


def test_a_description_is_measured_by_its_weights(finished, tmp_path):
    tree, about = read_tree(finished / "weights.safetensors")
    layer = tree["vae"]["made"]["arguments"]["encoder"]["module"]["arguments"]
    layer["net"] = {"module": {"class": "torch.nn.Linear", "arguments": {"in_features": 10**6, "out_features": 10**6}}}
    write_tree(tmp_path / "giant.safetensors", tree, about)
    with pytest.raises(
        DataError, match=r"the VAE cannot be rebuilt \(MemoryError: its tensors take 3725\.3 GiB of memory or more"
    ):
        pv.load(tmp_path / "giant.safetensors")


IDENTITY = {"module": {"class": "torch.nn.Identity", "arguments": {}}}


def encoder_of(layer, copies):
    arguments = {"encoder_layer": layer, "num_layers": copies, "enable_nested_tensor": False}
    return {"module": {"class": "torch.nn.TransformerEncoder", "arguments": arguments}}


@pytest.mark.parametrize("net", [encoder_of(IDENTITY, 10**6), encoder_of(encoder_of(IDENTITY, 5000), 5000)])
def test_modules_are_counted_before_they_are_copied(net, finished, tmp_path):
    tree, about = read_tree(finished / "weights.safetensors")
    tree["vae"]["made"]["arguments"]["encoder"]["module"]["arguments"]["net"] = net
    write_tree(tmp_path / "many.safetensors", tree, about)
    with pytest.raises(DataError, match=r"many\.safetensors: describes [0-9,]+ modules; the maximum is 10,000"):
        pv.load(tmp_path / "many.safetensors")


def test_values_of_a_header_are_counted_before_they_are_parsed(tmp_path, monkeypatch):
    write_tree(tmp_path / "many.safetensors", {"w": [[]] * 1000})
    monkeypatch.setattr("pyro_vae.train.checkpoint.tensor_file.MOST_VALUES", 1000)
    monkeypatch.setattr("pyro_vae.train.checkpoint.tensor_file.json.loads", None)
    with pytest.raises(DataError, match=r"many\.safetensors: has more than 1,000 values in its header"):
        read_tree(tmp_path / "many.safetensors")


def test_tensors_of_many_names_are_not_copied_without_end(tmp_path):
    one = torch.zeros(2**18)
    write_tree(tmp_path / "names.safetensors", {f"n{i}": one for i in range(400)})
    with pytest.raises(DataError, match=r"names\.safetensors: .*names 0\.4 GiB of tensors, but stores 0\.0"):
        read_tree(tmp_path / "names.safetensors")


@pytest.mark.parametrize("description", [[1], "x", {}, {"made": [[]]}, {"made": {"class": "os.system"}}, None, 7])
def test_a_description_of_no_vae_is_refused(description, finished, tmp_path):
    tree, about = read_tree(finished / "weights.safetensors")
    write_tree(tmp_path / "odd.safetensors", {**tree, "vae": description}, about)
    with pytest.raises(DataError, match=r"odd\.safetensors: "):
        pv.load(tmp_path / "odd.safetensors")
    del tree["vae"]
    write_tree(tmp_path / "odd.safetensors", tree, about)
    with pytest.raises(DataError, match="contains only weights"):
        pv.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(number, finished, tmp_path):
    tree, about = read_tree(finished / "weights.safetensors")
    name = next(name for name in tree if name.endswith("weight"))
    tree[name] = torch.full_like(tree[name], number)
    write_tree(tmp_path / "odd.safetensors", tree, about)
    with pytest.raises(DataError, match="is not finite; train again"):
        pv.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("unit", [np.inf, np.nan, 0.0, -1.0])
def test_units_are_finite_and_above_0(unit, finished, run, capsys):
    def change(tree, _):
        next(value for name, value in tree.items() if name.endswith("encoder.standardize.unit")).fill_(unit)

    change_weights(run, change)
    assert "encoder.standardize.unit is not " in refused(capsys, ["encode", str(run), "--out", "latents.csv"])
    with pytest.raises(DataError, match=r"standardize\.unit is not "):
        pv.load(run / "weights.safetensors", into=pv.load(finished))


def change_weights(run: Path, change) -> None:
    """Write a weights file again with its sums, as a stranger can."""
    tree, about = read_tree(run / "weights.safetensors")
    change(tree, about)
    write_tree(run / "weights.safetensors", tree, about)
    record_checksum(run, "weights.safetensors", compute_checksum(run / "weights.safetensors"))


ODD = {
    "a deep fingerprint": {"trained_on": "[" * 10**5},
    "a fingerprint of another type": {"trained_on": 7},
    "a step of text": {"step": "abc"},
    "a list of steps": {"step": [1]},
    "versions of text": {"versions": "x"},
}
ODD |= {f"a share of {n}": {"twins": n} for n in (10**400, 2, -1, np.nan, "x")}
ODD |= {f"hashes that are {n}": {"whole": n} for n in ("x", [1], 7)}


@pytest.mark.parametrize("changed", ODD.values(), ids=ODD.keys())
def test_what_a_weights_file_says_of_itself_is_read_or_refused(changed, run, capsys):
    def change(tree, about):
        if {*changed} & {"twins", "whole"}:
            changed_text = json.dumps(json.loads(about["trained_on"]) | changed)
            about["trained_on"] = changed_text
        else:
            about.update(changed)

    change_weights(run, change)
    assert "weights.safetensors: " in refused(capsys, ["encode", str(run), "--out", "latents.csv"])


def test_the_version_of_a_refused_description_is_text_or_left_out(run):
    def change(tree, about):
        tree["vae"]["made"]["class"] = "os.system"
        about["versions"] = "x"

    change_weights(run, change)
    with pytest.raises(DataError, match="its versions is a str"):
        pv.load(run)


def test_a_vae_is_loaded_in_a_process_that_has_made_none(finished):
    """Its classes lie in modules that are imported on first use."""
    code = "import sys, pyro_vae as pv; print(type(pv.load(sys.argv[1]).prior).__name__)"
    done = subprocess.run([sys.executable, "-c", code, str(finished)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "StandardNormal", done.stderr


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def giant(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


FILES = {
    "config.yaml": "fit --resume", "SHA256SUMS": "fit --resume", ".lock": "fit --resume",
    "weights.safetensors": "sample --run", "history.nc": "check --run",
}  # fmt: skip


@pytest.mark.parametrize("make", [fifo, device, link, giant])
@pytest.mark.parametrize("name", FILES)
def test_files_of_a_run_folder_are_files_of_their_size(name, make, run, capsys):
    if (name, make) == (".lock", giant):
        pytest.skip("a lock is never read")
    (run / name).unlink(missing_ok=True)
    make(run / name)
    assert f"{run}/{name}: " in refused(capsys, [*FILES[name].split(), str(run)])


@pytest.mark.parametrize("text", ["[" * 10**5 + "]" * 10**5, "[1]", "null", b"\xff\xfe\x00"], ids=range(4))
def test_a_note_of_how_a_run_was_begun_is_read_or_refused(text, run, capsys):
    shutil.rmtree(run / "checkpoints")
    with_text(run, "run.json", text)
    assert "run.json: " in refused(capsys, ["fit", "--resume", str(run), "--epochs", "2"])


def test_a_linked_folder_of_checkpoints_is_left_alone(run, capsys):
    outside = shutil.move(run / "checkpoints", "outside")
    before = sorted(Path(outside).iterdir())
    (run / "checkpoints").symlink_to(Path(outside).resolve())
    assert "checkpoints: is a link, not a file" in refused(capsys, ["fit", "--resume", str(run), "--epochs", "2"])
    assert sorted(Path(outside).iterdir()) == before
    with pytest.raises(DataError, match="checkpoints: is a symbolic link"):
        Checkpoints(run).write(9, {}, {})


def test_no_lock_is_made_outside(run, capsys):
    (run / ".lock").symlink_to(Path("outside").resolve())
    refused(capsys, ["fit", "--resume", str(run), "--epochs", "2"])
    assert not Path("outside").exists()


def test_an_oversized_checkpoint_falls_back_to_the_one_before(run):
    told: list[str] = []
    newest = Checkpoints(run).newest()
    giant(run / "checkpoints" / "step-000999999.safetensors")
    assert Checkpoints(run, say=told.append).newest()[0] == newest[0]
    assert "step-000999999.safetensors: is damaged" in told[0]


def plant_history(run: Path, change) -> None:
    with h5py.File(run / "history.nc", "a") as file:
        change(file)
    record_checksum(run, "history.nc", compute_checksum(run / "history.nc"))


def test_a_history_that_leads_to_another_file_is_refused(run, capsys):
    def lead(file):
        del file["step"]
        file["step"] = h5py.ExternalLink("/etc/hostname", "x")

    plant_history(run, lead)
    assert "history.nc: 'step' links to another file" in refused(capsys, ["check", str(run)])


def test_a_history_is_measured_before_it_is_read(run, capsys):
    plant_history(
        run, lambda file: file.create_dataset("many", (2 * 10**9,), "f8", chunks=(10**6,), compression="gzip")
    )
    assert "to 14.9 GiB, more than 100 times as much" in refused(capsys, ["check", str(run)])


EPOCHS = 3
TEXT = ("epoch", np.array(["x"] * EPOCHS))
HISTORIES = {
    "an ELBO of text": {"train_elbo": TEXT},
    "a validation ELBO of text": {"validation_elbo": TEXT},
    "an ELBO of two dimensions": {"train_elbo": (("epoch", "k"), np.zeros((EPOCHS, 2)))},
    "an ELBO of none": {"validation_elbo": ((), 3.0)},
    "epochs of text": {"epoch": TEXT},
    "epochs of fractions": {"epoch": ("epoch", np.arange(EPOCHS) + 0.5)},
    "a chosen epoch of text": {"weights_epoch": "x"},
    "no ELBO to fall from": {"validation_elbo": None},
    "no errors of a fall": {"validation_below_best_se": None},
    "values only": {"train_elbo": None, "value": ("epoch", np.zeros(EPOCHS))},
}


@pytest.mark.parametrize("changed", HISTORIES.values(), ids=HISTORIES.keys())
def test_a_history_of_another_kind_is_refused(changed, run, capsys):
    names = "objective", "train_elbo", "validation_elbo", "validation_below_best", "validation_below_best_se", "seconds"
    columns = {name: ("epoch", np.linspace(-2.0, -1.0, EPOCHS)) for name in names}
    kept = changed.get("weights_epoch", 0)
    columns |= {name: values for name, values in changed.items() if name not in ("epoch", "weights_epoch")}
    columns = {name: values for name, values in columns.items() if values is not None}
    epochs = changed.get("epoch", ("epoch", np.arange(1, EPOCHS + 1)))
    history = xr.Dataset(columns, {"epoch": epochs}, {"weights_epoch": kept})
    history.to_netcdf(run / "history.nc", engine="h5netcdf")
    record_checksum(run, "history.nc", compute_checksum(run / "history.nc"))
    assert "history.nc: not the history of a run" in refused(capsys, ["check", str(run), "--rows", "2"])


def test_held_out_data_that_are_rows_of_a_stream_are_refused(run, capsys):
    zarr = pytest.importorskip("zarr")
    zarr.save_array("x.zarr", X)
    np.save("x.npy", X[:9])
    message = refused(
        capsys, ["fit", "--data", "x.zarr", "--out", "out", "--epochs", "1", "--validation_data", "x.npy"]
    )
    assert "x.npy: 9 of its 9 rows" in message


def test_held_out_data_that_are_training_data_are_refused(run, capsys):
    np.save("x.npy", X)
    np.save("some.npy", np.concatenate([X[:2], X[:20] + 1]))
    settings = ["fit", "--data", "x.npy", "--out", "out", "--epochs", "1", "--hidden", "[4]", "--engine", "eager"]
    message = refused(capsys, [*settings, "--validation_data", "x.npy"])
    assert "x.npy: 60 of its 60 rows (the first is row 0, counted from 0), are training data; give" in message
    assert not Path("out").exists()
    assert main([*settings, "--validation_data", "some.npy"]) == 0
    assert "some.npy: 2 of its 22 rows" in capsys.readouterr().err
