"""Backbones by name."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from otad.nn.backbone import Backbone
from otad.nn.mlp import residual_mlp
from otad.nn.resnet import residual_convnet
from otad.nn.transformer import residual_transformer

__all__ = ["BACKBONES", "build_backbone"]

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "mlp": residual_mlp,
    "resnet": residual_convnet,
    "transformer": residual_transformer,
}
OPTIONS = {"mlp": (), "resnet": ("stages",), "transformer": ("patch", "heads", "hidden", "pool")}


def build_backbone(
    name: str,
    mean: Float[Tensor, "..."],
    n_classes: int,
    *,
    n_blocks: int | None = None,
    width: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """An untrained backbone whose trunk is the identity; torch's generator draws the weights.

    Args:
        name: "mlp", "resnet" or "transformer".
        mean: training mean, in the shape of one sample.
        n_classes: outputs of the head.
        n_blocks: residual blocks; layers of two for the Transformer. None takes the network's default.
        width: hidden units of a block, channels of the first stage, or coordinates of a token. None likewise.
        options: what only this network has: "stages" of a ResNet; "patch", "heads", "hidden", "pool" of a Transformer.

    Raises:
        ValueError: an unknown name or option, or data or options that the network cannot use.
    """
    if name not in BACKBONES:
        raise ValueError(f"the backbone must be one of {', '.join(map(repr, BACKBONES))}; got {name!r}")
    options = dict(options or {})
    unknown = sorted(options.keys() - set(OPTIONS[name]))
    if unknown:
        known = ", ".join(map(repr, OPTIONS[name])) or "none"
        raise ValueError(f"the backbone {name!r} has no option {unknown[0]!r}; it has {known}")
    sizes = {"n_blocks": n_blocks, "width": width}
    given = {key: value for key, value in (options | sizes).items() if value is not None}
    return BACKBONES[name](mean, n_classes, **given)
