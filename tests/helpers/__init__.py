"""Second implementations that the tests compare the library with, written from the papers.

They import NumPy, mpmath and torch, and neither the library nor Pyro.
"""
