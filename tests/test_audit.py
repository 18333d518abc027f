import pytest
import torch
from torch import Tensor, nn

from otad import audit


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Detached(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.detach())


class HalfDetached(Smooth):
    """A gradient, but of another function than the model's."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits.detach() + 0.3 * (logits - logits.detach())


class Random(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 1e-3 * torch.randn(len(x), 3)


class Company(Smooth):
    """Answers depend on the rest of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean(dim=0))


class OnlySingle(Smooth):
    """Refuses float64."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.net(x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y(x: Tensor) -> Tensor:
    return Smooth()(x).argmax(dim=1)


@pytest.mark.parametrize("model", [Smooth(), OnlySingle()], ids=["float64", "float32"])
def test_honest_gradients_agree(model: nn.Module, x: Tensor, y: Tensor) -> None:
    check = audit.finite_differences(model, x, y)
    assert check.passed
    assert check.value == 1.0


@pytest.mark.parametrize("model", [Detached(), HalfDetached()], ids=["detached", "half"])
def test_false_gradients_are_caught(model: nn.Module, x: Tensor, y: Tensor) -> None:
    assert audit.finite_differences(model, x, y).passed is False


def test_kinks_are_forgiven(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    assert audit.finite_differences(model, x, model(x).argmax(dim=1)).passed


def test_randomised_models_are_caught(x: Tensor) -> None:
    assert audit.deterministic(Smooth(), x).passed
    assert audit.deterministic(Random(), x).passed is False


def test_models_that_look_at_the_batch_are_caught(x: Tensor) -> None:
    assert audit.batch_invariant(Smooth(), x).passed
    assert audit.batch_invariant(Company(), x).passed is False


def test_zero_gradients() -> None:
    flat = torch.tensor([True, False, False, True])
    assert audit.zero_gradients(flat, surrogate=False).passed is False
    assert audit.zero_gradients(flat, surrogate=False).value == 0.5
    assert audit.zero_gradients(flat, surrogate=True).passed
    assert audit.zero_gradients(~flat & flat, surrogate=False).passed


def test_certified_attacked_clean() -> None:
    correct = torch.tensor([True, True, True, False])
    survived = {"1": torch.tensor([True, False, False, False])}
    distance = {"1": torch.tensor([torch.inf, 0.9, 0.5, torch.inf])}
    honest = torch.tensor([1.2, 0.9, 0.3, 0.0])

    def check(radius: Tensor, **others):
        return audit.certified_attacked_clean(correct, survived, certified_radius=radius, distance=distance, **others)

    assert check(honest).passed
    assert check(honest).value == 0
    assert check(torch.tensor([1.2, 0.95, 0.6, 0.0])).value == 2
    assert check(honest, same_label=torch.tensor([True, True, False, True])).value == 1
    # A sample the model gets wrong cannot have survived.
    assert audit.certified_attacked_clean(correct, {"1": torch.ones(4, dtype=torch.bool)}).value == 1


def test_curves() -> None:
    assert audit.zero_at_large_eps(0.0, 10.0).passed
    assert audit.zero_at_large_eps(0.01, 10.0).passed is False
    assert audit.never_rises({1.0: 0.5, 0.5: 0.8, 2.0: 0.0}).passed
    risen = audit.never_rises({0.5: 0.6, 1.0: 0.8})
    assert risen.passed is False
    assert risen.value == pytest.approx(0.2)


def test_attack_order() -> None:
    strong, weak = torch.tensor([False, False, True]), torch.tensor([False, True, True])
    assert audit.attack_order({"1": strong}, {"1": [weak]}).passed
    assert audit.attack_order({"1": weak}, {"1": [strong]}).passed is False
    assert audit.attack_order({}, {}).passed is None


def test_never_rises_forgives_two_of_few_samples() -> None:
    assert audit.never_rises({5: 0.5, 20: 0.5 + 2 / 64}, along="number of steps", n=64).passed
    assert audit.never_rises({5: 0.5, 20: 0.5 + 3 / 64}, along="number of steps", n=64).passed is False
    assert "number of steps" in audit.never_rises({1: 0.5}, along="number of steps").meaning


def test_transfer_over_noise() -> None:
    alive, broken = torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)
    assert audit.transfer_over_noise({"1": broken}, {"1": alive}).passed
    check = audit.transfer_over_noise({"1": alive}, {"1": broken})
    assert check.passed is False
    assert check.value == 1
    assert audit.transfer_over_noise({}, {"1": alive}).passed is None


def test_black_box_adds() -> None:
    one, three = (torch.arange(100) < k for k in (1, 3))
    assert audit.black_box_adds({"Square": one}, queries=10).passed
    check = audit.black_box_adds({"Square": one, "HopSkipJump": three}, queries=10)
    assert check.passed is False
    assert check.value == pytest.approx(0.03)
    assert "HopSkipJump" in check.meaning
    assert audit.black_box_adds({"Square": one[:30]}, queries=10).passed  # one of 30 is chance
    assert audit.black_box_adds({}, queries=10).passed is None


def test_what_only_informs() -> None:
    check = audit.active_set(torch.tensor([1.0, 3.0]), torch.tensor([4.0]))
    assert check.passed is None
    assert check.value == 2
    assert "50 %" in check.meaning
    assert audit.neighbor_changes(torch.tensor([True, False, False, False])).value == 0.25
