"""Training loops."""

from otad.train.backbone import Epoch, fit_backbone
from otad.train.cip_net import fit_cip_net, imitate

__all__ = ["Epoch", "fit_backbone", "fit_cip_net", "imitate"]
