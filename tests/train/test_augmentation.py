"""Deformations: none leaves images as they are, a known shift moves them, seeds decide; noise has its scale."""

import torch

from otad.train.augmentation import Deformations, Noise


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


def test_rotation_is_in_radians_also_where_sides_differ() -> None:
    """Ramps of the coordinates come back as coordinates of where each pixel came from."""
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(80.0), indexing="ij")
    ramps = torch.stack([rows, columns]).expand(100, -1, -1, -1)
    came_from = Deformations(shift=0, rotation=0.1, stretch=0, bend=0)(ramps, seeded(5))[:, :, 8:12, 36:44]
    down_along_row = (came_from[:, 0, 0, -1] - came_from[:, 0, 0, 0]) / 7
    across_along_column = (came_from[:, 1, -1, 0] - came_from[:, 1, 0, 0]) / 3
    for slope, most in ((down_along_row, 0.1), (across_along_column, 0.2)):
        assert 0.8 * most < slope.abs().max() <= most + 1e-3


def test_only_a_share_is_deformed_and_mirrored() -> None:
    x = torch.rand(4000, 1, 6, 6, generator=seeded(0))
    moved = Deformations(share=0.25)(x, seeded(6))
    assert abs(float((moved != x).flatten(1).any(1).double().mean()) - 0.25) < 0.05
    turned = Deformations(share=0.0, mirrored=0.5)(x, seeded(6))
    kept, flipped = (turned == x).flatten(1).all(1), (turned == x.flip(3)).flatten(1).all(1)
    assert (kept | flipped).all()
    assert abs(float(flipped.double().mean()) - 0.5) < 0.05


def test_photographs_are_mirrored_and_digits_not() -> None:
    assert Deformations.usual(torch.rand(3, 3, 8, 8)).mirrored > 0
    assert Deformations.usual(torch.rand(3, 1, 8, 8)).mirrored == 0


def test_noise_has_its_scale_and_no_mean() -> None:
    samples = torch.randn(4000, 5, generator=seeded(0))
    moved = Noise(0.3)(samples, seeded(7)) - samples
    assert torch.allclose(moved.std(0), torch.tensor(0.3), rtol=0.05)
    assert moved.mean(0).abs().max() < 4 * 0.3 / 4000**0.5
    assert torch.equal(Noise(0.3)(samples, seeded(7)) - samples, moved)
