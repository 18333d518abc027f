"""What `evaluate` takes, checked and brought to the model's device."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.certificate import Certificate

__all__ = ["as_tensors", "check_inputs", "on_device"]


def as_tensors(model: nn.Module, x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Samples and labels on the model's device, samples in the precision of its parameters.

    A model without parameters may hold its training samples in more digits than it takes; the samples keep theirs.
    """
    x = torch.as_tensor(x)
    weights = [t for t in model.parameters() if t.is_floating_point()]
    held = [t for t in (*weights, *model.buffers()) if t.is_floating_point()]
    device = held[0].device if held else torch.device("cpu")
    precisions = [weights[0].dtype] if weights else [t.dtype for t in (*held, x) if t.is_floating_point()]
    dtype = min(precisions, key=lambda kind: torch.finfo(kind).bits, default=torch.float32)
    y = torch.as_tensor(y)
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"y must hold class indices as integers, not {y.dtype}")
    return x.to(device, dtype), y.to(device, torch.long)


def check_inputs(
    x: Tensor,
    y: Tensor,
    threats: Sequence[ThreatModel],
    certificate: Certificate | None,
    n_attacked: int | None,
) -> None:
    """Refuse what would make the numbers meaningless.

    Raises:
        ValueError: no samples, lengths that disagree, values that are not finite, samples outside a box, a
            budget named twice or none at all.
    """
    if len(x) == 0 or len(x) != len(y) or y.ndim != 1:
        raise ValueError(
            "x and y need the same number of rows, at least one; "
            f"they have shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x has values that are not finite; remove those samples or fill them in")
    if n_attacked is not None and n_attacked < 1:
        raise ValueError(f"n_attacked must be at least 1, not {n_attacked}")
    if certificate is not None and bool((certificate.kind == "randomised").any()):
        raise ValueError(
            "a certificate of kind 'randomised' holds with a probability, and certified samples would be spared "
            "attacks: leave it out here and hold it against the result, as `otad compare` does"
        )
    if certificate is not None and len(certificate.radius) != len(x):
        raise ValueError(f"the certificate has {len(certificate.radius)} rows, x has {len(x)}; they must agree")
    keys = [threat.key for threat in threats]
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"threats must name each budget once, and at least one; they are {', '.join(keys) or 'none'}")
    for threat in threats:
        if threat.box is not None and (float(x.min()) < threat.box[0] or float(x.max()) > threat.box[1]):
            raise ValueError(
                f"x reaches from {float(x.min()):g} to {float(x.max()):g}, "
                f"outside the box {threat.box} of the threat {threat.key}"
            )


def on_device(knowledge: AttackerKnowledge, x: Tensor) -> AttackerKnowledge:
    """The same knowledge with its training samples on the device and in the precision of x."""
    if knowledge.x_train is None or knowledge.y_train is None:
        return knowledge
    return replace(knowledge, x_train=knowledge.x_train.to(x), y_train=knowledge.y_train.to(x.device))
