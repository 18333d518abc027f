"""Training loops."""

from otad.train.backbone import Epoch, fit_backbone

__all__ = ["Epoch", "fit_backbone"]
