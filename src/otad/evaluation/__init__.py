"""One model, one test set, several budgets, many attacks -> Report."""

from otad.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
