"""Two processes against one: the same gradient, and what is told when one of them goes wrong."""

import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import parallel_checks
from helpers.checks import linear_gaussian
from helpers.members import ESTIMATORS as OWN
from helpers.members import OBJECTIVES
from helpers.parallel_checks import ESTIMATORS, FallingApart, every, gradients, misbehaving, of_all
from pyro.infer import RenyiELBO

import pyro_vae as pv
from pyro_vae.cli import fit_command, main
from pyro_vae.errors import DataError, ModelError, ProcessError, SettingsError
from pyro_vae.train.distributed import group
from pyro_vae.train.distributed import launch as worker
from pyro_vae.train.distributed.group import Group, joined, launched, reraise_lost_peer
from pyro_vae.train.distributed.launch import forward_signals, launch
from pyro_vae.train.distributed.reduce import validate_distributable

HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def launched_once(tmp_path_factory):
    """What two processes found of everything, and what differs here after them."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", None)
        before = _around(folder)
        found = launch(2, of_all, every, torch.zeros(9), shared={"table": torch.zeros(9)})
        return found, before, _around(folder)


def _around(folder):
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    return launched(), signals, timers, list(folder.glob("pyro-vae*"))


@pytest.fixture(scope="module")
def two(launched_once):
    """What two processes found of everything."""
    return launched_once[0]


def test_two_processes_have_the_gradient_of_one(two):
    """Of the same global batches, of n/m that is not 1, the last uneven, clipped or not, to rounding."""
    for norm in (None, 30.0):
        one = gradients(Group(), norm)
        for clipped, *_ in two:
            for name in ESTIMATORS:
                losses, found, counted = clipped[norm][name]
                own_losses, own, own_counted = one[name]
                assert losses == pytest.approx(own_losses, rel=1e-12), name
                assert (found - own).norm(dim=1).max() < 1e-12 * own.norm(dim=1).max(), name
                assert counted == own_counted, name
                if norm is not None:
                    assert own.norm(dim=1).tolist() == pytest.approx([norm] * len(own), rel=1e-6), "it was clipped"
                else:
                    assert own.norm(dim=1).min() > 31, "there is something to clip"


def test_a_process_without_rows_adds_nothing(two):
    """The last batch has one row: that of the first process."""
    one = gradients(Group(), None, 17)
    for _, found, *_ in two:
        for name in ESTIMATORS:
            assert found[name][0] == pytest.approx(one[name][0], rel=1e-12), name
            assert (found[name][1] - one[name][1]).norm(dim=1).max() < 1e-12 * one[name][1].norm(dim=1).max(), name
            assert found[name][2] == one[name][2] == (3 if name == "Beta" else 0), "steps are counted there too"


def test_epochs_of_two_processes_are_those_of_one(two):
    for rows, place in ((parallel_checks.ROWS, 0), (17, 1)):
        losses, parameters, _ = parallel_checks.along(Group(), "eager", 3, rows)
        for _, _, eager, *_ in two:
            assert eager[place][0] == pytest.approx(losses, rel=1e-10)
            assert (eager[place][1] - parameters).norm() < 1e-10 * parameters.norm()


def test_parameters_are_equal_to_the_bit_and_noise_is_not(two):
    for (first, parameters), (second, others) in [found[4] for found in two]:
        assert torch.equal(parameters, others)
        assert not torch.equal(first, second)
        torch.manual_seed(Group().seed(4))
        assert torch.equal(first, torch.randn(3)), "the first draws what one alone draws"


def test_wishes_are_known_to_all_after_the_same_step(two):
    """The second process wants to stop before the third step; the first a checkpoint, always."""
    assert [found[3] for found in two] == [[(False, True), (False, True), (True, True)]] * 2


def test_both_are_rolled_back_where_one_was_broken(two):
    """To the same weights, with the noise of each its own."""
    for found in two:
        (first, divergences, epochs, noise), (second, others, more, other_noise) = found[7]
        assert torch.equal(first, second)
        assert first.isfinite().all()
        assert (divergences, epochs) == (others, more) == (1, 3)
        assert not torch.equal(noise, other_noise)


def test_processes_that_fall_apart_are_told_of(two):
    for found in two:
        (apart, elsewhere), spread, agreed = found[5]
        assert apart.startswith("other differs between process 1 and process 0")
        assert elsewhere in ("no compiler here", "process 1: no compiler here")
        assert spread == [[0.0, 0.0], [0.0, 0.0]]
        assert agreed == 0


@pytest.mark.slow
@pytest.mark.parametrize("rows", [parallel_checks.ROWS, 17])
def test_compiled_steps_of_two_processes_are_those_of_one(rows):
    losses, parameters, _ = parallel_checks.along(Group(), "eager", 3, rows)
    for found, own, used in launch(2, of_all, parallel_checks.along, "compiled", 3, rows):
        assert used == "compiled"
        assert found == pytest.approx(losses, rel=1e-9)
        assert (own - parameters).norm() < 1e-9 * parameters.norm()


# --- What cannot be spread ---

TWO = Group(0, 2)


@pytest.mark.parametrize(
    "loss",
    [
        pv.elbo.Beta(pv.elbo.TCVAE(pv.elbo.ELBO())),
        pv.elbo.InfoVAE(pv.elbo.ELBO()),
        pv.elbo.FreeBits(pv.elbo.ELBO()),
        RenyiELBO(num_particles=2),
    ],
)
def test_what_couples_the_data_of_a_batch_is_refused(loss):
    vae = parallel_checks.vae()
    with pytest.raises(ModelError, match="couples the data of a batch"):
        validate_distributable(vae, loss, 8, TWO)
    validate_distributable(vae, loss, 8, Group())


def test_estimators_that_couple_are_those_whose_batches_do_not_add_up():
    """Of every estimator of the library: a batch's bound is the mean of its halves', unless it says otherwise."""
    vae, x = parallel_checks.vae(), parallel_checks.data(8)
    for name, make in {**OWN, **OBJECTIVES}.items():
        if name not in ("VIMCO", "ScoreFunction", "Thermodynamic", "MIWAE", "PIWAE", "CIWAE"):  # which draw otherwise
            losses = [make()]
            if name == "FreeBits":  # a floor between the halves' means
                losses = [pv.elbo.FreeBits(pv.elbo.AnalyticKL(), nats / 50) for nats in range(100)]
            assert any(_couples(loss, vae, x) for loss in losses) == losses[0].couples_data, name


def _couples(loss, vae, x):
    whole, *halves = (float(loss.loss(vae.model, vae.guide, part, 90)) for part in (x, *x.split(4)))
    return abs(sum(halves) / 2 / whole - 1) > 1e-9


def test_batch_norm_and_batches_of_too_few_rows_are_refused():
    vae = parallel_checks.vae()
    vae.encoder.net = torch.nn.Sequential(torch.nn.BatchNorm1d(6), vae.encoder.net)
    with pytest.raises(ModelError, match=r"guide\.encoder\.net\.0 is a BatchNorm1d, .* use LayerNorm"):
        validate_distributable(vae, pv.elbo.ELBO(), 8, TWO)
    validate_distributable(vae.eval(), pv.elbo.ELBO(), 8, TWO)
    with pytest.raises(SettingsError, match="batch_size is 1, but 2 processes share each batch"):
        validate_distributable(parallel_checks.vae(), pv.elbo.ELBO(), 1, TWO)


def test_parts_are_as_even_as_they_go():
    for m in range(1, 20):
        parts = [Group(rank, 3).part(torch.arange(m)) for rank in range(3)]
        assert torch.cat(parts).tolist() == list(range(m))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        order = torch.randperm(5 * m)
        for rank in range(3):
            own, size = Group(rank, 3).parts(order, m)
            assert torch.equal(own, torch.cat([Group(rank, 3).part(batch) for batch in order.split(m)]))
            assert size == len(parts[rank])


# --- Starting and stopping ---


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        pytest.param(
            "dies",
            ProcessError,
            r"process 1 of 2 was ended by SIGKILL, .* others were stopped; resume from the last",
            marks=pytest.mark.slow,
        ),
        ("refuses", DataError, "there is no row 3"),
        pytest.param(
            "has a bug", ProcessError, "process 1 of 2 ended with exit code 1 .*a bug", marks=pytest.mark.slow
        ),
    ],
)
def test_one_that_goes_wrong_stops_all(how, kind, message, capfd):
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        launch(2, misbehaving, how)
    assert time.monotonic() - started < 40, "nobody waits for the dead"
    assert not [one for one in threading.enumerate() if isinstance(one, threading.Timer) and not one.finished.is_set()]
    if how != "has a bug":
        assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_all_within_seconds_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(
        "import test_parallel as t, pyro_vae as pv\n"
        "if __name__ == '__main__':\n"
        "    settings = {**t.SETTINGS, 'epochs': 10**6}\n"
        "    print(pv.fit(t.digits_vae(), t.digits()[0], devices=2, checkpoints='run', **settings).interrupted)\n"
    )
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = run("script.py", cwd=tmp_path)
    while not (tmp_path / "run").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    processes = [process.pid, *_children(process.pid)]
    ports = _listening(processes)
    assert ports
    assert list(temporary.glob("pyro-vae-*"))
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.communicate(timeout=300) == ("True\n", "")
    assert time.monotonic() - started < 20, "10 s on a machine with nothing else to do"
    assert not any(map(_lives, processes))
    assert not list(temporary.glob("pyro-vae-*"))
    assert not ports & _listening()


def _listening(processes=None):
    """The local addresses that processes, or all processes, listen at."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    links = [link for one in processes or [] for link in Path(f"/proc/{one}/fd").iterdir()]
    sockets = {os.readlink(link) for link in links if link.is_symlink()}
    return {row[1] for row in rows if row[3] == "0A" and (processes is None or f"socket:[{row[9]}]" in sockets)}


def test_processes_know_who_they_are_and_leave_nothing_behind(launched_once):
    two, before, after = launched_once
    for rank, found in enumerate(two):
        assert found[6] == (True, 1, str(rank), "2", (False, True)), "weights are its own, and tables are not copied"
    assert after == before


IGNORES = (
    "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path('ready').touch(); "
    "time.sleep(60)"
)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_workers_that_ignore_a_signal_are_killed_and_no_other_process_is(signals, tmp_path, monkeypatch, request):
    """After a while, and by a second signal at once; then the program's own handler is called."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    monkeypatch.setattr("pyro_vae.train.distributed.launch.ENDING", 0.5 if signals == 1 else 60.0)
    monkeypatch.chdir(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    other = spawn.Process(target=time.sleep, args=(60,))
    other.start()
    with forward_signals(1) as received:
        hang = spawn.Process(target=os.execv, args=(sys.executable, [sys.executable, "-c", IGNORES]))
        hang.start()
        while not Path("ready").exists():
            time.sleep(0.05)
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        hang.join(0.2)
        assert hang.is_alive()
        if signals == 2:
            os.kill(os.getpid(), signal.SIGINT)
        hang.join(20)
    assert hang.exitcode == -signal.SIGKILL
    assert time.monotonic() - started < 20
    assert len(received) == 2
    assert heard == [signal.SIGTERM]
    assert other.is_alive()
    other.kill()
    other.join()


def test_a_worker_that_starts_after_the_signal_ends_too():
    late = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    with forward_signals(1):
        os.kill(os.getpid(), signal.SIGINT)
        late.start()
        late.join(20)
        late.kill()
        late.join()
    assert late.exitcode == -signal.SIGTERM


def test_a_signal_while_a_worker_imports_its_function_ends_the_worker(monkeypatch):
    """Torch would wait for the result of a worker that ends with KeyboardInterrupt."""
    monkeypatch.setattr(worker.os, "setpgid", lambda *_: None)
    monkeypatch.setattr(worker.atexit, "register", lambda *_: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="130"):
        worker._work(pickle.dumps((Interrupted(), ())), {}, torch.get_num_threads())


class Interrupted:
    def __reduce__(self):
        return signal.raise_signal, (signal.SIGINT,)


@pytest.mark.slow
def test_processes_that_wait_for_each_other_end_by_a_second_signal(tmp_path):
    (tmp_path / "script.py").write_text(
        "from helpers import parallel_checks\n"
        "from pyro_vae.train.distributed.launch import launch\n"
        "if __name__ == '__main__':\n"
        "    launch(2, parallel_checks.misbehaving, 'waits')\n"
    )
    hang = run("script.py", cwd=tmp_path)
    assert hang.stdout.readline() == "waiting\n"
    for _ in range(2):
        hang.send_signal(signal.SIGINT)
        time.sleep(1)
    started = time.monotonic()
    _, err = hang.communicate(timeout=300)
    assert time.monotonic() - started < 20
    assert "KeyboardInterrupt: the processes were killed; resume from the last checkpoint" in err


@pytest.mark.slow
def test_workers_end_with_the_process_that_launched_them(tmp_path):
    (tmp_path / "script.py").write_text(
        "import test_parallel as t, pyro_vae as pv\n"
        "if __name__ == '__main__':\n"
        "    pv.fit(t.digits_vae(), t.digits()[0], devices=2, checkpoints='run', **{**t.SETTINGS, 'epochs': 10**6})\n"
    )
    process = run("script.py", cwd=tmp_path)
    while not (tmp_path / "run").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 40
    while any(map(_lives, children)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(_lives, children))


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Unsendable(list):
    """Rows that hold what pickle refuses."""

    def __init__(self, rows):
        super().__init__(rows)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 0}, "devices is 0; it must be a whole number of at least 1"),
        (
            {"optimizer": lambda p: torch.optim.Adam(p)},
            r"the arguments cannot be sent to workers .*lambda.* functools\.partial",
        ),
        ({"data": Unsendable(torch.zeros(9, 6).tolist())}, "the arguments cannot be sent .*lock"),
        ({"data": torch.zeros(9, 6, requires_grad=True) + 1}, "the arguments cannot be sent .*requires_grad"),
    ],
    ids=["devices", "settings", "data", "graph"],
)
def test_arguments_that_workers_cannot_get_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        pv.fit(parallel_checks.vae(), **{"data": torch.zeros(9, 6), "devices": 2, **settings})
    assert not multiprocessing.active_children()


def test_a_worker_that_imports_the_script_starts_no_workers(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(
        SettingsError, match="workers import this script; move the code that starts them under if __name__ =="
    ):
        launch(2, print)


def run(*arguments, cwd, **kwargs):
    """Python, with what a checkout needs to find the library."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), str(HERE / "train")])
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, **kwargs,
    )  # fmt: skip


@pytest.mark.slow
def test_a_script_without_a_guard_and_a_class_of_a_console_get_a_sentence(tmp_path):
    (tmp_path / "script.py").write_text(
        "import pyro_vae as pv; from helpers import parallel_checks\n"
        "pv.fit(parallel_checks.vae(), parallel_checks.data(), devices=2, batch_size=8)\n"
    )
    _, err = run("script.py", cwd=tmp_path).communicate(timeout=300)
    assert "SettingsError: devices: workers import this script; move the code that starts them under if __name__" in err
    assert "ended with exit code 1 (before it started; its output gives the reason)" in err.splitlines()[-1]
    console = (
        "import pyro_vae as pv; from helpers import parallel_checks\n"
        "class Own(pv.elbo.ELBO): pass\n"
        "pv.fit(parallel_checks.vae(), parallel_checks.data(), devices=2, batch_size=8, elbo=Own())\n"
    )
    _, err = run("-c", console, cwd=tmp_path).communicate(timeout=300)
    assert re.search(
        "SettingsError: a worker cannot import an argument .*Own.*; define it in a module", err.splitlines()[-1]
    )


# --- fit ---


def digits():
    from sklearn.datasets import load_digits

    x = (torch.as_tensor(load_digits().data) > 8).float()
    return x[:1500], x[1500:]


def digits_vae():
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(8),
        decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(8, [64], 64)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [64], 16)),
    )


SETTINGS = {"epochs": 15, "batch_size": 60, "progress": False, "device": "cpu", "engine": "eager"}


@pytest.mark.slow
def test_a_run_of_two_processes_reaches_the_elbo_of_one(tmp_path):
    """Half the noise is drawn by another; the initial weights are 30 nats away."""
    x, held_out = digits()
    elbos, vaes = [], []
    for devices in (1, 2):
        vaes.append(digits_vae())
        came = pv.fit(
            vaes[-1], x, validation_data=held_out, devices=devices, checkpoints=tmp_path / str(devices), **SETTINGS
        )
        elbos.append(pv.train.per_datum_elbo(vaes[-1], held_out, num_particles=20))
        assert came.vae is vaes[-1]
        assert came.history.attrs["processes"] == devices
        assert came.history.sizes["epoch"] == 15
        assert vaes[-1].trained_on is not None
    apart = elbos[0] - elbos[1]
    assert abs(apart.mean()) < max(5 * apart.std() / len(apart) ** 0.5, 0.4)
    assert elbos[1].mean() > -26.5
    more = {**SETTINGS, "epochs": 17}
    came = pv.fit(digits_vae(), x, validation_data=held_out, devices=1, resume=tmp_path / "2", **more)
    assert came.history.sizes["epoch"] == 17, "another number of processes goes on from there"


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_bit(tmp_path):
    """SIGTERM to the first process alone: all end after the same step, with a checkpoint."""
    code = (
        "import signal, sys, torch, pyro_vae as pv, test_parallel as t\n"
        "if __name__ == '__main__':\n"
        "    vae = t.digits_vae()\n"
        "    kept = {sys.argv[1]: 'run'}\n"
        "    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that fit returns\n"
        "    came = pv.fit(vae, t.digits()[0], devices=2, **{**t.SETTINGS, 'epochs': int(sys.argv[2])}, **kept)\n"
        "    torch.save(vae.state_dict(), sys.argv[1] + '.pt')\n"
        "    print(came.interrupted, came.history.sizes['epoch'])\n"
    )
    (tmp_path / "script.py").write_text(code)
    stopped = run("script.py", "checkpoints", "30", cwd=tmp_path)
    folder = tmp_path / "run"
    deadline = time.monotonic() + 300
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=300)
    assert out.startswith("True"), (out, err)
    assert err == ""
    steps = [int(re.search(r"\d+", path.name)[0]) for path in (folder / "checkpoints").iterdir()]
    assert 0 < max(steps) < 30 * 25, "it was stopped on its way"
    out, err = run("script.py", "resume", "30", cwd=tmp_path).communicate(timeout=300)
    assert out == "False 30\n", err
    whole = digits_vae()
    pv.fit(whole, digits()[0], devices=2, **{**SETTINGS, "epochs": 30})
    resumed = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.state_dict().items())


@pytest.mark.slow
def test_a_buffer_that_drifts_is_told_of():
    vae = parallel_checks.vae(torch.float32, FallingApart)
    with pytest.raises(ProcessError, match=r"guide\.encoder\.seen differs between process 1"):
        pv.fit(vae, parallel_checks.data(dtype=torch.float32), devices=2, **{**SETTINGS, "epochs": 1, "batch_size": 8})


def test_a_divergence_comes_back_with_the_last_good_weights(monkeypatch):
    """What a process gives is made and sent as processes do it, in this one."""

    def here(_, function, *args, shared):
        monkeypatch.setattr(sys.modules["pyro_vae.train.fit"], "launched", lambda: True)
        args = pickle.loads(pickle.dumps(args))  # noqa: S301
        return pickle.loads(pickle.dumps(function(*args, **shared)))  # noqa: S301

    monkeypatch.setattr("pyro_vae.train.distributed.launch.launch", here)
    vae, x = digits_vae(), digits()[0]
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(pv.errors.DivergenceError, match="the VAE now has its initial weights") as told:
        pv.fit(vae, x[:120], devices=2, optimizer=partial(torch.optim.SGD, lr=1e12), **{**SETTINGS, "epochs": 1})
    assert told.value.history is not None
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@pytest.mark.slow
def test_weights_that_one_process_alone_has_broken_end_all():
    """All look for where it came from by the same steps: otherwise each waits for the other."""
    made, x = parallel_checks.vae(torch.float32), parallel_checks.data(60, torch.float32)
    with pytest.raises(pv.errors.DivergenceError, match="the VAE now has its initial weights"):
        pv.fit(made, x, devices=2, callbacks=[parallel_checks.BreaksOne()], **{**SETTINGS, "batch_size": 8})


@pytest.mark.slow
def test_the_command_trains_under_torchrun_and_by_devices_and_one_process_writes(tmp_path, monkeypatch, capfd):
    np.save(tmp_path / "data.npy", linear_gaussian().sample(300).numpy())
    flags = ["fit", "--data", "data.npy", "--out", "run", "--epochs", "2", "--hidden", "[4]", "--latent_dim", "2"]
    monkeypatch.chdir(tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pyro_vae"]
    out, err = (process := run(*torchrun, *flags, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("Written to run") == 1
    assert err.count("Training on 2 processes") == 1
    assert main(["fit", "--resume", "run", "--epochs", "3", "--devices", "2"]) == 0
    err = capfd.readouterr().err
    assert "Resuming from step 4 of run" in err
    assert err.count("Training on 2 processes") == 1
    assert "Traceback" not in err
    monkeypatch.setattr(fit_command, "launch", lambda *_: pytest.fail("processes were started for nothing"))
    assert main([*flags, "--devices", "2"]) == 2
    assert capfd.readouterr().err.startswith("pyro-vae: run: already holds")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_under_torchrun_the_one_that_was_killed_is_named(lost, tmp_path, monkeypatch):
    """All end within seconds; what torchrun itself says is its own."""
    np.save(tmp_path / "data.npy", linear_gaussian().sample(300).numpy())
    flags = ["fit", "--data", "data.npy", "--out", "run", "--epochs", "100000", "--hidden", "[4]", "--latent_dim", "2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pyro_vae"]
    process = run(*torchrun, *flags, "--engine", "eager", cwd=tmp_path)
    while not (tmp_path / "run" / "config.yaml").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(1)
    ranks = sorted((_rank(child), child) for child in _children(process.pid) if _rank(child))
    assert [rank for rank, _ in ranks] == ["0", "1"]
    os.kill(ranks[lost][1], signal.SIGKILL)
    started = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert time.monotonic() - started < 40, "10 s on a machine with nothing else to do"
    assert f"pyro-vae: process {lost} of 2 died; resume from the last checkpoint" in err
    assert not any(_lives(child) for _, child in ranks)


def _children(process):
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _rank(process):
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((one.removeprefix(b"RANK=").decode() for one in variables if one.startswith(b"RANK=")), "")


def test_the_lost_process_is_the_one_that_does_not_live(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as torchrun's before it looks
    here = socket.gethostname()
    monkeypatch.setattr(group, "_PEERS", [(here, os.getpid()), (here, ended.pid), ("elsewhere", ended.pid)])
    with pytest.raises(ProcessError, match="process 1 of 3 died; resume from the last checkpoint"), reraise_lost_peer():
        raise RuntimeError("Connection closed by peer")
    ended.wait()
    assert group._lost_ranks(0.0) == [1]
    monkeypatch.setattr(group, "_PEERS", [(here, os.getpid()), ("elsewhere", 1)])
    assert group._lost_ranks(0.0) == []


def test_alone_nothing_is_started():
    with joined(torch.device("cpu")) as group:
        assert group.alone
        assert group.broadcast("a") == "a"
        assert group.all_gather(3) == [3]
    assert not torch.distributed.is_initialized()
