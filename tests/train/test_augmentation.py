"""Deformations: none leaves images as they are, a known shift moves them, seeds decide."""

import torch

from otad.train.augmentation import Deformations


def images() -> torch.Tensor:
    return torch.rand(6, 2, 9, 13, generator=torch.Generator().manual_seed(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_none_is_the_identity() -> None:
    none = Deformations(shift=0, rotation=0, stretch=0, bend=0)
    assert torch.allclose(none(images(), seeded(1)), images(), atol=1e-5)


def test_a_shift_moves_the_centre_of_mass_by_its_pixels() -> None:
    dot = torch.zeros(200, 1, 21, 31)
    dot[:, :, 9:12, 14:17] = 1.0
    moved = Deformations(shift=3, rotation=0, stretch=0, bend=0)(dot, seeded(2))
    places = torch.stack(torch.meshgrid(torch.arange(21.0), torch.arange(31.0), indexing="ij"))
    centre = (moved * places).sum((2, 3)) / moved.sum((2, 3))
    by = centre - torch.tensor([10.0, 15.0])
    assert by.abs().max() <= 3 + 1e-4
    assert (by.abs().amax(0) > 2.5).all()  # both ways reach far


def test_the_seed_decides() -> None:
    deform = Deformations()
    assert torch.equal(deform(images(), seeded(3)), deform(images(), seeded(3)))
    assert not torch.equal(deform(images(), seeded(3)), deform(images(), seeded(4)))
