"""Attacks: pure functions from model, samples and labels to inputs that fool the model within a budget."""

from otad.attacks.bpda import bpda
from otad.attacks.cells import nearest_cells
from otad.attacks.exact_gradient import apgd, exact_gradient
from otad.attacks.foolbox import decision_based, minimal_norm
from otad.attacks.lines import lines, shrink
from otad.attacks.packages import autoattack
from otad.attacks.retrieval import joint, retrieval
from otad.attacks.sets import ATTACKS, SETS
from otad.attacks.suite import Outcome, run_attacks, worst_case
from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.attacks.transfer import noise, transfer

__all__ = [
    "ATTACKS",
    "SETS",
    "AttackerKnowledge",
    "Outcome",
    "ThreatModel",
    "apgd",
    "autoattack",
    "bpda",
    "decision_based",
    "exact_gradient",
    "joint",
    "lines",
    "minimal_norm",
    "nearest_cells",
    "noise",
    "retrieval",
    "run_attacks",
    "shrink",
    "transfer",
    "worst_case",
]
