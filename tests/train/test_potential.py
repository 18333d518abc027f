"""Refinement: certified accuracy rises, its certificate is sound, resuming changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

from otad.certificate import certify
from otad.cip import BrenierPotential
from otad.defense import OTAD, GlobalInterpolation
from otad.errors import ModelFolderError
from otad.nn import CenteredFlatten, EncodedStem, MaxMinEncoder
from otad.train import AffinePotential, Deformations, Refinement, anchored_potential, refine

Data = tuple[Tensor, Tensor]


def moons(n: int, seed: int) -> Data:
    X, y = make_moons(n, noise=0.08, random_state=seed)
    return torch.tensor(X, dtype=torch.float32), torch.tensor(y)


def start(data: Data, classes: int, seed: int = 0) -> tuple[AffinePotential, nn.Linear, CenteredFlatten]:
    x, y = data
    torch.manual_seed(seed)
    head = nn.Linear(x[0].numel(), classes)
    nn.init.orthogonal_(head.weight)
    stem = CenteredFlatten(x.mean(0))
    return anchored_potential(stem(x[:60]), y[:60], head, 0.3), head, stem


def defended(found: Refinement, stem: nn.Module) -> OTAD:
    return OTAD(stem, GlobalInterpolation(found.potential, "lower"), found.head)


@pytest.fixture(scope="module")
def refined() -> tuple[OTAD, OTAD, Refinement]:
    data = moons(400, 0)
    potential, head, stem = start(data, 2)
    before = OTAD(stem, GlobalInterpolation(potential.fixed(), "lower"), nn.Linear(2, 2))
    before.head.load_state_dict(head.state_dict())
    found = refine(potential, head, stem, *data, target_radius=0.2, epochs=8, learning_rate=0.01)
    return before, defended(found, stem), found


def test_refinement_raises_certified_accuracy_on_unseen_samples(refined: tuple[OTAD, OTAD, Refinement]) -> None:
    x, y = moons(300, 1)
    before, after, found = refined
    radii = [certify(model, x).certified(0.2, y.numpy()) for model in (before, after)]
    assert radii[1] > radii[0] + 0.05
    assert found.after["certified"] > found.before["certified"]
    assert found.history[-1].loss < found.history[0].loss


def test_reported_facts_are_those_of_the_certified_model(refined: tuple[OTAD, OTAD, Refinement]) -> None:
    x, y = moons(400, 0)
    certificate = certify(refined[1], x)
    assert refined[2].after["accuracy"] == pytest.approx(np.mean(certificate.label == y.numpy()), abs=0.003)
    assert refined[2].after["certified"] == pytest.approx(certificate.certified(0.2, y.numpy()), abs=0.01)


def test_no_step_within_the_radius_changes_the_label(refined: tuple[OTAD, OTAD, Refinement]) -> None:
    """Gradient ascent on the runner-up within 99.9 % of each certified radius."""
    model = refined[1].exact()
    x = moons(100, 2)[0].double()
    certificate = certify(model, x)
    radius, label = torch.from_numpy(certificate.radius), torch.from_numpy(certificate.label)
    for sign in (1.0, -1.0):
        delta = torch.zeros_like(x)
        for step in range(15):
            delta.requires_grad_()
            logits = model(x + delta)
            margin = logits.gather(1, label[:, None])[:, 0] - logits.gather(1, 1 - label[:, None])[:, 0]
            assert (margin[radius > 0] > 0).all()
            (gradient,) = torch.autograd.grad(margin.sum(), delta)
            move = sign * gradient if step == 0 else -gradient
            delta = delta.detach() - 0.3 * radius[:, None] * nn.functional.normalize(move, dim=1)
            delta = delta * (0.999 * radius / delta.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]


def test_start_from_a_fitted_transport_keeps_its_features() -> None:
    x, y = moons(150, 3)
    stem = CenteredFlatten(x.mean(0))
    fitted = BrenierPotential.fit(stem(x), stem(x) + 0.2 * torch.tensor([0.0, 1.0]) * (1 - 2 * y[:, None]))
    torch.manual_seed(0)
    found = refine(AffinePotential.of(fitted), nn.Linear(2, 2), stem, x, y, target_radius=0.1, epochs=1)
    assert found.before["feature_error"] < 1e-3
    assert found.after["feature_error"] > found.before["feature_error"]


def test_a_frozen_head_stays() -> None:
    data = moons(150, 0)
    potential, head, stem = start(data, 2)
    head.requires_grad_(False)
    weight = head.weight.clone()
    refine(potential, head, stem, *data, target_radius=0.2, epochs=1)
    assert torch.equal(head.weight, weight)


def test_an_encoder_is_trained_along() -> None:
    x, y = digits()
    torch.manual_seed(0)
    encoder = MaxMinEncoder(64, 16)
    stem = EncodedStem(CenteredFlatten(x.mean(0)), encoder)
    head = nn.Linear(16, 10)
    nn.init.orthogonal_(head.weight)
    with torch.no_grad():
        potential = anchored_potential(stem(x[:50]), y[:50], head, 0.5)
    assert encoder.free is not None
    free = encoder.free.detach().clone()
    found = refine(potential, head, stem, x, y, target_radius=0.3, epochs=6, learning_rate=0.01)
    assert not torch.equal(encoder.free, free)
    assert found.after["certified"] > found.before["certified"]
    certificate = certify(defended(found, stem), x)
    assert certificate.certified(0.3, y.numpy()) == pytest.approx(found.after["certified"], abs=0.02)


def digits() -> Data:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:200] / 16, dtype=torch.float32), torch.tensor(y[:200])


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from otad.train.state import TrainingState

    def run(**options: object) -> Refinement:
        potential, head, stem = start(digits(), 10)
        return refine(potential, head, stem, *digits(), target_radius=0.3, epochs=3, seed=5, **options)  # type: ignore[arg-type]

    whole = run()
    save, saved = TrainingState.save, []

    def interrupting(self, *args):  # type: ignore[no-untyped-def]
        save(self, *args)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path)
    resumed = run(checkpoint=tmp_path, resume=True)
    assert len(resumed.history) == 3
    assert torch.equal(resumed.potential.z, whole.potential.z)
    assert torch.equal(resumed.head.weight, whole.head.weight)
    assert resumed.after == whole.after
    with pytest.raises(ModelFolderError, match="target_radius"):
        refine(*start(digits(), 10), *digits(), target_radius=0.4, epochs=3, seed=5, checkpoint=tmp_path, resume=True)


def test_a_checkpoint_is_gone_on_from_with_its_own_augmentation_only(tmp_path: Path) -> None:
    x, y = digits()
    images = x.reshape(-1, 1, 8, 8), y

    def run(augment: object) -> Refinement:
        options = {"epochs": 1, "checkpoint": tmp_path, "resume": True, "device": "cpu"}
        return refine(*start(images, 10), *images, target_radius=0.3, augment=augment, **options)  # type: ignore[arg-type]

    whole = run(Deformations(shift=0.5))
    assert run(Deformations(shift=0.5)).after == whole.after
    for other in (Deformations(shift=1.0), None, upside_down):
        with pytest.raises(ModelFolderError, match="augment"):
            run(other)


def upside_down(images: Tensor, draws: torch.Generator) -> Tensor:
    return images.flip(2)


def test_bad_input_is_refused() -> None:
    x, y = moons(80, 0)
    potential, head, stem = start((x, y), 2)
    with pytest.raises(ValueError, match="target_radius"):
        refine(potential, head, stem, x, y, target_radius=0.0)
    with pytest.raises(ValueError, match="rows"):
        refine(potential, head, stem, x[:0], y[:0], target_radius=0.1)
