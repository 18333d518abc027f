"""Backbones by name."""

import pytest
import torch

from otad.nn import BACKBONES, build_backbone

OPTIONS = {"mlp": {}, "resnet": {"stages": 2}, "transformer": {"patch": 4, "heads": 2, "pool": "mean"}}


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_depend_on_the_generator_and_are_restored_by_a_state_dict(name: str) -> None:
    settings = {"n_blocks": 2, "width": 16, "options": OPTIONS[name]}
    mean, x = torch.rand(1, 8, 8), torch.rand(5, 1, 8, 8)
    torch.manual_seed(3)
    first = build_backbone(name, mean, 4, **settings).eval()
    torch.manual_seed(3)
    assert torch.equal(build_backbone(name, mean, 4, **settings).eval()(x), first(x))
    other = build_backbone(name, torch.zeros_like(mean), 4, **settings).eval()
    assert not torch.equal(other(x), first(x))
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(x), first(x))


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_that_are_not_given_are_chosen(name: str) -> None:
    assert build_backbone(name, torch.zeros(3, 32, 32), 10)(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_unknown_names_and_options() -> None:
    with pytest.raises(ValueError, match=r"one of 'mlp', 'resnet', 'transformer'; got 'vit'"):
        build_backbone("vit", torch.zeros(4), 2)
    with pytest.raises(ValueError, match=r"'resnet' has no option 'heads'; it has 'stages'"):
        build_backbone("resnet", torch.zeros(1, 8, 8), 2, options={"heads": 3})
    with pytest.raises(ValueError, match=r"'mlp' has no option 'patch'; it has none"):
        build_backbone("mlp", torch.zeros(8), 2, options={"patch": 3})
