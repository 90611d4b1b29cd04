"""Benchmarks, each a command: ``python -m benchmarks.train``, ``.growth``, ``.stream``, ``.burda``; ``make bench``."""
