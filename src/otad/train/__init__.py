"""Training loops."""

from otad.train.affine_potential import AffinePotential
from otad.train.augmentation import Deformations, Noise
from otad.train.backbone import Epoch, fit_backbone
from otad.train.cip_net import fit_cip_net, imitate
from otad.train.diagram import DiagramRefinement, refine_diagram, usual_epochs
from otad.train.embedding import EmbeddingEpoch, fit_embedding
from otad.train.learned_diagram import LearnedDiagram
from otad.train.poses import USUAL_POSES, Pose, Poses
from otad.train.potential import Refinement, anchored_potential, refine
from otad.train.refinement import RefinementEpoch

__all__ = [
    "USUAL_POSES",
    "AffinePotential",
    "Deformations",
    "DiagramRefinement",
    "EmbeddingEpoch",
    "Epoch",
    "LearnedDiagram",
    "Noise",
    "Pose",
    "Poses",
    "Refinement",
    "RefinementEpoch",
    "anchored_potential",
    "fit_backbone",
    "fit_cip_net",
    "fit_embedding",
    "imitate",
    "refine",
    "refine_diagram",
    "usual_epochs",
]
