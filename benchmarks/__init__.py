"""Benchmarks, each one command: ``python -m benchmarks.train``, ``.growth``, ``.stream`` and ``.burda``; see ``make bench``."""
