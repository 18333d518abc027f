"""Retrieval in a metric of choice: known metrics, the neighbours that stay, copies, gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

from otad.attacks import AttackerKnowledge, ThreatModel, run_attacks
from otad.cip import Regularity
from otad.defense import OTAD, NeighborhoodInterpolation
from otad.nn import CenteredFlatten, OrthogonalEmbedding, residual_embedding
from otad.retrieval import Retrieval


class Linear(nn.Module):
    """A fixed linear embedding; its constant is the spectral norm."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.lipschitz = float(torch.linalg.matrix_norm(matrix, ord=2))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T


def data(n: int = 80, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(retrieval: Retrieval | None, x: Tensor, k: int = 6) -> OTAD:
    torch.manual_seed(1)
    head = nn.Linear(x.shape[1], 3, dtype=x.dtype)
    interpolation = NeighborhoodInterpolation(
        x, 0.5 * x + torch.tanh(x), k=k, retrieval=retrieval, regularity=Regularity(0.0, 2.0)
    )
    return OTAD(CenteredFlatten(torch.zeros(x.shape[1], dtype=x.dtype)), interpolation, head)


def test_a_linear_embedding_gives_the_neighbors_of_the_transformed_points() -> None:
    x, queries, matrix = data(), data(30, seed=1), data(3, seed=2)
    found = model_of(Retrieval.of(Linear(matrix), x), x).features(queries).stats
    apart = torch.linalg.vector_norm((queries[:, None] - x[None]) @ matrix.T, dim=2).sort(dim=1)
    assert torch.equal(found["indices"], apart.indices[:, :6])
    torch.testing.assert_close(found["distances"], apart.values[:, :6], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["next_distance"], apart.values[:, 6], rtol=1e-12, atol=1e-12)
    # The interpolation itself still happens in stem units: an isometry changes nothing.
    rotation = torch.linalg.qr(data(5, seed=3)).Q
    rotated, plain = model_of(Retrieval.of(Linear(rotation), x), x), model_of(None, x)
    torch.testing.assert_close(rotated(queries), plain(queries), rtol=1e-9, atol=1e-9)


def test_gradients_hold_the_neighbors() -> None:
    x = data()
    model = model_of(Retrieval.of(Linear(data(3, seed=2)), x), x)
    queries = data(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(model, (queries,), atol=1e-5)


@pytest.mark.parametrize("kind", ["learned", "robust"])
def test_copies_keep_the_neighbors(kind: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(60, 1, 8, 8)
    embedding = residual_embedding(images.mean(0)) if kind == "learned" else OrthogonalEmbedding(images.mean(0))
    retrieval = Retrieval.of(embedding, images)
    points = images.flatten(1)
    head = nn.Linear(64, 3)
    model = OTAD(
        CenteredFlatten(torch.zeros(1, 8, 8)), NeighborhoodInterpolation(points, points, retrieval=retrieval), head
    )
    queries = torch.rand(17, 1, 8, 8)
    found = model.features(queries).stats
    for same in (model.exact(), copy.deepcopy(model).half().float(), model.smoothed(0.5)):
        assert torch.equal(
            same.features(queries.to(next(same.head.parameters()).dtype)).stats["indices"], found["indices"]
        )
    assert retrieval.points.dtype == torch.float64
    alone = torch.cat([model.features(row[None]).stats["indices"] for row in queries])
    assert torch.equal(alone, found["indices"])
    assert next(model.parameters()).dtype == queries.dtype  # by this, tools choose the precision of inputs
    # A training input is its own nearest neighbour.
    own = model.features(images).stats
    assert torch.equal(own["indices"][:, 0], torch.arange(60))
    assert float(own["distances"][:, 0].max()) < 1e-5


def test_the_constant_of_an_orthogonal_embedding_is_never_exceeded() -> None:
    """Over random pairs, and over pairs that gradient ascent drove to the largest quotient."""
    torch.manual_seed(0)
    embedding = OrthogonalEmbedding(torch.randn(12), width=32)
    for weight in embedding.weights:
        weight.data += 0.3 * torch.randn_like(weight)  # not orthogonal: the constant has to be found
    retrieval = Retrieval.of(embedding, torch.randn(5, 12))
    x = torch.randn(200, 12, dtype=torch.float64)
    step = torch.randn(200, 12, dtype=torch.float64) * 10 ** (-3 * torch.rand(200, 1, dtype=torch.float64))

    def quotient(a: Tensor, b: Tensor) -> Tensor:
        return (retrieval(a + b) - retrieval(a)).norm(dim=1) / b.norm(dim=1)

    assert retrieval.lipschitz > 1
    assert float(quotient(x, step).max()) <= retrieval.lipschitz
    x.requires_grad_()
    step.requires_grad_()
    optimizer = torch.optim.Adam([x, step], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        quotient(x, step).log().sum().neg().backward()
        optimizer.step()
    largest = float(quotient(x, step).detach().max())
    assert 0.5 * retrieval.lipschitz < largest <= retrieval.lipschitz


def test_the_constant_is_that_of_loaded_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    first, second = (OrthogonalEmbedding(x.mean(0), width=16) for _ in range(2))
    for weight in second.weights:
        weight.data *= 3
    retrieval, longer = Retrieval.of(first, x), Retrieval.of(second, x)
    retrieval.load_state_dict(longer.state_dict())
    assert retrieval.lipschitz == longer.lipschitz == pytest.approx(27, rel=1e-5)


def test_training_mode_moves_nothing() -> None:
    """Batch statistics of a learned embedding stay as they were, and answers do not depend on the batch."""
    torch.manual_seed(0)
    images = torch.rand(60, 1, 8, 8)
    points = images.flatten(1)
    retrieval = Retrieval.of(residual_embedding(images.mean(0)), images)
    interpolation = NeighborhoodInterpolation(points, points, k=5, retrieval=retrieval)
    model = OTAD(CenteredFlatten(torch.zeros(1, 8, 8)), interpolation, nn.Linear(64, 3))
    queries = torch.rand(20, 1, 8, 8)
    before = model(queries)
    nn.Sequential(model).train()
    assert torch.equal(model(queries), before)
    assert torch.equal(model.eval()(queries), before)


@pytest.mark.parametrize("shape", [(12,), (300,), (2, 5, 5)])
def test_orthogonalised_layers_are_orthogonal(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    embedding = OrthogonalEmbedding(torch.zeros(shape), width=64).double()
    for weight in embedding.weights:
        weight.data += 0.2 * torch.randn_like(weight)
    embedding.orthogonalise()
    for weight in embedding.weights:
        weight = weight.detach()
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-10)
    assert abs(embedding.lipschitz - 1) < 1e-8


def test_the_attacker_always_gets_the_model_s_own_embedding() -> None:
    """Coordinates 0 and 1 alone choose the neighbours: an attack through the wrong embedding never finds them."""
    x = data(60, 6, seed=4)
    x[:, 2:] *= 3
    y = (x[:, 0] > 0).long()
    matrix = torch.eye(6, dtype=torch.float64)[:2]
    interpolation = NeighborhoodInterpolation(
        x, x, k=1, retrieval=Retrieval.of(Linear(matrix), x), regularity=Regularity(0.0, 2.0)
    )
    head = nn.Linear(6, 2, dtype=torch.float64)
    head.weight.data = torch.eye(6, dtype=torch.float64)[:1] * torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    head.bias.data.zero_()
    model = OTAD(CenteredFlatten(torch.zeros(6, dtype=torch.float64)), interpolation, head)
    assert isinstance(model.retrieval_space, Retrieval)
    wrong = AttackerKnowledge(x, y, embedding=Linear(torch.eye(6, dtype=torch.float64)[2:]))
    assert wrong.about(model).embedding is model.retrieval_space
    settings = {"retrieval": {"refine_steps": 0, "steps": 10}}
    found = run_attacks(model, x, y, ThreatModel("l2", 1.0), settings, knowledge=wrong)["retrieval"]
    # A sample breaks within the budget where the bisector of two points of the plane is that near.
    plane = x[:, :2]
    other = y[:, None] != y[None]
    apart = torch.cdist(plane, plane).masked_fill(~other, torch.inf).amin(dim=1) / 2
    assert bool((~found.survived)[apart < 0.5].all())


def test_a_retrieval_must_fit_its_training_points() -> None:
    x = data()
    retrieval = Retrieval.of(Linear(data(3, seed=2)), x[:-1])
    with pytest.raises(ValueError, match="holds 79 points, but there are 80"):
        NeighborhoodInterpolation(x, x, retrieval=retrieval)
    with pytest.raises(ValueError, match="both or neither"):
        NeighborhoodInterpolation(x, x)(x, x)
