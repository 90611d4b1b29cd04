"""Compare estimators of the evidence, models and training runs."""
