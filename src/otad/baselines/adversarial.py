"""Networks with OTAD's backbone, trained without a defence, by PGD adversarial training, and by TRADES."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from otad.attacks.gradients import frozen
from otad.attacks.threat_model import ThreatModel, per_row
from otad.baselines.training import TrainedNetwork, backbone_for, train

__all__ = ["fit_pgd", "fit_trades", "fit_undefended", "projected_ascent"]

ATTACK_STEPS = 10
STEP = 2.5  # times eps / steps: the walk can cross the whole budget and turn back
BETA = 6.0  # weight of the KL divergence in TRADES, as published
START = 1e-3  # how far from the sample TRADES starts its attack, as published


def fit_undefended(
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    threat: ThreatModel,
    *,
    minutes: float,
    seed: int = 0,
    progress: bool = False,
    epochs: int | None = None,
    backbone: str = "mlp",
) -> TrainedNetwork:
    """The backbone trained with cross entropy alone; the threat changes nothing.

    Args:
        x: training samples in the model's input units.
        y: class indices.
        threat: ignored.
        minutes: upper limit of the training time.
        seed: of weights and batches.
        progress: show a bar.
        epochs: passes over the data, if the time allows; None takes as many as `OTADClassifier`.
        backbone: name of the network, see `otad.nn.build_backbone`.
    """
    network = backbone_for(x, y, backbone, seed)

    def loss(inputs: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        return functional.cross_entropy(network(inputs), labels)

    fitted = train(network, x, y, loss, epochs=epochs, minutes=minutes, seed=seed, progress=progress)
    return TrainedNetwork(network, fitted)


def fit_pgd(
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    threat: ThreatModel,
    *,
    minutes: float,
    seed: int = 0,
    progress: bool = False,
    epochs: int | None = None,
    backbone: str = "mlp",
) -> TrainedNetwork:
    """The backbone trained on the worst samples that ten steps of projected gradient ascent find in the budget.

    Args as of `fit_undefended`, but x inside the box of the threat model, which is what to train against; the seed is
    also that of random starts.

    Source: Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018, arXiv 1706.06083.
    """
    network = backbone_for(x, y, backbone, seed)

    def loss(inputs: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        start = _uniform_point(inputs, threat, draws)
        worst = projected_ascent(network, inputs, start, lambda logits: _cross_entropy(logits, labels), threat)
        return functional.cross_entropy(network(worst), labels)

    fitted = train(network, x, y, loss, epochs=epochs, minutes=minutes, seed=seed, progress=progress)
    return TrainedNetwork(network, fitted)


def fit_trades(
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    threat: ThreatModel,
    *,
    minutes: float,
    seed: int = 0,
    progress: bool = False,
    epochs: int | None = None,
    backbone: str = "mlp",
) -> TrainedNetwork:
    """The backbone trained with cross entropy plus 6 times the KL divergence to the worst samples in the budget.

    Args as of `fit_undefended`, but x inside the box of the threat model, which is what to train against; the seed is
    also that of random starts.

    Source: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, ICML 2019, arXiv 1901.08573.
    """
    network = backbone_for(x, y, backbone, seed)

    def loss(inputs: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        noise = torch.randn(inputs.shape, generator=draws, device=inputs.device, dtype=inputs.dtype)
        with frozen(network), torch.no_grad():
            natural = network(inputs)
        start = threat.project(inputs + START * noise, inputs)
        worst = projected_ascent(network, inputs, start, lambda logits: _divergence(logits, natural), threat)
        clean = network(inputs)
        gap = _divergence(network(worst), clean)
        return functional.cross_entropy(clean, labels) + BETA * gap / len(inputs)

    fitted = train(network, x, y, loss, epochs=epochs, minutes=minutes, seed=seed, progress=progress)
    return TrainedNetwork(network, fitted)


def projected_ascent(
    network: nn.Module,
    x: Float[Tensor, "batch ..."],
    start: Float[Tensor, "batch ..."],
    objective: Callable[[Tensor], Tensor],
    threat: ThreatModel,
    *,
    steps: int = ATTACK_STEPS,
) -> Float[Tensor, "batch ..."]:
    """Steps of length 2.5 eps / steps up the gradient (its direction for L2, its sign for L-infinity), each projected.

    Args:
        network: inputs -> logits; attacked in evaluation mode and left as it was.
        x: samples, inside the box.
        start: where to begin, inside the budget.
        objective: logits -> the sum over the batch of what is to grow.
        threat: norm, budget, box.
        steps: how many.

    Returns:
        the last iterate, inside budget and box.
    """
    length = STEP * threat.eps / steps
    point = start.detach()
    with frozen(network), torch.enable_grad():
        for _ in range(steps):
            point.requires_grad_()
            gradient = torch.autograd.grad(objective(network(point)), point)[0]
            if threat.norm == "l2":
                size = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
                direction = gradient / per_row(size.clamp_min(torch.finfo(x.dtype).tiny), gradient)
            else:
                direction = gradient.sign()
            point = threat.project(point.detach() + length * direction, x)
    return point


def _uniform_point(x: Tensor, threat: ThreatModel, draws: torch.Generator) -> Tensor:
    """Uniform in the cube of L-infinity; for L2 a random direction and a uniform length, and inside the box."""
    if threat.norm == "linf":
        offset = 2 * torch.rand(x.shape, generator=draws, device=x.device, dtype=x.dtype) - 1
    else:
        offset = torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype)
        length = torch.rand(len(x), generator=draws, device=x.device, dtype=x.dtype)
        offset = offset * per_row(length / torch.linalg.vector_norm(offset.flatten(1), dim=1), x)
    return threat.project(x + threat.eps * offset, x)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def _divergence(logits: Tensor, natural: Tensor) -> Tensor:
    """Sum over the batch of KL(softmax(natural) | softmax(logits)).

    From logarithms on both sides: the gradient with respect to a probability that is rounded to 0 is not finite.
    """
    other, own = (functional.log_softmax(values, dim=1) for values in (logits, natural))
    return functional.kl_div(other, own, reduction="sum", log_target=True)
