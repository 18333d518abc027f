"""What every rival keeps to: the same signature, a deterministic module, the facts of its training."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from otad.attacks import ThreatModel
from otad.baselines import BASELINES
from otad.baselines.training import backbone_for, train
from tests.baselines.problems import two_clouds

THREAT = ThreatModel("l2", 0.5)
CERTIFIED = {"1-nn": "nearest", "lipschitz": "1-lipschitz", "smoothing": "randomised"}


@pytest.mark.parametrize("name", BASELINES)
def test_rivals_learn_and_are_plain_modules(name: str) -> None:
    x, y = two_clouds(n=128)
    model: Any = BASELINES[name](
        x, y, THREAT, minutes=60.0, **({} if name == "1-nn" else {"epochs": 20 if name == "lipschitz" else 60})
    )
    assert not any(part.training for part in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert set(model.fitted) >= {"epochs", "seconds", "train_accuracy"}
    assert model.fitted["train_accuracy"] > 0.95
    whole = model(x)
    assert whole.shape == (128, 2)
    assert torch.equal(whole, model(x))
    torch.testing.assert_close(torch.cat([model(part) for part in x.split(7)]), whole)
    at = x[:3].clone().requires_grad_()
    model(at)[:, 0].sum().backward()
    assert at.grad is not None
    assert bool((at.grad != 0).any())
    assert hasattr(model, "certify") == (name in CERTIFIED)
    if name in CERTIFIED:
        certificate = model.certify(x[:20])
        assert set(certificate.kind.tolist()) == {CERTIFIED[name]}
        assert certificate.label.tolist() == whole[:20].argmax(dim=1).tolist()
        assert (certificate.radius >= 0).all()
        assert certificate.radius.max() > 0.5


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"1-nn"}))
def test_seeds_decide(name: str) -> None:
    """The same seed gives the same numbers, whatever the global generator holds; another seed gives others."""
    x, y = two_clouds(n=64)
    x = x.view(64, 1, 2, 2)
    logits = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        model = BASELINES[name](x, y, THREAT, minutes=60.0, seed=seed, epochs=2)
        logits.append(model(x))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_time_runs_out_on_an_annealed_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks a second with each reading: the limit of a minute ends training after about 60 steps."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    x, y = two_clouds(n=64)
    network = backbone_for(x, y, "mlp", seed=0)
    rates, optimizer = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return optimizer(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    facts = train(
        network, x, y, lambda a, b, _: functional.cross_entropy(network(a), b), epochs=10**4, minutes=1.0, seed=0
    )
    assert 55 <= len(rates) <= 61
    assert facts["epochs"] == len(rates)
    assert facts["seconds"] <= 62
    assert rates[-1] < 0.01 * max(rates)
    top = rates.index(max(rates))
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_minutes_are_respected() -> None:
    x, y = two_clouds(n=64)
    model: Any = BASELINES["pgd"](x, y, THREAT, minutes=0.02, epochs=10**6)
    assert 0.9 < model.fitted["seconds"] < 5


def test_bad_requests_are_refused() -> None:
    x, y = two_clouds(n=8)
    for bad in ({"minutes": 0.0}, {"minutes": 1.0, "epochs": 0}):
        with pytest.raises(ValueError, match="minutes positive"):
            BASELINES["undefended"](x, y, THREAT, **bad)
