"""otad-cells: settings chosen on held-out training samples, within a budget."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from otad.attacks.threat_model import ThreatModel
from otad.fitting import train_cells
from otad.fitting.cells import principal_basis
from otad.runs import diagrams
from otad.runs.diagrams import CELLS_OF_TABLES, CELLS_OF_WIDE_TABLES, Cells, fit_cells
from otad.train import Noise


def test_the_best_of_the_tried_settings_is_trained_and_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagrams, "usual_epochs", lambda n: 12)  # the tests take no longer for a faster machine
    monkeypatch.setattr(diagrams, "MOST_SPLITS", 2)
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:300] / 16, dtype=torch.float32), torch.tensor(y[:300])
    fitted = fit_cells(x, y, ThreatModel("l2", 0.4, None), minutes=3.0)
    tried = fitted.facts["validation"]
    assert len(tried) == len(CELLS_OF_TABLES)
    assert all(row["splits"] >= 2 for row in tried)
    best = max(tried, key=lambda row: (row["splits"], row["share"], row["score"]))
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


def test_a_budget_too_small_for_choosing_still_trains_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:200] / 16, dtype=torch.float32), torch.tensor(y[:200])
    facts = fit_cells(x, y, ThreatModel("l2", 0.4, None), minutes=1e-6).facts
    assert facts["epochs"] == 1
    assert facts["validation"] == []
    assert f"enough to try 0 of {len(CELLS_OF_TABLES)} settings" in caplog.text


def test_candidates_are_trained_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = (
        Cells(2, None, 1.5, 0.3, "dense", ramp=1.0, noise=0.2, learning_rate=1e-2, longer=3),
        Cells(1, None, 1.0, 0.5, components=5, longer=2),
    )
    monkeypatch.setattr(diagrams, "_cells_for", lambda x: rivals)
    monkeypatch.setattr(diagrams, "usual_epochs", lambda n: 2)
    seen = []

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options)
        return train_cells(*args, **options)

    monkeypatch.setattr(diagrams, "train_cells", spy)
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:100] / 16).float(), torch.tensor(y[:100])
    facts = fit_cells(x, y, ThreatModel("l2", 0.4, None), minutes=3.0).facts
    names = ("most", "target_radius", "temperature", "encoder", "components", "ramp", "augment", "learning_rate")
    trained = {tuple(options[name] for name in names) for options in seen}
    first = 20, pytest.approx(0.6), 0.3, "dense", None, 1.0, Noise(0.2), 1e-2
    second = 10, pytest.approx(0.4), 0.5, None, 5, None, None, None
    assert len(trained) == 2
    assert all(options in (first, second) for options in trained)
    assert {(options["most"], options["epochs"]) for options in seen[3:]} == {(20, 6), (10, 4)}, "longer than usual"
    assert [row["epochs"] for row in facts["validation"]] == [6, 4]
    assert facts["epochs"] == seen[-1]["epochs"]
    assert len(seen) == 3 + 2 * diagrams.MOST_SPLITS + 1, "three to tell the times, and one of all samples"


@pytest.mark.parametrize(
    ("slow", "epochs", "splits"),
    [
        (10.0, (8, 2), 2),  # 108 seconds are left, so 20 and 5 epochs are whole, a quarter of 108 holds 0.39 of those
        (14.0, (8, 1), 3),  # 104; 20 and 3; 0.42
        (30.0, (9, 1), 1),  # 88; 20 and 1; 0.44
        (60.0, (), 0),  # 58; 20 and 1, which is all that half of it holds
    ],
)
def test_each_setting_has_its_share_of_what_it_could_train_in_the_end(
    monkeypatch: pytest.MonkeyPatch, slow: float, epochs: tuple[int, ...], splits: int
) -> None:
    """By a clock that tells a second for an epoch of the one setting, `slow` of them for the other."""
    rivals = (Cells(2, None, 1.0, 0.3), Cells(1, None, 1.0, 0.3))
    monkeypatch.setattr(diagrams, "_cells_for", lambda x: rivals)
    monkeypatch.setattr(diagrams, "usual_epochs", lambda n: 20)
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:100] / 16).float(), torch.tensor(y[:100])
    clock = [0.0]
    monkeypatch.setattr(diagrams.time, "perf_counter", lambda: clock[0])

    def timed(stem: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        module, found, pieces = train_cells(stem, inputs, *args, **options)
        lasted = options["epochs"] * (1.0 if options["most"] == 20 else slow) * len(inputs) / len(x)
        clock[0] += lasted
        history = [dataclasses.replace(row, seconds=lasted) for row in found.history]
        return module, dataclasses.replace(found, history=history), pieces

    monkeypatch.setattr(diagrams, "train_cells", timed)
    facts = fit_cells(x, y, ThreatModel("l2", 0.4, None), minutes=2.0).facts
    assert tuple(row["epochs"] for row in facts["validation"]) == epochs
    assert all(row["splits"] == splits for row in facts["validation"])
    assert clock[0] <= 120.0
    if facts["settings"]["pieces"] == 2:
        assert facts["epochs"] == 20
    else:
        assert clock[0] > 120.0 - slow, "no time is left for one more"


def test_few_grey_images_have_settings_of_their_own() -> None:
    assert diagrams._cells_for(torch.zeros(19_999, 1, 1, 1)) == diagrams.CELLS_OF_FEW_GREY_IMAGES
    assert diagrams._cells_for(torch.zeros(20_000, 1, 1, 1)) == diagrams.CELLS_OF_GREY_IMAGES
    assert diagrams._cells_for(torch.zeros(2, 3, 1, 1)) == diagrams.CELLS_OF_PHOTOGRAPHS


def test_pieces_of_images_have_as_many_poses_as_the_candidate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagrams, "_cells_for", lambda x: (Cells(2, "usual", 1.0, 0.3, poses=3),))
    monkeypatch.setattr(diagrams, "usual_epochs", lambda n: 2)
    X, y = load_digits(return_X_y=True)
    x, y = torch.tensor(X[:100] / 16).float().reshape(-1, 1, 8, 8), torch.tensor(y[:100])
    fitted = fit_cells(x, y, ThreatModel("l2", 0.4, (0.0, 1.0)), minutes=1.0)
    assert fitted.facts["pieces"] == 60
    assert fitted.facts["settings"]["poses"] == 3
    assert fitted.module.interpolation.diagram.slopes.shape == (60, 64)  # type: ignore[union-attr]


def test_the_better_half_meets_again_on_other_splits_for_longer() -> None:
    """Three of the five candidates after the first round, then two; an unlucky split is made up for."""
    truth = {Cells(pieces, None, 1.0, 1.0): float(pieces) for pieces in range(1, 6)}
    first, best = min(truth, key=lambda tried: truth[tried]), max(truth, key=lambda tried: truth[tried])
    seen = []

    def score(tried: Cells, split: int, share: float) -> float:
        seen.append((split, share))
        return truth[tried] - (2.5 if split == 0 and tried == best else 0.0)

    chosen, trials = diagrams._rounds(dict.fromkeys(truth, 0.0), score, 0.3, 1, math.inf)
    assert chosen == best
    assert [trials[tried].share for tried in truth] == [0.3, 0.3, 0.6, 0.6, 0.6]
    assert trials[best].scores == [5.0, 5.0], "those of shorter trainings do not count"
    assert seen == [(0, 0.3)] * 5 + [(1, 0.6)] * 3 + [(2, 0.6)] * 2, "no training is longer than a whole one"
    assert diagrams._rounds(dict.fromkeys(truth, 1.0), score, 0.3, 1, -math.inf) == (first, {})
    seen.clear()
    chosen, trials = diagrams._rounds(dict.fromkeys(truth, 0.0), score, 0.6, 2, math.inf)
    assert chosen == best
    assert [len(trials[tried].scores) for tried in truth] == [2, 2, 4, 6, 6]
    assert seen[:16] == [(0, 0.6)] * 5 + [(1, 0.6)] * 5 + [(2, 0.6)] * 3 + [(3, 0.6)] * 3


def test_rounds_keep_to_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all fit the last candidates are left out of the first round, and the worse rivals of later ones."""
    tried = [Cells(pieces, None, 1.0, 1.0) for pieces in (4, 3, 2, 1)]
    clock = [0.0]
    monkeypatch.setattr(diagrams.time, "perf_counter", lambda: clock[0])

    def score(candidate: Cells, split: int, share: float) -> float:
        clock[0] += 4 * share * (1 if candidate in tried[::2] else 3)  # seconds
        return float(candidate.pieces or 0)

    def splits(latest: float, most: int, expected: float = 12.0) -> list[int]:
        clock[0] = 0.0
        chosen, trials = diagrams._rounds(dict.fromkeys(tried, expected), score, 1.0, most, latest)
        assert chosen == tried[0]
        assert clock[0] <= latest
        return [len(trials[candidate].scores) if candidate in trials else 0 for candidate in tried]

    assert splits(23.0, 1) == [0, 0, 0, 0], "one alone need not be tried"
    assert splits(24.0, 1) == [1, 1, 0, 0]
    assert splits(36.0, 1) == [2, 2, 1, 0]  # 20 seconds, and 16 for two rivals
    assert splits(40.0, 1, expected=10.0) == [1, 1, 1, 1]  # 32 seconds
    assert splits(48.0, 1) == [2, 2, 1, 1]
    assert splits(100.0, 9) == [5, 5, 1, 1]  # no second split beyond half of the time
    assert splits(200.0, 9) == [9, 9, 3, 3]
    unlike = {tried[0]: 4.0, tried[1]: 8.0}
    for latest, tries in ((11.9, 0), (12.0, 2)):
        clock[0] = 0.0
        assert len(diagrams._rounds(unlike, lambda *_: 0.0, 1.0, 1, latest)[1]) == tries
