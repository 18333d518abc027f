import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from otad.attacks import ThreatModel
from otad.baselines import SmoothedClassifier, fit_smoothing
from otad.baselines.smoothing import lower_confidence_bound
from otad.certificate import Certificate
from tests.attacks.known import Linear
from tests.baselines.problems import two_clouds


def halfspace() -> Linear:
    """Class 1 where 3 x_0 + 4 x_1 > 1: the distance to the plane is |3 x_0 + 4 x_1 - 1| / 5."""
    weight = 50 * torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    return Linear(weight, torch.tensor([0.0, -50.0])).eval()


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_clopper_pearson_agrees_with_scipy(alpha: float) -> None:
    successes = np.array([0, 1, 37, 500, 999, 1000])
    expected = [
        binomtest(int(k), 1000, alternative="greater").proportion_ci(1 - alpha, method="exact").low for k in successes
    ]
    assert lower_confidence_bound(successes, 1000, alpha) == pytest.approx(expected, abs=1e-12)


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Exactly, by summing the binomial distribution over the counts whose bound exceeds the truth."""
    from scipy.stats import binom

    counts = np.arange(201)
    bound = lower_confidence_bound(counts, 200, 0.05)
    for p in (0.5, 0.73, 0.99):
        assert binom.pmf(counts, 200, p)[bound > p].sum() <= 0.05


def test_halfspaces_have_their_distance_as_radius() -> None:
    """For a halfspace sigma Phi^-1(p) is the distance to its plane; the bound comes close to it from below."""
    model = SmoothedClassifier(halfspace(), (2,), 0.5, n0=64, samples=20_000)
    x = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [-0.5, 0.1], [0.0, 1.0]])
    distance = ((x @ torch.tensor([3.0, 4.0]) - 1).abs() / 5).numpy()
    certificate = model.certify(x)
    assert certificate.label.tolist() == [1, 1, 0, 0, 1]
    assert (certificate.radius <= distance).all()
    assert certificate.radius == pytest.approx(distance, abs=0.05)
    # The share of the noise on either side of the plane, known in closed form, is what forward averages.
    many = SmoothedClassifier(halfspace(), (2,), 0.5, n0=4000)
    expected = norm.cdf((x @ torch.tensor([3.0, 4.0]) - 1).numpy() / 5 / 0.5)
    assert many(x).exp()[:, 1].detach().numpy() == pytest.approx(expected, abs=0.03)


def test_far_samples_reach_the_largest_radius_and_near_ones_abstain() -> None:
    model = SmoothedClassifier(halfspace(), (2,), 0.5, samples=100, alpha=0.01)
    certificate = model.certify(torch.tensor([[100.0, 100.0], [0.2, 0.1]]))
    assert certificate.radius == pytest.approx([0.5 * norm.ppf(0.01 ** (1 / 100)), 0.0])
    assert certificate.kind.tolist() == ["randomised"] * 2


def test_forward_is_differentiable_where_all_noise_agrees() -> None:
    model = SmoothedClassifier(halfspace().double(), (2,), 0.1).double()
    x = torch.tensor([[0.21, 0.1], [0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,), atol=1e-4)


def test_certificates_repeat_and_leave_the_global_generator_alone() -> None:
    model = SmoothedClassifier(halfspace(), (2,), 0.5, samples=200)
    x = torch.randn(10, 2)
    state = torch.random.get_rng_state()
    first, second = model.certify(x), model.certify(x)
    assert (first.radius == second.radius).all()
    assert torch.equal(state, torch.random.get_rng_state())


def test_sigma_follows_the_budget() -> None:
    x, y = two_clouds(n=64)
    fits = [
        fit_smoothing(x, y, threat, minutes=60.0, epochs=2)
        for threat in (ThreatModel("l2", 0.8), ThreatModel("linf", 0.8))
    ]
    assert [model.sigma for model in fits] == pytest.approx([0.4, 0.8 * math.sqrt(4) / 4])


def test_randomised_radii_are_not_counted_with_proven_ones() -> None:
    mixed = Certificate(np.array([0, 0]), np.array([1.0, 1.0]), np.array(["randomised", "nearest"]))
    with pytest.raises(ValueError, match="count them apart"):
        mixed.certified(0.5, np.array([0, 0]))
    alone = Certificate(np.array([0, 1]), np.array([1.0, 1.0]), np.full(2, "randomised"))
    assert alone.certified(0.5, np.array([0, 0])) == 0.5


def test_bad_settings_are_refused() -> None:
    for bad in ({"sigma": 0.0}, {"sigma": 1.0, "alpha": 1.0}, {"sigma": 1.0, "n0": 0}, {"sigma": 1.0, "samples": 0}):
        with pytest.raises(ValueError, match="sigma must be positive"):
            SmoothedClassifier(halfspace(), (2,), **bad)  # type: ignore[arg-type]
