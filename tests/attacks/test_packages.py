import importlib
from functools import partial

import pytest
import torch

from otad.attacks import ThreatModel, autoattack
from otad.attacks.packages import autoattack_parts
from otad.errors import MissingExtraError
from tests.attacks.known import assert_tight, assert_within, linear

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("classes", "shape"), [(2, (7,)), (3, (12,)), (5, (1, 8, 8)), (5, (2, 14, 9)), (4, (1,))])
def test_any_shape_and_number_of_classes(norm, classes: int, shape: tuple[int, ...], capfd) -> None:
    d = torch.Size(shape).numel()
    model, x, y = linear(classes, d, n=20)
    assert_tight(partial(autoattack, square_queries=30), model, x.reshape(-1, *shape), y, norm)
    out = capfd.readouterr()
    assert not out.out
    assert not out.err


@pytest.mark.parametrize("part", ["apgd-ce", "apgd-t", "fab-t", "square"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_part_runs_in_a_box_and_leaves_no_traces(part: str, norm) -> None:
    model, _, _ = linear(classes=4, d=64)
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(dim=1)
    threat = ThreatModel(norm, 1.0 if norm == "l2" else 0.2, (0.0, 1.0))
    state = torch.random.get_rng_state()
    first, second = (autoattack(model, x, y, threat, parts=(part,), square_queries=50, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.random.get_rng_state())
    assert_within(first, x, threat)
    broken = (model(first).argmax(dim=1) != y).double().mean()
    assert broken >= 0.5


def test_parts_that_cannot_run_are_named() -> None:
    assert autoattack_parts(10) == (("apgd-ce", "apgd-t", "fab-t", "square"), "")
    parts, note = autoattack_parts(3)
    assert parts == ("apgd-ce", "fab-t", "square")
    assert "apgd-t" in note


def test_unknown_parts_are_refused() -> None:
    model, x, y = linear(classes=4, d=4, n=2)
    with pytest.raises(ValueError, match="unknown parts"):
        autoattack(model, x, y, ThreatModel("l2", 0.1), parts=("guess",))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    model, x, y = linear(classes=4, d=4, n=2)
    with pytest.raises(MissingExtraError, match="pyautoattack"):
        autoattack(model, x, y, ThreatModel("l2", 0.1))
