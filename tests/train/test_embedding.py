"""The loop that learns a metric: its loss against all triplets one by one, what it does to neighbours, resuming."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from otad.errors import ModelFolderError
from otad.neighbors import nearest_neighbors
from otad.nn.embedding import build_embedding
from otad.train import fit_embedding
from otad.train.embedding import TripletLoss

Data = tuple[Tensor, Tensor]
KINDS = ["learned", "robust"]


@pytest.fixture(scope="module")
def digits() -> Data:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:600] / 16, dtype=torch.float32), torch.tensor(y[:600])


def embedding_of(kind: str, x: Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_embedding(kind, x.mean(0), 32)


@pytest.mark.parametrize("mining", ["semihard", "nearest"])
def test_loss_is_that_of_all_triplets_one_by_one(mining) -> None:
    generator = torch.Generator().manual_seed(0)
    e, y = torch.randn(24, 4, generator=generator, dtype=torch.float64), torch.arange(24) % 4
    margin, found = 0.7, []
    d = [[float((a - b).norm()) for b in e] for a in e]
    for a in range(24):
        positives = [p for p in range(24) if p != a and y[p] == y[a]]
        negatives = [n for n in range(24) if y[n] != y[a]]
        if mining == "semihard":
            pairs = [(p, n) for p in positives for n in negatives if 0 < d[a][n] - d[a][p] < margin]
        else:
            pairs = [(min(positives, key=d[a].__getitem__), min(negatives, key=d[a].__getitem__))]
        found += [max(0.0, margin + d[a][p] - d[a][n]) for p, n in pairs]
    assert float(TripletLoss(margin, mining)(e, y)) == pytest.approx(sum(found) / len(found), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbors_of_held_out_samples_agree_more_often(kind: str, digits: Data) -> None:
    x, y = digits
    embedding = embedding_of(kind, x)
    history = fit_embedding(embedding, x[:400], y[:400], device="cpu")
    assert [row.epoch for row in history] == list(range(1, len(history) + 1))
    assert not embedding.training
    assert not any(p.requires_grad for p in embedding.parameters())

    def agreement(e: Tensor) -> float:
        _, indices = nearest_neighbors(e[400:], e[:400], 10)
        return float((y[indices] == y[400:, None]).double().mean())

    assert agreement(embedding(x)) > agreement(x) + 0.02
    assert kind == "learned" or float(embedding.lipschitz) < 1 + 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_an_uninterrupted_one(
    kind: str, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from otad.train.state import TrainingState

    x = digits[0].reshape(-1, 1, 8, 8)[:200] if kind == "learned" else digits[0][:200]
    y, settings = digits[1][:200], {"epochs": 3, "device": "cpu"}
    whole = embedding_of(kind, x)
    fit_embedding(whole, x, y, **settings)
    save, calls = TrainingState.save, []

    def stopping(self, *args):  # type: ignore[no-untyped-def]
        save(self, *args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_embedding(embedding_of(kind, x), x, y, checkpoint=tmp_path, **settings)
    monkeypatch.setattr(TrainingState, "save", save)
    parts = embedding_of(kind, x)
    history = fit_embedding(parts, x, y, checkpoint=tmp_path, resume=True, **settings)
    assert len(history) == 3
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    with pytest.raises(ModelFolderError, match="margin"):
        fit_embedding(parts, x, y, margin=9.0, checkpoint=tmp_path, resume=True, **settings)
