"""What fitting a method for a comparison takes and gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from otad.attacks.threat_model import AttackerKnowledge
from otad.certificate import Certificate

__all__ = ["Fit", "Fitted"]


@dataclass(frozen=True)
class Fitted:
    """A trained method, ready to be measured.

    Attributes:
        module: inputs -> logits.
        certify: inputs -> certificate with class indices as labels; None where the method has none.
        facts: what the training says of itself, in the types of JSON.
        knowledge: what an attacker knows of the model beside its weights; the comparison adds the training samples,
            and an undefended network where there is no backbone.
    """

    module: nn.Module
    certify: Callable[[Tensor], Certificate] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    knowledge: AttackerKnowledge = field(default_factory=AttackerKnowledge)


# (x, y, threat, *, minutes, seed, progress) -> Fitted: x (n, ...), y class indices 0, 1, .. (n,).
Fit = Callable[..., Fitted]
