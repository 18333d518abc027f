"""A whole job: train, interpolate, certify, attack, report; and a trained model on new data."""

from otad.runs.job import health_without_transport, run
from otad.runs.model_folder import DataCard, read_model, write_model
from otad.runs.outputs import write_outputs
from otad.runs.use import ExplanationRow, attack_model, explanation_rows

__all__ = [
    "DataCard",
    "ExplanationRow",
    "attack_model",
    "explanation_rows",
    "health_without_transport",
    "read_model",
    "run",
    "write_model",
    "write_outputs",
]
