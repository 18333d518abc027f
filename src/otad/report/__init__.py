"""What a run found, as a terminal table, as strict JSON and as one self-contained page."""

from otad.report.pictures import Contribution, GallerySample, TransportPicture
from otad.report.summary import Report

__all__ = ["Contribution", "GallerySample", "Report", "TransportPicture"]
