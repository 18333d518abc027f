"""What `OTADClassifier.fit` is made of, part by part: each is checked, trained, saved and restored in one file."""

from otad.fitting.backbone import restored_backbone, train_backbone, transport_of
from otad.fitting.interpolation import interpolated, training_fit
from otad.fitting.network import fit_network, measured_network, network_state, restored_network
from otad.fitting.parameters import check_parameters, fixed_regularity, training_options
from otad.fitting.refinement import encoded, fit_refined, restored_refined, spread, started_cells, usual_cells
from otad.fitting.retrieval import fit_retrieval, restored_retrieval, retrieval_state

__all__ = [
    "check_parameters",
    "encoded",
    "fit_network",
    "fit_refined",
    "fit_retrieval",
    "fixed_regularity",
    "interpolated",
    "measured_network",
    "network_state",
    "restored_backbone",
    "restored_network",
    "restored_refined",
    "restored_retrieval",
    "retrieval_state",
    "spread",
    "started_cells",
    "train_backbone",
    "training_fit",
    "training_options",
    "transport_of",
    "usual_cells",
]
