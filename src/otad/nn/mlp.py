"""The residual MLP: x_{t+1} = x_t + B_t relu(A_t x_t + a_t) + b_t."""

from jaxtyping import Float
from torch import Tensor, nn

from otad.nn.backbone import Backbone, CenteredFlatten

__all__ = ["residual_mlp"]


def residual_mlp(
    mean: Float[Tensor, "..."], n_classes: int, *, n_blocks: int = 5, width: int | None = None
) -> Backbone:
    """A residual MLP whose trunk has the dimension d of its input and starts as the identity.

    Args:
        mean: training mean, in the shape of one sample; d is its number of entries.
        n_classes: outputs of the head.
        n_blocks: m, residual blocks.
        width: hidden units of a block; d (at least 64, at most 1,024) where not given.
    """
    d = mean.numel()
    width = width or min(max(d, 64), 1024)
    blocks = [_branch(d, width) for _ in range(n_blocks)]
    return Backbone(CenteredFlatten(mean), blocks, nn.Linear(d, n_classes))


def _branch(d: int, width: int) -> nn.Module:
    out = nn.Linear(width, d)
    # Zero at the start: the untrained trunk is the identity, the optimal transport of nothing moved.
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return nn.Sequential(nn.Linear(d, width), nn.ReLU(), out)
