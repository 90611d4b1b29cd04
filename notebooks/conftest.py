"""The test run executes the notebooks, in small settings and with warnings as errors."""

import os

os.environ["PYRO_VAE_QUICK"] = "1"  # the kernels inherit both
os.environ["PYTHONWARNINGS"] = "error::UserWarning,error::FutureWarning,error::RuntimeWarning"
collect_ignore = ["conftest.py"]  # for doctests: there is another conftest.py beside the tests
