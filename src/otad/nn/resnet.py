"""The residual convolutional network: x_{t+1} = x_t + h_t(x_t), h_t of convolutions at one resolution per stage."""

from jaxtyping import Float
from torch import Tensor, nn

from otad.nn.backbone import Backbone, CenteredFlatten
from otad.nn.pixels import shuffle, unshuffle

__all__ = ["ConvolutionBranch", "residual_convnet"]


def residual_convnet(
    mean: Float[Tensor, "..."], n_classes: int, *, n_blocks: int = 6, width: int = 32, stages: int = 3
) -> Backbone:
    """A residual network of convolutions whose trunk keeps the dimension d of the image and starts as the identity.

    From one stage to the next the image gets half the sides and four times the channels: pixel-unshuffle, which only
    reorders the pixels. Each branch reorders for itself and back, so that the trunk is one transport in R^d whose
    coordinates are the pixels as given. Batch statistics are those of training in evaluation mode.

    Args:
        mean: training mean of the images, (channels, height, width).
        n_classes: outputs of the head.
        n_blocks: m, residual blocks, spread evenly over the stages, the first stages taking what is left over.
        width: channels inside the branches of the first stage; doubled from stage to stage.
        stages: at most so many; a stage needs sides that can be halved once more, and leaves more than one pixel, of
            which a batch of one sample has statistics.

    Raises:
        ValueError: samples that are no images, or stages < 1.
    """
    if mean.ndim != 3 or mean.shape[1] * mean.shape[2] < 2:
        raise ValueError(
            f"a ResNet needs images (channels, height, width) of more than one pixel; got samples of shape "
            f"{tuple(mean.shape)}: reshape them, or take the backbone 'mlp' or 'transformer'"
        )
    if stages < 1:
        raise ValueError(f"stages must be at least 1; got {stages}")
    height, width_in = mean.shape[1:]
    factors = [
        f for f in (2**s for s in range(stages)) if not (height % f or width_in % f) and height * width_in > f * f
    ]
    each, more = divmod(n_blocks, len(factors))
    blocks = [
        ConvolutionBranch(tuple(mean.shape), factor, width * factor)
        for stage, factor in enumerate(factors)
        for _ in range(each + (stage < more))
    ]
    return Backbone(CenteredFlatten(mean), blocks, nn.Linear(mean.numel(), n_classes))


class ConvolutionBranch(nn.Module):
    """Two 3 x 3 convolutions with batch norm and ReLU between them, (batch, d) -> (batch, d).

    Args:
        shape: of the image, (channels, height, width), d entries.
        factor: the branch sees sides divided, and channels multiplied, by it and its square.
        width: channels between the convolutions.
    """

    def __init__(self, shape: tuple[int, ...], factor: int, width: int) -> None:
        super().__init__()
        self.shape, self.factor = shape, factor
        channels = shape[0] * factor**2
        out = nn.Conv2d(width, channels, 3, padding=1)
        # Zero at the start: the untrained trunk is the identity, the optimal transport of nothing moved.
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)  # type: ignore[arg-type]
        first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.layers = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), out)

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        image = unshuffle(x.unflatten(1, self.shape), self.factor)
        return shuffle(self.layers(image), self.factor).flatten(1)
