"""Networks: stem, residual trunk, linear head."""

from otad.nn.backbone import Backbone, CenteredFlatten
from otad.nn.embedding import OrthogonalEmbedding, UnitEmbedding, build_embedding, residual_embedding
from otad.nn.mlp import residual_mlp
from otad.nn.transport_cost import transport_cost

__all__ = [
    "Backbone",
    "CenteredFlatten",
    "OrthogonalEmbedding",
    "UnitEmbedding",
    "build_embedding",
    "residual_embedding",
    "residual_mlp",
    "transport_cost",
]
