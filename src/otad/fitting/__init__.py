"""What `OTADClassifier.fit` is made of, part by part: each is checked, trained, saved and restored in one file."""

from otad.fitting.backbone import restored_backbone, train_backbone, transport_of
from otad.fitting.cells import train_cells
from otad.fitting.interpolation import interpolated, training_fit
from otad.fitting.network import fit_network, measured_network, network_state, restored_network
from otad.fitting.parameters import check_parameters, fixed_regularity, training_options
from otad.fitting.refinement import fit_refined, restored_refined, usual_cells
from otad.fitting.retrieval import fit_retrieval, restored_retrieval, retrieval_state

__all__ = [
    "check_parameters",
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
    "train_backbone",
    "train_cells",
    "training_fit",
    "training_options",
    "transport_of",
    "usual_cells",
]
