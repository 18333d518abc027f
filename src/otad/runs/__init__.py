"""A whole job: train, interpolate, certify, attack, report; and a trained model on new data."""

from otad.runs.cell_files import read_cells
from otad.runs.compare import compare, write_comparison
from otad.runs.job import health_without_transport, run
from otad.runs.methods import METHODS, method_named
from otad.runs.model_folder import DataCard, read_model, write_model
from otad.runs.outputs import write_outputs
from otad.runs.use import ExplanationRow, attack_model, explanation_rows

__all__ = [
    "METHODS",
    "DataCard",
    "ExplanationRow",
    "attack_model",
    "compare",
    "explanation_rows",
    "health_without_transport",
    "method_named",
    "read_cells",
    "read_model",
    "run",
    "write_comparison",
    "write_model",
    "write_outputs",
]
