"""References that the tests compare the library with: written from the papers, in NumPy, SciPy, mpmath and torch alone."""
