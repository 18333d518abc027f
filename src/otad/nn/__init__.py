"""Networks: stem, residual trunk, linear head."""

from otad.nn.backbone import Backbone, CenteredFlatten
from otad.nn.embedding import OrthogonalEmbedding, UnitEmbedding, build_embedding, residual_embedding
from otad.nn.mlp import residual_mlp
from otad.nn.named import BACKBONES, build_backbone
from otad.nn.orthogonal import EncodedStem, MaxMinEncoder, dense_encoders, patch_encoders
from otad.nn.resnet import residual_convnet
from otad.nn.transformer import residual_transformer
from otad.nn.transport_cost import block_cost, transport_cost

__all__ = [
    "BACKBONES",
    "Backbone",
    "CenteredFlatten",
    "EncodedStem",
    "MaxMinEncoder",
    "OrthogonalEmbedding",
    "UnitEmbedding",
    "block_cost",
    "build_backbone",
    "build_embedding",
    "dense_encoders",
    "patch_encoders",
    "residual_convnet",
    "residual_embedding",
    "residual_mlp",
    "residual_transformer",
    "transport_cost",
]
