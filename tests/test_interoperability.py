"""The defended module under other people's tools, without a wrapper of ours."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import otad
from otad.attacks.foolbox import load_foolbox
from otad.errors import ModelFolderError

pytestmark = pytest.mark.slow

EPS = 0.4


@pytest.fixture(scope="module")
def clf() -> otad.OTADClassifier:
    x, y = images()
    return otad.OTADClassifier(epochs=20, random_state=0).fit(x[:160].numpy(), y[:160].numpy())


def images() -> tuple[Tensor, Tensor]:
    """Four classes of images, (200, 1, 6, 6) in [0, 1]: a bright quarter each."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 4
    x = 0.3 * torch.rand(200, 1, 6, 6, generator=generator)
    for i, label in enumerate(y.tolist()):
        row, column = divmod(label, 2)
        x[i, 0, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] += 0.4
    return x, y


def test_pyautoattack_takes_the_module(clf: otad.OTADClassifier) -> None:
    from pyautoattack import AutoAttack

    x, y = images()
    x, y = x[160:172], y[160:172]
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        attacker = AutoAttack(clf.module_, norm="L2", eps=3 * EPS, version="custom", attacks=["apgd-ce"])
        attacker.apgd.n_iter = 15  # for time
        found = attacker.run_standard_evaluation(x, y, batch_size=20)
    x_adv = found[0] if isinstance(found, tuple) else found
    assert float((x_adv - x).flatten(1).norm(dim=1).max()) <= 3 * EPS * (1 + 1e-4)
    assert int((clf.module_(x_adv).argmax(1) != y).sum()) > 0


def test_foolbox_takes_the_module(clf: otad.OTADClassifier) -> None:
    foolbox = load_foolbox()
    x, y = images()
    x, y = x[160:], y[160:]
    model = foolbox.PyTorchModel(clf.module_, bounds=(0, 1), device="cpu")
    assert foolbox.utils.accuracy(model, x, y) == pytest.approx(clf.score(x.numpy(), y.numpy()))
    _, clipped, success = foolbox.attacks.L2ProjectedGradientDescentAttack(steps=20)(model, x, y, epsilons=3 * EPS)
    assert bool(success.any())
    assert torch.equal(success, clf.module_(clipped).argmax(1) != y)


def test_the_adversarial_robustness_toolbox_takes_the_module(clf: otad.OTADClassifier) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks.evasion import ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier
    x, y = images()
    x, y = x[160:].numpy(), y[160:].numpy()
    model = PyTorchClassifier(
        clf.module_, loss=nn.CrossEntropyLoss(), input_shape=(1, 6, 6), nb_classes=4, clip_values=(0.0, 1.0)
    )
    logits = model.predict(x)
    assert np.allclose(logits, clf.decision_function(x), atol=1e-5)
    attack = ProjectedGradientDescent(model, norm=2, eps=3 * EPS, eps_step=EPS, max_iter=10, verbose=False)
    x_adv = attack.generate(x, y)
    assert (clf.predict(x_adv) != y).mean() > (clf.predict(x) != y).mean()


def test_a_saved_model_loads_as_a_plain_module(clf: otad.OTADClassifier, tmp_path: Path) -> None:
    """As RobustBench's load_model: a folder in, a module in evaluation mode out, inputs in [0, 1] to logits."""
    clf.save(tmp_path / "model")
    model = otad.load_model(tmp_path / "model")
    assert isinstance(model, nn.Module)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    x, _ = images()
    assert torch.equal(model(x[:20]), clf.module_(x[:20]))
    with pytest.raises(ModelFolderError, match="no model folder"):
        otad.load_model(tmp_path / "elsewhere")
