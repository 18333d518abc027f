"""Power diagrams in training: distances against the proven ones, gradients, what training gains, resuming."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from otad.certificate import certify
from otad.defense import OTAD, CellInterpolation, identity_head
from otad.errors import ModelFolderError
from otad.nn import CenteredFlatten, EncodedStem, MaxMinEncoder, dense_encoders
from otad.train import DiagramRefinement, LearnedDiagram, refine_diagram
from otad.train.diagram import _Objective


def digits(first: int, last: int) -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[first:last] / 16, dtype=torch.float32), torch.tensor(y[first:last])


def identity() -> nn.Linear:
    head = nn.Linear(10, 10)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def trained(box: tuple[float, float] | None, **options: object) -> tuple[CenteredFlatten, DiagramRefinement]:
    x, y = digits(0, 400)
    stem = CenteredFlatten(x.mean(0))
    diagram = LearnedDiagram(stem(x[:100]), y[:100])
    settings: dict = {"target_radius": 0.4, "epochs": 6, "seed": 3, "box": box} | options
    return stem, refine_diagram(diagram, stem, x, y, **settings)


@pytest.fixture(scope="module", params=[None, (0.0, 1.0)], ids=["anywhere", "in the box"])
def refined(request: pytest.FixtureRequest) -> tuple[OTAD, DiagramRefinement, tuple[float, float] | None]:
    stem, found = trained(request.param)
    return OTAD(stem, CellInterpolation(found.diagram), identity()), found, request.param


Refined = tuple[OTAD, DiagramRefinement, tuple[float, float] | None]


def test_training_raises_certified_accuracy_on_unseen_samples(refined: Refined) -> None:
    model, found, box = refined
    x, y = digits(400, 800)
    start = LearnedDiagram(model.stem(digits(0, 100)[0]), digits(0, 100)[1]).fixed()
    before = OTAD(model.stem, CellInterpolation(start), identity())
    shares = [certify(m, x, box=box).certified(0.4, y.numpy()) for m in (before, model)]
    assert shares[1] > shares[0] + 0.05
    assert found.after["certified"] > found.before["certified"]
    assert found.history[-1].loss < found.history[0].loss


def test_distances_of_training_are_proven(refined: Refined) -> None:
    """The fast path looks at few planes, so what is proven is at least as much, up to float32 and allowances."""
    model, found, box = refined
    x, y = digits(0, 400)
    certificate = certify(model, x, box=box)
    assert found.after["accuracy"] == pytest.approx(np.mean(certificate.label == y.numpy()), abs=0.003)
    assert certificate.certified(0.399, y.numpy()) >= found.after["certified"] - 0.003


def test_a_box_certifies_more_and_steps_inside_of_it_change_no_label(refined: Refined) -> None:
    model, x = refined[0].exact(), digits(400, 500)[0]
    anywhere, inside = certify(refined[0], x), certify(refined[0], x, box=(0.0, 1.0))
    assert (inside.radius >= anywhere.radius).all()
    assert inside.radius.mean() > 1.01 * anywhere.radius.mean()
    radius, label = torch.from_numpy(inside.radius), torch.from_numpy(inside.label)
    x = x.double()
    for target in range(10):
        moved = x.clone().requires_grad_()
        for _ in range(10):
            logits = model(moved)
            gain = logits[:, target] - logits.gather(1, label[:, None]).squeeze(1)
            (gradient,) = torch.autograd.grad(gain.sum(), moved)
            step = (moved.detach() + 0.5 * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(
                0, 1
            ) - x
            step = step * (0.9999 * radius / step.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]
            moved = (x + step).requires_grad_()
        same = model(moved).argmax(1) == label
        assert same[radius > 0].all()


@pytest.mark.parametrize("counts", [[1, 3, 8], [30, 20, 2]])
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(("coarse", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_planes_are_those_of_a_search(
    encoded: bool, counts: list[int], coarse: torch.dtype, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best four of the label against the best eight of each other class, by loops; one sample at a time, too.

    In half precision pieces that are nearly as good may be found instead, whose least distance is about the same.
    """
    monkeypatch.setattr("otad.train.learned_diagram._coarse", lambda device: coarse)
    draws = torch.Generator().manual_seed(0)
    classes = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    diagram = LearnedDiagram(torch.randn(len(classes), 5, generator=draws), classes, encoded=encoded)
    diagram.weights.data = 2 * torch.randn(len(classes), generator=draws)
    x, y = torch.randn(300, 5, generator=draws), torch.arange(300) % 3
    fixed = diagram.fixed()
    scores = x.double() @ fixed.slopes.T + fixed.intercepts
    planes = (scores[:, :, None] - scores[:, None]) / torch.cdist(fixed.slopes, fixed.slopes).clamp(min=1e-12)

    def best(n: int, c: int, most: int) -> list[int]:
        return [i for i in scores[n].argsort(descending=True).tolist() if classes[i] == c][:most]

    expected = torch.empty(300, 2)
    for n, c in enumerate(y.tolist()):
        kept = [
            [float(planes[n, i, best(n, other, 8)].min()) for other in range(3) if other != c] for i in best(n, c, 4)
        ]
        expected[n] = torch.tensor(max(kept, key=min))
    for pairs, numbers in ((1000, 1 << 21), (0, 1 << 21), (0, 1)):
        monkeypatch.setattr("otad.train.learned_diagram.ALL_PAIRS", pairs)
        monkeypatch.setattr("otad.train.learned_diagram.AT_ONCE", (numbers, numbers))
        found = diagram(x, y).sort(1).values
        compared = slice(None) if coarse == torch.float32 else slice(1)
        torch.testing.assert_close(found[:, compared], expected.sort(1).values[:, compared], atol=within, rtol=within)


@pytest.mark.parametrize("box", [None, (torch.full((5,), -1.0).double(), torch.full((5,), 1.0).double())])
def test_gradients_are_those_of_finite_differences(box: tuple[Tensor, Tensor] | None) -> None:
    draws = torch.Generator().manual_seed(0)
    diagram = LearnedDiagram(torch.randn(12, 5, generator=draws).double(), torch.arange(12) % 3)
    x = (2 * torch.rand(6, 5, generator=draws) - 1).double()
    y = diagram.fixed()(x)[0].argmax(1)  # on the near side of every plane

    def least(sites: Tensor, weights: Tensor) -> Tensor:
        parts = {"sites": sites, "weights": weights}
        return torch.func.functional_call(diagram, parts, (x, y, box)).amin(1)

    parts = [diagram.sites.detach().requires_grad_(), diagram.weights.detach().requires_grad_()]
    torch.autograd.gradcheck(least, parts, eps=1e-6, atol=1e-4, rtol=1e-3)


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from otad.train.state import TrainingState

    whole = trained((0.0, 1.0), epochs=3)[1]
    save, saved = TrainingState.save, []

    def interrupting(self, *args):  # type: ignore[no-untyped-def]
        save(self, *args)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", interrupting)
        with pytest.raises(KeyboardInterrupt):
            trained((0.0, 1.0), epochs=3, checkpoint=tmp_path)
    resumed = trained((0.0, 1.0), epochs=3, checkpoint=tmp_path, resume=True)[1]
    assert torch.equal(resumed.diagram.slopes, whole.diagram.slopes)
    with pytest.raises(ModelFolderError, match="box"):
        trained(None, epochs=3, checkpoint=tmp_path, resume=True)
    with pytest.raises(ModelFolderError, match="other ramp;"):
        trained((0.0, 1.0), epochs=3, checkpoint=tmp_path, resume=True, ramp=1.0)


def test_training_commutes_with_a_change_of_units() -> None:
    x, y = digits(0, 200)

    def sites(unit: float) -> Tensor:
        stem = CenteredFlatten(unit * x.mean(0))
        diagram = LearnedDiagram(stem(unit * x[:60]), y[:60])
        refine_diagram(diagram, stem, unit * x, y, target_radius=0.4 * unit, epochs=2, batch_size=50, box=(0.0, unit))
        return diagram.sites.detach()

    start, one = LearnedDiagram(digits(0, 60)[0] - x.mean(0), y[:60]).sites, sites(1.0)
    assert (one - start).norm() > 0.1 * start.norm()
    assert torch.allclose(sites(8.0), 8 * one, rtol=1e-3, atol=1e-3)


def test_a_ramp_weighs_samples_by_how_far_they_are_on_the_wrong_side() -> None:
    """The gradient of one sample is its plain one times the sigmoid, and in a pair the hopeless one is left alone."""
    x, y = digits(0, 100)
    stem = CenteredFlatten(x.mean(0))

    def moves(rows: Tensor, wrong: Tensor, ramp: float | None) -> Tensor:
        diagram = LearnedDiagram(stem(x[:50]), y[:50])
        loss = _Objective(stem, diagram, 0.4, 0.2, ramp, None)(x[rows], wrong)[0]
        loss.backward()
        assert diagram.sites.grad is not None
        return diagram.sites.grad

    row = torch.tensor([70])
    for label in (y[row], (y[row] + 1) % 10):
        radius = LearnedDiagram(stem(x[:50]), y[:50])(stem(x[row]), label).amin()
        for ramp in (0.0, 0.5, 2.0):
            weight = torch.sigmoid((radius / 0.4 + ramp) / 0.25)
            assert torch.allclose(moves(row, label, ramp), weight * moves(row, label, None), rtol=1e-4, atol=1e-7)
    assert moves(row, (y[row] + 1) % 10, 0.0).norm() < 0.05 * moves(row, (y[row] + 1) % 10, None).norm()


def test_a_ramp_gives_up_wrong_labels_and_certifies_more_of_the_right_ones() -> None:
    draws = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    x = torch.randn(400, 6, generator=draws) + 2.0 * torch.nn.functional.one_hot(y, 6)
    noisy = torch.where(torch.rand(400, generator=draws) < 0.2, 1 - y, y)
    stem = CenteredFlatten(x.mean(0))
    shares = []
    for ramp in (None, 0.0):
        diagram = LearnedDiagram(stem(x[:40]), noisy[:40])
        found = refine_diagram(diagram, stem, x, noisy, target_radius=0.6, temperature=0.25, ramp=ramp, epochs=20)
        model = OTAD(stem, CellInterpolation(found.diagram), identity_head(2))
        shares.append(certify(model, x).certified(0.6, y.numpy()))
    assert shares[1] > shares[0] + 0.05


@pytest.mark.parametrize("name", ["target_radius", "temperature", "learning_rate"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_radius_temperature_and_rate_must_be_positive(name: str, value: float) -> None:
    x, y = digits(0, 100)
    stem = CenteredFlatten(x.mean(0))
    settings: dict[str, Any] = {"target_radius": 0.3, "epochs": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        refine_diagram(LearnedDiagram(stem(x), y), stem, x, y, **settings)


def test_a_box_needs_a_stem_that_keeps_it() -> None:
    x, y = digits(0, 100)
    stem = MaxMinEncoder(64, 16)
    diagram = LearnedDiagram.on_encoder(16, y)
    with pytest.raises(ValueError, match="box"):
        refine_diagram(diagram, stem, x, y, target_radius=0.3, epochs=1, box=(0.0, 1.0))


def test_a_box_has_an_inside() -> None:
    x, y = digits(0, 100)
    stem = CenteredFlatten(x.mean(0))
    with pytest.raises(ValueError, match="least to the largest"):
        refine_diagram(LearnedDiagram(stem(x), y), stem, x, y, target_radius=0.3, epochs=1, box=(1.0, 0.0))


def test_pieces_and_stem_must_belong_together() -> None:
    x, y = digits(0, 100)
    fixed, trainable = CenteredFlatten(x.mean(0)), MaxMinEncoder(64, 64)
    for stem, pieces in ((fixed, LearnedDiagram.on_encoder(64, y)), (trainable, LearnedDiagram(x, y))):
        with pytest.raises(ValueError, match="on_encoder"):
            refine_diagram(pieces, stem, x, y, target_radius=0.3, epochs=1)


def test_every_class_needs_a_point() -> None:
    with pytest.raises(ValueError, match="every class"):
        LearnedDiagram(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="must be two"):
        LearnedDiagram(torch.zeros(2, 3), torch.tensor([0, 0]))


@pytest.mark.slow
def test_an_encoder_is_trained_along_and_resumed(tmp_path: Path) -> None:
    """From the first of two epochs to the same numbers, and again where the run had ended."""
    x, y = digits(0, 300)
    calls = 0

    def interrupted(images: Tensor, draws: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # in the second epoch
            raise KeyboardInterrupt
        return images

    def run(folder: Path) -> DiagramRefinement:
        torch.manual_seed(0)
        stem = EncodedStem(CenteredFlatten(x.mean(0)), *dense_encoders(64, 2, 32))
        start = LearnedDiagram.on_encoder(32, torch.arange(10))
        settings: dict[str, Any] = {"target_radius": 0.4, "temperature": 1.0, "epochs": 12, "augment": interrupted}
        return refine_diagram(start, stem, x, y, checkpoint=folder, resume=True, **settings)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    parts, whole = run(tmp_path / "parts"), run(tmp_path / "whole")
    assert torch.equal(parts.diagram.slopes, whole.diagram.slopes)
    assert torch.equal(run(tmp_path / "whole").diagram.slopes, whole.diagram.slopes)
    assert whole.after["certified"] > whole.before["certified"] + 0.2


def test_on_an_encoder_scores_are_those_of_slopes_and_intercepts() -> None:
    torch.manual_seed(0)
    learned = LearnedDiagram.on_encoder(5, torch.tensor([0, 1, 1, 2]))
    with torch.no_grad():
        learned.weights.normal_()
    x = torch.randn(40, 5)
    scores = x @ learned.sites.T + learned.weights
    y = learned.classes[scores.argmax(1)]
    distance = learned.fixed().distance(x.double(), y)
    assert torch.equal(learned.fixed()(x.double())[0].argmax(1), y)
    least = learned(x, y).amin(1)
    assert (least > 0).all()
    assert (least <= distance + 1e-5).all()


def test_threads_do_not_change_the_result(two_threads: None) -> None:
    """Gradients of pieces that many samples share are summed in a fixed order."""
    torch.manual_seed(0)
    x, y = torch.randn(4096, 800), torch.arange(4096) % 3
    found = []
    for _ in range(6):
        diagram = LearnedDiagram(x[:12], y[:12])
        diagram(x, y).sum().backward()
        found.append(diagram.sites.grad)
    assert all(torch.equal(found[0], again) for again in found[1:])


def test_nor_that_of_the_weights(two_threads: None) -> None:
    """On an encoder all other classes count: many gradients meet in a few weights."""
    torch.manual_seed(0)
    classes = torch.arange(150)
    x, y = torch.randn(512, 32), torch.arange(512) % 150
    diagram = LearnedDiagram.on_encoder(32, classes)
    found = [torch.autograd.grad(diagram(x, y).sum(), diagram.weights)[0] for _ in range(30)]
    assert all(torch.equal(found[0], again) for again in found[1:])
