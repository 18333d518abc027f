"""otad: classifiers that come with a proof, by optimal transport and convex integration."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
    from otad.certificate import Certificate
    from otad.estimator import Explanation, OTADClassifier, load_model
    from otad.evaluation import evaluate
    from otad.report import Report

__version__ = "0.1.0"

__all__ = [
    "AttackerKnowledge",
    "Certificate",
    "Explanation",
    "OTADClassifier",
    "Report",
    "ThreatModel",
    "__version__",
    "evaluate",
    "load_model",
]

# Loaded at first use, so that `otad --help` does not wait for PyTorch.
_HOMES = {
    "AttackerKnowledge": "otad.attacks.threat_model",
    "Certificate": "otad.certificate",
    "Explanation": "otad.estimator",
    "OTADClassifier": "otad.estimator",
    "Report": "otad.report",
    "ThreatModel": "otad.attacks.threat_model",
    "evaluate": "otad.evaluation",
    "load_model": "otad.estimator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'otad' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
