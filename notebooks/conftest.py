"""The test run executes the notebooks, in small settings and with warnings as errors."""

import pytest

# For doctests, which would take this file and the tests' conftest.py for one module.
collect_ignore = ["conftest.py"]

ENVIRONMENT = {
    "PYRO_VAE_QUICK": "1",
    "PYTHONWARNINGS": "error::UserWarning,error::FutureWarning,error::RuntimeWarning",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The kernel of a notebook of this folder inherits the environment; other tests do not see it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        return (yield)
