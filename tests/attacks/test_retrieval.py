from functools import partial

import pytest
import torch
from torch import Tensor, nn

from otad.attacks import ThreatModel, bpda, joint, retrieval
from otad.attacks.soft_neighbors import SoftNeighbors
from tests.attacks.known import Linear, assert_tight, assert_within, linear, two_prototypes


def knowing(model, **settings) -> dict:
    return {"x_train": model.prototypes, "y_train": torch.tensor([0, 1])} | settings


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("refine_steps", [0, 20])
def test_retrieval_is_tight_between_two_prototypes(norm, refine_steps: int) -> None:
    model, x, y = two_prototypes()
    assert_tight(partial(retrieval, **knowing(model, refine_steps=refine_steps)), model, x, y, norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_joint_is_tight_between_two_prototypes(norm) -> None:
    model, x, y = two_prototypes()
    assert_tight(partial(joint, **knowing(model)), model, x, y, norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_joint_is_tight_on_linear_models(norm) -> None:
    """The last stage climbs the true margin alone, whatever the training points say."""
    model, x, y = linear(classes=3, d=8)
    train = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    points = {"x_train": train, "y_train": model(train).argmax(dim=1), "n_targets": 2}
    assert_tight(partial(joint, **points, steps=40), model, x, y, norm)


class Lookup(nn.Module):
    """1-NN in an embedded space: a one-hot answer, no gradient at all."""

    def __init__(self, embedding: nn.Module, x_train: Tensor, y_train: Tensor) -> None:
        super().__init__()
        self.embedding, self.points, self.labels = embedding, embedding(x_train).detach(), y_train

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(self.embedding(x), self.points).argmin(dim=1)
        return nn.functional.one_hot(self.labels[nearest], 3).to(x)


def test_the_gradient_runs_through_the_embedding() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Linear(6, 2, bias=False)  # most directions of the input are invisible to the retrieval
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(2, 6, generator=generator))
    x_train = torch.randn(60, 6, generator=generator)
    y_train = torch.arange(60) % 3
    model = Lookup(embedding, x_train, y_train)
    x = torch.randn(40, 6, generator=generator)
    y = model(x).argmax(dim=1)
    # The smallest perturbation into another cell of the embedded space, from the planes between points.
    e, points = embedding(x).detach().double(), model.points.double()
    squares = torch.cdist(e, points).square()
    own = y_train[None] == y[:, None]
    gaps = (squares[:, :, None] - squares[:, None, :]) / (2 * torch.cdist(points, points)).clamp_min(1e-12)
    bound = gaps.masked_fill(~own[:, None, :], -torch.inf).amax(dim=2).masked_fill(own, torch.inf).amin(dim=1)
    stretch = float(torch.linalg.matrix_norm(embedding.weight.detach().double(), ord=2))
    threat = ThreatModel("l2", 1.5 * float(bound.median()) / stretch)
    settings = {"x_train": x_train, "y_train": y_train, "embedding": embedding, "refine_steps": 0}
    x_adv = retrieval(model, x, y, threat, **settings)
    assert_within(x_adv, x, threat)
    broken = model(x_adv).argmax(dim=1) != y
    assert not bool(broken[bound > stretch * threat.eps * (1 + 1e-6)].any())
    blind = retrieval(model, x, y, threat, x_train=x_train, y_train=y_train, refine_steps=0)
    assert int(broken.sum()) > int((model(blind).argmax(dim=1) != y).sum())


def test_soft_neighbors_become_the_nearest_one() -> None:
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(50, 4, generator=generator), torch.arange(50) % 4
    x = torch.randn(30, 4, generator=generator)
    soft = SoftNeighbors(points, labels, n_classes=5, temperature=1e-4)
    nearest = labels[torch.cdist(x, points).argmin(dim=1)]
    assert torch.equal(soft(x).argmax(dim=1), nearest)
    assert bool((soft(x)[:, 4] == -torch.inf).all())
    # Differences of scores are differences of squared distances, in units of the scale.
    squares = torch.cdist(x, points).square()
    best = torch.stack([squares[:, labels == c].amin(dim=1) for c in range(4)], dim=1)
    scores = soft(x)[:, :4] * soft.scale
    assert torch.allclose(scores[:, 1:] - scores[:, :1], best[:, :1] - best[:, 1:], atol=1e-2)


def test_bpda_follows_the_backbone_and_is_judged_by_the_model() -> None:
    model, x, y = linear(classes=3, d=8)

    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x).detach()

    threat = ThreatModel("l2", 1.5 * float(model.distance(x, "l2").max()))
    x_adv = bpda(Hidden(), x, y, threat, backbone=model)
    assert_within(x_adv, x, threat)
    assert bool((model(x_adv).argmax(dim=1) != y).all())
    # A backbone that knows nothing leads nowhere near as far.
    lost = Linear(-model.weight.detach(), model.bias.detach())
    assert bool((model(bpda(Hidden(), x, y, threat, backbone=lost)).argmax(dim=1) == y).any())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_bpda_is_tight_with_the_model_as_its_own_backbone(norm) -> None:
    model, x, y = two_prototypes()
    assert_tight(partial(bpda, backbone=model, steps=40), model, x, y, norm)


def test_bad_settings_are_refused() -> None:
    model, x, y = two_prototypes(n=2)
    with pytest.raises(ValueError, match="at least 1"):
        retrieval(model, x, y, ThreatModel("l2", 1.0), **knowing(model, guides=0))
