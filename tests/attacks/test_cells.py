"""The attack on cells meets the distances that `PowerDiagram.distance` proves, and a conic solver's within a box."""

import pytest
import torch
from torch import Tensor

from otad.attacks import AttackerKnowledge, ThreatModel, nearest_cells, run_attacks
from otad.cip import PowerDiagram
from otad.defense import OTAD, CellInterpolation, identity_head
from otad.nn import CenteredFlatten, EncodedStem, dense_encoders
from tests.cip.test_power_diagram import conic_distance

NEAR = 1e-3


def cells(n: int, d: int, classes: int, seed: int = 0) -> tuple[OTAD, PowerDiagram]:
    draws = torch.Generator().manual_seed(seed)
    slopes, intercepts = torch.randn(n, d, generator=draws), torch.randn(n, generator=draws) / 4
    diagram = PowerDiagram(slopes, intercepts, torch.arange(n) % classes)
    return OTAD(CenteredFlatten(torch.zeros(d)), CellInterpolation(diagram), identity_head(classes)).double(), diagram


def broken(model: OTAD, x: Tensor, y: Tensor, threat: ThreatModel) -> bool:
    assert model.cells is not None
    x_adv = nearest_cells(model, x, y, threat, cells=model.cells, neighbors=100)
    assert bool(threat.contains(x_adv, x).all())
    return bool((model(x_adv).argmax(1) != y).all())


@pytest.mark.parametrize("seed", range(3))
def test_it_breaks_just_beyond_the_certified_distance_and_not_within(seed: int) -> None:
    model, diagram = cells(40, 6, 3, seed)
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = model(x).argmax(1)
    for row, label, distance in zip(x, y, diagram.distance(x, y).tolist(), strict=True):
        one, its = row[None], label[None]
        assert broken(model, one, its, ThreatModel("l2", distance * (1 + NEAR)))
        assert not broken(model, one, its, ThreatModel("l2", distance * (1 - NEAR)))


def test_within_a_box_it_breaks_just_beyond_the_distance_of_a_conic_solver() -> None:
    model, diagram = cells(24, 5, 3)
    x = 2 * torch.rand(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    y = model(x).argmax(1)
    for row, label in zip(x, y, strict=True):
        distance = conic_distance(diagram, row.numpy(), int(label), box=1.0)
        if distance < float("inf"):
            assert broken(model, row[None], label[None], ThreatModel("l2", distance * (1 + NEAR), (-1.0, 1.0)))


def test_it_is_given_the_models_own_cells_and_no_others() -> None:
    model, _ = cells(9, 4, 3)
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    outcome = run_attacks(model, x, y, ThreatModel("l2", 100.0), ["nearest_cells"])["nearest_cells"]
    assert not bool(outcome.survived.any())
    encoded = EncodedStem(CenteredFlatten(torch.zeros(4)), *dense_encoders(4, 1, 4))
    assert OTAD(encoded, model.interpolation, model.head).cells is None
    with pytest.raises(ValueError, match="needs cells"):
        run_attacks(torch.nn.Linear(4, 3).double(), x, y, ThreatModel("l2", 1.0), ["nearest_cells"])
    assert AttackerKnowledge().about(model).cells == model.cells


def test_one_class_has_no_other_cells_to_go_to() -> None:
    model, _ = cells(3, 2, 1)
    x = torch.zeros(2, 2, dtype=torch.float64)
    assert model.cells is not None
    assert torch.equal(
        nearest_cells(model, x, torch.zeros(2, dtype=torch.long), ThreatModel("l2", 1.0), cells=model.cells), x
    )
