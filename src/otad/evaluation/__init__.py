"""One model, one test set, several budgets, many attacks -> Report."""

from otad.evaluation.evaluate import evaluate, package_versions

__all__ = ["evaluate", "package_versions"]
