"""otad-cells: settings chosen on held-out training samples, within a budget."""

import pytest
import torch
from sklearn.datasets import load_digits

from otad.attacks.threat_model import ThreatModel
from otad.runs.methods import CELLS_OF_TABLES, fit_cells


def test_the_best_of_the_tried_settings_is_trained_and_certified() -> None:
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:300] / 16, dtype=torch.float32), torch.tensor(y[:300])
    fitted = fit_cells(x, y, ThreatModel("l2", 0.4, None), minutes=1.0)
    tried = fitted.facts["validation"]
    assert len(tried) == len(CELLS_OF_TABLES)
    best = max(tried, key=lambda row: row["mean_radius"])
    assert fitted.facts["settings"] == {name: best[name] for name in fitted.facts["settings"]}
    assert fitted.certify is not None
    assert fitted.certify(x).certified(0.4, y.numpy()) == pytest.approx(fitted.facts["after"]["certified"], abs=0.1)


def test_a_budget_too_small_for_choosing_still_trains_an_epoch() -> None:
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:200] / 16, dtype=torch.float32), torch.tensor(y[:200])
    facts = fit_cells(x, y, ThreatModel("l2", 0.4, None), minutes=1e-6).facts
    assert facts["epochs"] == 1
    assert facts["validation"] == []
