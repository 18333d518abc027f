"""Training loops."""

from otad.train.backbone import Epoch, fit_backbone
from otad.train.embedding import EmbeddingEpoch, fit_embedding

__all__ = ["EmbeddingEpoch", "Epoch", "fit_backbone", "fit_embedding"]
