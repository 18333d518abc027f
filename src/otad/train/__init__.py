"""Training loops."""

from otad.train.backbone import Epoch, fit_backbone
from otad.train.cip_net import fit_cip_net, imitate
from otad.train.embedding import EmbeddingEpoch, fit_embedding

__all__ = ["EmbeddingEpoch", "Epoch", "fit_backbone", "fit_cip_net", "fit_embedding", "imitate"]
