"""Benchmarks, each one command: ``python -m benchmarks.train``, ``.growth`` and ``.burda``; see ``make bench``."""
