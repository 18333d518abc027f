"""Training loops."""

from otad.train.affine_potential import AffinePotential
from otad.train.augmentation import Deformations
from otad.train.backbone import Epoch, fit_backbone
from otad.train.cip_net import fit_cip_net, imitate
from otad.train.embedding import EmbeddingEpoch, fit_embedding
from otad.train.potential import Refinement, RefinementEpoch, anchored_potential, refine

__all__ = [
    "AffinePotential",
    "Deformations",
    "EmbeddingEpoch",
    "Epoch",
    "Refinement",
    "RefinementEpoch",
    "anchored_potential",
    "fit_backbone",
    "fit_cip_net",
    "fit_embedding",
    "imitate",
    "refine",
]
