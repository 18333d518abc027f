from pathlib import Path

import pytest
import torch

from otad.attacks import AttackerKnowledge, Outcome, ThreatModel, run_attacks
from otad.attacks.kept import KeptResults
from tests.attacks.known import linear

ATTACKS = {
    "exact_gradient": {"losses": ("margin",), "steps": 10},
    "noise": {"draws": 3},
    "autoattack": {"parts": ("apgd-ce",)},
}


def attacked(folder: Path, *, eps: float = 0.3, seed: int = 0, scale: float = 1.0, shift: float = 0.0, attacks=ATTACKS):
    """Outcomes, and how many files the folder then holds."""
    model, x, y = linear(classes=3, d=6, n=20)
    with torch.no_grad():
        model.weight.mul_(scale)
    x = x + shift
    kept = KeptResults(folder, model, x, y, AttackerKnowledge(), seed=seed, batch_size=500)
    outcomes = run_attacks(model, x, y, ThreatModel("l2", eps), attacks, seed=seed, kept=kept)
    return outcomes, len(list(folder.iterdir()))


def same(a: dict[str, Outcome], b: dict[str, Outcome]) -> bool:
    """Equal in every number; also in the seconds, which only a kept result can be."""
    return list(a) == list(b) and all(
        torch.equal(a[name].x_adv, b[name].x_adv)
        and torch.equal(a[name].survived, b[name].survived)
        and torch.equal(a[name].margin, b[name].margin)
        and (a[name].seconds, a[name].queries, a[name].note) == (b[name].seconds, b[name].queries, b[name].note)
        for name in a
    )


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    first, files = attacked(tmp_path)
    assert files == 2 * len(ATTACKS)
    again, files = attacked(tmp_path)
    assert same(first, again)
    assert files == 2 * len(ATTACKS)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    attacked(tmp_path, attacks={"exact_gradient": ATTACKS["exact_gradient"]})
    whole, files = attacked(tmp_path)
    assert files == 2 * len(ATTACKS)
    fresh, _ = attacked(tmp_path / "fresh")
    for name, outcome in whole.items():
        assert torch.equal(outcome.x_adv, fresh[name].x_adv)


@pytest.mark.parametrize("change", [{"eps": 0.31}, {"seed": 1}, {"scale": 2.0}, {"shift": 1e-6}])
def test_a_result_of_something_else_is_never_used(tmp_path: Path, change) -> None:
    attacked(tmp_path)
    _, files = attacked(tmp_path, **change)
    assert files == 4 * len(ATTACKS)


def test_a_damaged_result_is_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = attacked(tmp_path)
    for file in tmp_path.glob("*noise*.safetensors"):
        file.write_bytes(b"nonsense")
    again, _ = attacked(tmp_path)
    assert "damaged" in caplog.text
    assert torch.equal(first["noise"].x_adv, again["noise"].x_adv)
