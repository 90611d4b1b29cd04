"""Every test starts from one seed and an empty parameter store, and leaves global state as it found it."""

import io
import signal
from pathlib import Path

import pyro
import pytest
import torch
import zuko  # noqa: F401
from matplotlib.figure import Figure
from PIL import Image

# Importing zuko switches the validation of all distributions off; tests want it as torch has it.
torch.distributions.Distribution.set_default_validate_args(True)

# A shell's job in the background ignores Ctrl-C, and so do the processes that it starts; tests want Python's handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where there is no such device, torch keeps the stack of each seeding for the day there is one: 0.6 ms each time.
for devices in (torch.cuda, torch.xpu, torch.mtia):
    if not devices.is_available():
        devices.manual_seed_all = lambda seed: None

# For doctests, which would take this file and the notebooks' conftest.py for one module.
collect_ignore = ["conftest.py"]

# MNIST lies beside a developer's checkout, not in the project.
MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"


def global_state() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "validation": torch.distributions.Distribution._validate_args,
        "Pyro's validation": pyro.infer.util.is_validation_enabled(),
        "Pyro's handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "interrupt handler": signal.getsignal(signal.SIGINT),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def clean_slate():
    pyro.clear_param_store()
    torch.manual_seed(0)
    before = global_state()
    yield
    after = global_state()
    assert after == before, "the test left global state changed"


def blank_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def save_blank(figure: Figure, place: object, **settings: object) -> None:
    if isinstance(place, io.BytesIO):
        place.write(blank_png())
    else:
        Path(place).write_bytes(blank_png())


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """Figures are built but not rendered, which takes most of the time of a small ``fit``, but for tests marked so."""
    if "renders" not in request.keywords:
        monkeypatch.setattr(Figure, "savefig", save_blank)


@pytest.fixture(scope="session")
def mnist() -> Path:
    if not MNIST.is_dir():
        pytest.skip("MNIST is not beside this checkout (shared/data/mnist)")
    return MNIST


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda")
