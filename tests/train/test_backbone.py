"""The training loop: what the transport cost does, determinism, resuming."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from otad.errors import ModelFolderError
from otad.nn import Backbone, residual_mlp
from otad.train import fit_backbone

Data = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Data:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:500] / 16, dtype=torch.float32), torch.tensor(y[:500])


def network(x: Tensor) -> Backbone:
    torch.manual_seed(0)
    return residual_mlp(x.mean(0), 10, n_blocks=3)


def test_transport_cost_is_traded_for_alpha(digits: Data) -> None:
    costs = []
    for alpha in (0.0, 1e-3, 1e-1):
        history = fit_backbone(network(digits[0]), *digits, alpha=alpha, epochs=8, device="cpu")
        costs.append(history[-1].transport_cost)
    assert costs[0] > costs[1] > costs[2]


def test_loss_falls_and_the_network_is_left_frozen(digits: Data) -> None:
    backbone = network(digits[0])
    history = fit_backbone(backbone, *digits, epochs=8, device="cpu")
    assert history[-1].loss < history[0].loss
    assert history[-1].accuracy > history[0].accuracy
    assert [row.epoch for row in history] == list(range(1, 9))
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


def test_margin_raises_the_certified_distance(digits: Data) -> None:
    """What the margin is for: feature distance to the boundary over the map's largest quotient."""
    radii = []
    for margin in (0.0, 1.0):
        backbone = network(digits[0])
        fit_backbone(backbone, *digits, margin=margin, epochs=20, device="cpu")
        x = backbone.stem(digits[0])
        z = backbone.transport(x)[0]
        logits, rows = backbone.head(z), backbone.head.weight
        apart = (rows[digits[1]][:, None] - rows).norm(dim=2)
        distance = (logits.gather(1, digits[1][:, None]) - logits) / apart
        distance = distance.scatter(1, digits[1][:, None], torch.inf).amin(1)
        radii.append(float(distance.median() / (torch.pdist(z) / torch.pdist(x)).amax()))
    assert radii[1] > radii[0]


def test_same_seed_same_weights(digits: Data) -> None:
    first, second, other = (network(digits[0]) for _ in range(3))
    fit_backbone(first, *digits, epochs=2, seed=3, device="cpu")
    fit_backbone(second, *digits, epochs=2, seed=3, device="cpu")
    fit_backbone(other, *digits, epochs=2, seed=4, device="cpu")
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head.weight, other.head.weight)


def interrupted(backbone: Backbone, digits: Data, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Train, and be stopped in the epoch after `after`."""
    from otad.train.state import TrainingState

    save, calls = TrainingState.save, []

    def counting(self, *args):  # type: ignore[no-untyped-def]
        save(self, *args)
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", counting)
    with pytest.raises(KeyboardInterrupt):
        fit_backbone(backbone, *digits, epochs=5, checkpoint=folder, device="cpu")
    monkeypatch.setattr(TrainingState, "save", save)


def test_resumed_run_equals_an_uninterrupted_one(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = network(digits[0]), network(digits[0])
    fit_backbone(whole, *digits, epochs=5, device="cpu")
    interrupted(parts, digits, tmp_path, monkeypatch, after=2)
    parts = network(digits[0])
    history = fit_backbone(parts, *digits, epochs=5, checkpoint=tmp_path, resume=True, device="cpu")
    assert len(history) == 5
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_checkpoint_of_other_settings_is_refused(digits: Data, tmp_path: Path) -> None:
    fit_backbone(network(digits[0]), *digits, epochs=1, checkpoint=tmp_path, device="cpu")
    with pytest.raises(ModelFolderError, match="alpha"):
        fit_backbone(network(digits[0]), *digits, epochs=1, alpha=0.5, checkpoint=tmp_path, resume=True, device="cpu")


def test_checkpoint_of_other_data_is_refused(digits: Data, tmp_path: Path) -> None:
    x, y = digits
    fit_backbone(network(x), x, y, epochs=1, checkpoint=tmp_path, device="cpu")
    for other in ((x.flip(0), y), (x, y.flip(0))):
        with pytest.raises(ModelFolderError, match="data"):
            fit_backbone(network(x), *other, epochs=1, checkpoint=tmp_path, resume=True, device="cpu")


def test_damaged_checkpoint_is_refused(digits: Data, tmp_path: Path) -> None:
    (tmp_path / "backbone.checkpoint").write_bytes(b"no checkpoint")
    with pytest.raises(ModelFolderError, match="delete it"):
        fit_backbone(network(digits[0]), *digits, epochs=1, checkpoint=tmp_path, resume=True, device="cpu")
