"""The training loop: what the transport cost does, determinism, resuming."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from otad.errors import ModelFolderError
from otad.nn import BACKBONES, Backbone, build_backbone, residual_mlp
from otad.train import fit_backbone
from otad.train.margin import row_distances

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


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_moves_its_points_less_for_the_cost(name: str, digits: Data) -> None:
    images = digits[0][:200].reshape(-1, 1, 8, 8), digits[1][:200]
    costs = []
    for alpha in (0.0, 1e-1):
        backbone = small(name, images[0])
        settings = {"epochs": 8, "batch_size": 32, "learning_rate": 3e-3, "device": "cpu"}
        history = fit_backbone(backbone, *images, alpha=alpha, **settings)
        assert history[-1].loss < history[0].loss
        assert len(history[-1].block_costs) == len(backbone.blocks)
        assert sum(history[-1].block_costs) == pytest.approx(history[-1].transport_cost)
        costs.append(float(backbone.transport(backbone.stem(images[0]))[1].mean()))
    assert costs[1] < costs[0] / 2


def small(name: str, images: Tensor) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(name, images.mean(0), 10, n_blocks=2, width=16)


def test_block_costs_are_the_squared_steps_of_the_path(digits: Data) -> None:
    backbone = small("transformer", digits[0][:100].reshape(-1, 1, 8, 8))
    inputs = digits[0][:100].reshape(-1, 1, 8, 8)
    with torch.no_grad():
        for value in backbone.parameters():
            value += 0.1 * torch.randn_like(value)
    path = [backbone.stem(inputs).detach()]
    with torch.no_grad():
        for block in backbone.blocks:
            path.append(path[-1] + block(path[-1]))
    steps = [float((b - a).square().sum(1).mean()) for a, b in pairwise(path)]
    # With rate zero the epoch tells of the network as it is.
    (epoch,) = fit_backbone(backbone, inputs, digits[1][:100], learning_rate=0.0, epochs=1, device="cpu")
    assert epoch.block_costs == pytest.approx([4 * step for step in steps], rel=1e-4)
    assert epoch.transport_cost == pytest.approx(4 * sum(steps), rel=1e-4)


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


@pytest.mark.parametrize("name", BACKBONES)
def test_resumed_run_equals_an_uninterrupted_one(
    name: str, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = digits[0][:200].reshape(-1, 1, 8, 8), digits[1][:200]
    whole, parts = small(name, data[0]), small(name, data[0])
    expected = fit_backbone(whole, *data, epochs=5, device="cpu")
    interrupted(parts, data, tmp_path, monkeypatch, after=2)
    parts = small(name, data[0])
    history = fit_backbone(parts, *data, epochs=5, checkpoint=tmp_path, resume=True, device="cpu")
    assert [epoch.block_costs for epoch in history] == [epoch.block_costs for epoch in expected]
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_of_other_settings_is_refused(digits: Data, tmp_path: Path) -> None:
    fit_backbone(network(digits[0]), *digits, epochs=1, checkpoint=tmp_path, device="cpu")
    with pytest.raises(ModelFolderError, match="alpha"):
        fit_backbone(network(digits[0]), *digits, epochs=1, alpha=0.5, checkpoint=tmp_path, resume=True, device="cpu")


def test_checkpoint_of_another_network_of_the_same_shapes_is_refused(digits: Data, tmp_path: Path) -> None:
    images, labels = digits[0][:64].reshape(-1, 1, 8, 8), digits[1][:64]

    def network_of(heads: int) -> Backbone:
        return build_backbone("transformer", images.mean(0), 10, n_blocks=1, width=16, options={"heads": heads})

    fit_backbone(network_of(4), images, labels, epochs=1, checkpoint=tmp_path, device="cpu")
    with pytest.raises(ModelFolderError, match="network"):
        fit_backbone(network_of(2), images, labels, epochs=1, checkpoint=tmp_path, resume=True, device="cpu")


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


def test_threads_do_not_change_the_gradients_of_a_margin(two_threads: None) -> None:
    """Rows of a head that many samples share take their gradients in a fixed order."""
    torch.manual_seed(0)
    start, labels = torch.randn(3, 800), torch.arange(4096) % 3
    found = []
    for _ in range(6):
        rows = start.clone().requires_grad_()
        (row_distances(rows, labels) * torch.linspace(-1, 1, 4096)[:, None]).sum().backward()
        found.append(rows.grad)
    assert all(torch.equal(found[0], again) for again in found[1:])
