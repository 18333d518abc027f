"""Networks: stem, residual trunk, linear head."""

from otad.nn.backbone import Backbone, CenteredFlatten
from otad.nn.mlp import residual_mlp
from otad.nn.orthogonal import EncodedStem, MaxMinEncoder
from otad.nn.transport_cost import transport_cost

__all__ = ["Backbone", "CenteredFlatten", "EncodedStem", "MaxMinEncoder", "residual_mlp", "transport_cost"]
