"""The interface of ArviZ 1.x, which version 0.23 (the last for Python 3.11) offers as ``arviz.preview``."""

try:
    from arviz import preview as az
except ImportError:
    import arviz as az
from arviz_stats.base import array_stats

__all__ = ["array_stats", "az"]
