"""A 1-Lipschitz network of orthogonal layers: its margin is its certificate."""

import copy
import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from otad.attacks.threat_model import ThreatModel
from otad.baselines.training import accuracy, euclidean_budget, train
from otad.certificate import ROUNDING, Certificate, boundary_distance
from otad.errors import MissingExtraError
from otad.nn import CenteredFlatten
from otad.train import Deformations

__all__ = ["LipschitzNetwork", "fit_lipschitz"]

WIDTHS = (256, 256, 256)
RADIUS = 2.0  # times the budget: the radius at which the loss asks for each sample to be certified
TEMPERATURE = 0.25  # of the cross entropy, times the budget
LEARNING_RATE = 1e-2
POWER_ITERATIONS = 10
CERTIFIED_AT_ONCE = 1024


class LipschitzNetwork(nn.Module):
    """Linear layers with MaxMin between them (units in pairs, each pair sorted), then a linear head.

    Args:
        stem: flattens; an isometry.
        layers: linear, each with an even number of outputs.
        head: features to logits.

    Attributes:
        fitted: "epochs", "seconds" and "train_accuracy" of its training.

    Source: Anil, Lucas, Grosse, ICML 2019, arXiv 1811.05381.
    """

    def __init__(self, stem: CenteredFlatten, layers: Sequence[nn.Linear], head: nn.Linear) -> None:
        super().__init__()
        self.stem, self.layers, self.head = stem, nn.ModuleList(layers), head
        self.fitted: dict[str, float] = {}

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x))

    def features(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch width"]:
        z = self.stem(x)
        for layer in self.layers:
            a, b = layer(z).chunk(2, dim=1)
            z = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)
        return z

    def certify(self, x: Float[Tensor, "batch ..."]) -> Certificate:
        """Labels and the L2 radius within which each provably stays the same, of kind "1-lipschitz".

        MaxMin and stem are 1-Lipschitz, so features move at most by the product of the layers' spectral norms, which
        are computed from the weights in float64: nothing is assumed about how orthogonal training left them. The
        radius is the distance of the feature to the nearest boundary of the head, less the allowances of
        `otad.certificate.boundary_distance`, divided by that product.

        Args:
            x: samples in the model's input units.
        """
        exact = copy.deepcopy(self).double()
        with torch.no_grad():
            constant = 1.0 + 1e-9  # for the rounding of the singular values
            for layer in exact.layers:
                constant *= float(torch.linalg.matrix_norm(layer.weight, ord=2))  # type: ignore[arg-type]
            labels, radii = [], []
            for part in x.double().split(CERTIFIED_AT_ONCE):
                z = exact.features(part)
                label, distance = boundary_distance(exact.head, z, torch.zeros_like(z[:, 0]), ROUNDING)
                labels.append(label)
                radii.append(distance / constant)
        label, radius = torch.cat(labels).cpu().numpy(), torch.cat(radii).cpu().numpy()
        return Certificate(label, radius, np.full(len(label), "1-lipschitz"))


def fit_lipschitz(
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    threat: ThreatModel,
    *,
    minutes: float,
    seed: int = 0,
    progress: bool = False,
    epochs: int | None = None,
) -> LipschitzNetwork:
    """Three orthogonal layers of 256 units with MaxMin and an orthogonal head, trained for a margin.

    The loss is the cross entropy at a temperature, after sqrt(2) times the radius to be certified is taken off the true
    logit. Both scale with the L2 budget (`euclidean_budget`). Images are deformed a little, as for refinement.

    Width and depth were fixed beforehand. Radius (1, 1.5 or 2 budgets), temperature (0.1, 0.25 or 0.5 budgets) and
    rate (2e-3, 5e-3, 1e-2) were chosen on digits held out of the 4,000 training digits of the demo (3,200 to train,
    800 to choose, budget 1.0, 15 epochs), for the share certified at 0.9 to 1.3. The choice reached 96.4 % clean and
    87.7 / 74.8 / 55.3 % certified at 0.5 / 1.0 / 1.5 on those 800; 40 epochs gained a point at most.

    Args:
        x: training samples in the model's input units.
        y: class indices.
        threat: its budget sets margin and temperature.
        minutes: upper limit of the training time.
        seed: of weights and batches.
        progress: show a bar.
        epochs: passes over the data, if the time allows; None takes as many as `OTADClassifier`.

    Raises:
        MissingExtraError: the package deel-torchlip is not installed.

    Source: Bethune et al., NeurIPS 2022, arXiv 2104.05097; layers of the package deel-torchlip.
    """
    budget = euclidean_budget(threat, x[0].numel())
    network = _orthogonal_network(x, int(y.max()) + 1, seed)

    deformed = Deformations() if x.ndim == 4 else None

    def loss(inputs: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        logits = network(inputs if deformed is None else deformed(inputs, draws))
        lowered = logits - math.sqrt(2) * RADIUS * budget * functional.one_hot(labels, logits.shape[1])
        return functional.cross_entropy(lowered / (TEMPERATURE * budget), labels)

    facts = train(
        network,
        x,
        y,
        loss,
        epochs=epochs,
        minutes=minutes,
        seed=seed,
        learning_rate=LEARNING_RATE,
        progress=progress,
    )
    fitted = LipschitzNetwork(
        network.stem, [_orthogonalised(layer) for layer in network.layers], _orthogonalised(network.head)
    )
    fitted.eval().requires_grad_(False)
    fitted.fitted = facts | {"train_accuracy": accuracy(fitted, x, y)}
    return fitted


def _orthogonal_network(x: Tensor, n_classes: int, seed: int) -> LipschitzNetwork:
    try:
        torchlip = importlib.import_module("deel.torchlip")
    except ImportError as error:
        raise MissingExtraError("deel-torchlip", "rivals") from error
    sizes = [x[0].numel(), *WIDTHS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [torchlip.SpectralLinear(a, b) for a, b in itertools.pairwise(sizes)]
        head = torchlip.SpectralLinear(sizes[-1], n_classes)
    for layer in [*layers, head]:
        # One power iteration a step, the default, lags behind the first large steps: Bjorck's iteration then diverges.
        layer.parametrizations.weight[0].n_power_iterations = POWER_ITERATIONS
    return LipschitzNetwork(CenteredFlatten(x.mean(0).cpu()), layers, head).to(x.device)


def _orthogonalised(layer: Any) -> nn.Linear:
    """A plain layer with the orthogonal matrix nearest to the weights; training's iteration only comes near it."""
    plain = layer.vanilla_export()
    u, _, v = torch.linalg.svd(plain.weight.detach().double(), full_matrices=False)
    plain.weight = nn.Parameter((u @ v).to(plain.weight.dtype))
    return plain
