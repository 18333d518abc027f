"""Pixels of a square become channels, and back."""

import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from otad.nn import BACKBONES, build_backbone
from otad.nn.pixels import shuffle, unshuffle


@pytest.mark.parametrize("side", [1, 2, 3])
def test_agrees_with_torch_and_can_be_undone(side: int) -> None:
    image = torch.rand(4, 2, 6, 12)
    assert torch.equal(unshuffle(image, side), pixel_unshuffle(image, side))
    assert torch.equal(shuffle(unshuffle(image, side), side), image)
    assert unshuffle(image[:0], side).shape == (0, 2 * side**2, 6 // side, 12 // side)


@pytest.mark.parametrize("name", BACKBONES)
def test_no_samples_have_no_logits(name: str) -> None:
    backbone = build_backbone(name, torch.rand(1, 8, 8), 3).eval()
    assert backbone(torch.rand(0, 1, 8, 8)).shape == (0, 3)
    assert backbone.stem.inverse(backbone.stem(torch.rand(0, 1, 8, 8))).shape == (0, 1, 8, 8)  # type: ignore[operator]
