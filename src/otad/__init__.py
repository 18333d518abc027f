"""otad: classifiers that come with a proof, by optimal transport and convex integration."""

from otad.attacks import ThreatModel
from otad.certificate import Certificate
from otad.estimator import Explanation, OTADClassifier
from otad.evaluation import evaluate
from otad.report import Report

__version__ = "0.1.0"

__all__ = ["Certificate", "Explanation", "OTADClassifier", "Report", "ThreatModel", "__version__", "evaluate"]
