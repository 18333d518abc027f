"""otad-cells: settings chosen on held-out training samples, within a budget."""

import math

import pytest
import torch
from sklearn.datasets import load_digits

from otad.attacks.threat_model import ThreatModel
from otad.fitting.cells import principal_basis
from otad.runs import diagrams
from otad.runs.diagrams import CELLS_OF_TABLES, CELLS_OF_WIDE_TABLES, Cells, fit_cells


def test_the_best_of_the_tried_settings_is_trained_and_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagrams, "usual_epochs", lambda n: 12)  # the tests take no longer for a faster machine
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:300] / 16, dtype=torch.float32), torch.tensor(y[:300])
    fitted = fit_cells(x, y, ThreatModel("l2", 0.4, None), minutes=1.0)
    tried = fitted.facts["validation"]
    assert len(tried) == len(CELLS_OF_TABLES)
    best = max(tried, key=lambda row: (row["tried_epochs"], row["splits"], row["score"]))
    assert fitted.facts["settings"] == {name: best[name] for name in fitted.facts["settings"]}
    assert fitted.certify is not None
    # Training counts by single planes; what is proven is at least that.
    assert fitted.certify(x).certified(0.4, y.numpy()) >= fitted.facts["after"]["certified"] - 0.02 > 0.3


def test_wide_tables_may_be_cut_to_their_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagrams, "usual_epochs", lambda n: 40)
    draws = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 240, generator=draws)
    x[:, :3] += 6.0 * torch.nn.functional.one_hot(y, 3)
    assert diagrams._cells_for(x) == (*CELLS_OF_WIDE_TABLES, *CELLS_OF_TABLES)
    rivals = (Cells(100, None, 1.0, 0.25), Cells(4, None, 1.6, 0.25, components=20))
    monkeypatch.setattr(diagrams, "_cells_for", lambda x: rivals)
    fitted = fit_cells(x, y, ThreatModel("l2", 1.0, None), minutes=1.0)
    assert fitted.facts["settings"]["components"] == 20, "most columns are noise"
    module = fitted.module
    basis = principal_basis(x - x.mean(0), 20)
    noise = torch.randn(10, 240, generator=draws)
    assert torch.allclose(module(x[:10] + noise - noise @ basis @ basis.T), module(x[:10]), atol=1e-3)


def test_a_budget_too_small_for_choosing_still_trains_an_epoch() -> None:
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:200] / 16, dtype=torch.float32), torch.tensor(y[:200])
    facts = fit_cells(x, y, ThreatModel("l2", 0.4, None), minutes=1e-6).facts
    assert facts["epochs"] == 1
    assert facts["validation"] == []


def test_the_better_half_meets_again_on_other_splits_for_longer() -> None:
    """Three of the five candidates after the first round, then two; an unlucky first round is made up for."""
    truth = {Cells(pieces, None, 1.0, 1.0): float(pieces) for pieces in range(1, 6)}
    best = max(truth, key=lambda tried: truth[tried])
    seen = []

    def score(tried: Cells, split: int, epochs: int) -> float:
        seen.append((split, epochs))
        return truth[tried] - (2.5 if split == 0 and tried == best else 0.0)

    chosen, trials = diagrams._rounds(tuple(truth), score, 4, 10, 1, 0.0, math.inf)
    assert chosen == best
    assert [trials[tried].epochs for tried in truth] == [4, 4, 8, 10, 10]
    assert trials[best].scores == [5.0], "those of shorter trainings do not count"
    assert seen == [(0, 4)] * 5 + [(1, 8)] * 3 + [(2, 10)] * 2
    first = next(iter(truth))
    assert diagrams._rounds(tuple(truth), score, 4, 10, 1, 1.0, -math.inf) == (first, {})
    seen.clear()
    _, trials = diagrams._rounds(tuple(truth), score, 4, 10, 2, 0.0, math.inf)
    assert [len(trials[tried].scores) for tried in truth] == [2] * 5
    assert seen[:16] == [(0, 4)] * 5 + [(1, 4)] * 5 + [(2, 8)] * 3 + [(3, 8)] * 3
    _, trials = diagrams._rounds(tuple(truth), score, 10, 10, 2, 0.0, math.inf)
    assert [len(trials[tried].scores) for tried in truth] == [2, 2, 4, 6, 6], "trainings as long as any all count"


def test_rounds_keep_to_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch takes a second; of later rounds the worse rivals are left out, of the first one the last ones."""
    tried = [Cells(pieces, None, 1.0, 1.0) for pieces in (4, 3, 2, 1)]
    clock = [0.0]
    monkeypatch.setattr(diagrams.time, "perf_counter", lambda: clock[0])

    def score(candidate: Cells, split: int, epochs: int) -> float:
        clock[0] += epochs
        return float(candidate.pieces or 0)

    def splits(latest: float, most: int) -> list[int]:
        clock[0] = 0.0
        chosen, trials = diagrams._rounds(tried, score, 4, 4, most, 4.0, latest)
        assert chosen == tried[0]
        assert clock[0] <= latest
        return [len(trials[candidate].scores) if candidate in trials else 0 for candidate in tried]

    assert splits(10.0, 1) == [1, 1, 0, 0]
    assert splits(23.0, 1) == [1, 1, 1, 1]  # 16 seconds, and two rivals would take 8 more
    assert splits(24.0, 1) == [2, 2, 1, 1]
    assert splits(64.0, 9) == [6, 6, 2, 2]  # half of the time for each round
