"""ArviZ, by one name: 0.23 (the last for Python 3.11) keeps the new interface in ``arviz.preview``, 1.x is it."""

try:
    from arviz import preview as az
except ImportError:
    import arviz as az
from arviz_stats.base import array_stats

__all__ = ["array_stats", "az"]
