"""A power diagram trained for the distance of the samples to the cells of other classes."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import PowerDiagram
from otad.nn import CenteredFlatten
from otad.train.learned_diagram import LearnedDiagram
from otad.train.loop import Augment
from otad.train.refinement import Objective, RefinementEpoch, refined

__all__ = ["DiagramRefinement", "refine_diagram", "usual_epochs"]

BEYOND = 1.25  # times the target radius: what the loss asks for, so that unseen samples reach the target
RATE = 2.0  # of the sites, times the squared target radius, which makes steps as long as the target radius is
WEIGHTS = 2.0  # their rate, times that of the sites and the squared target radius: they are squared lengths
MOMENTUM = 0.9
ENCODED_RATE, BETAS = 3e-3, (0.9, 0.99)  # of Adam, where an encoder is trained along
PULL = 4.0  # samples at the usual distance whose gradients a site takes in at most at a step
BATCH = 256
USUAL_EPOCHS, LEAST_EPOCHS, MOST_STEPS = 80, 12, 7500
RAMP_WIDTH = 0.25  # of the ramp's end, in target radii


@dataclass(frozen=True)
class DiagramRefinement:
    """What came of it.

    Attributes:
        diagram: with the learned pieces.
        before, after: on the training samples, without augmentation: "accuracy", and "certified", the share beyond the
            target radius by the single planes of training, those between the best eight pieces of each class. An
            estimate: within a box another piece than the nearest without it may be nearer. `otad.certify` proves, and
            mostly more.
        history: one row per epoch, those before a resumed checkpoint included.
    """

    diagram: PowerDiagram
    before: dict[str, float]
    after: dict[str, float]
    history: list[RefinementEpoch]


def usual_epochs(n: int, batch_size: int = BATCH) -> int:
    """Of training on n samples: 80, and fewer, but 12, where these are more than 7,500 steps."""
    return min(USUAL_EPOCHS, max(LEAST_EPOCHS, MOST_STEPS // max(1, math.ceil(n / batch_size))))


def refine_diagram(
    diagram: LearnedDiagram,
    stem: nn.Module,
    inputs: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    target_radius: float,
    epochs: int | None = None,
    batch_size: int = BATCH,
    learning_rate: float | None = None,
    temperature: float = 0.16,
    ramp: float | None = None,
    box: tuple[float, float] | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    mixed_precision: str = "no",
    progress: bool = False,
) -> DiagramRefinement:
    """Move the pieces of a power diagram until the samples lie the target radius away from cells of other classes.

    Minimises the cross entropy of the classes with the distances of `LearnedDiagram` as margins, each less than 1.25
    target radii being paid for, in place: by gradient descent with Nesterov's momentum, or by Adam where the stem has
    parameters to be trained along.

    Args:
        diagram: trained in place and left on the CPU, as is the stem.
        stem: inputs to points, with its Lipschitz constant; trained along where it has parameters that are not frozen.
        inputs: training inputs.
        y: class indices.
        target_radius: L2 radius, in units of the inputs, to be certified at.
        epochs: passes over the data; None takes `usual_epochs`.
        batch_size: samples a step, per process.
        learning_rate: the largest of the schedule; None takes 2 squared target radii (it is in squared units of the
            points), and 3e-3 for Adam.
        temperature: of the cross entropy, in target radii; higher ones learn less by heart, for large radii.
        ramp: in target radii; the gradient of a sample so far on the wrong side counts half, of farther ones less and
            less: that of a bounded loss, as the share of certified samples is bounded. It gives up hopeless samples for
            larger radii of the others. None: all count alike.
        box: the least and the largest value of every input, where only perturbations inside of it are to be certified
            against; the stem must be a translation, `CenteredFlatten`.
        augment: see `refine`.
        seed: of the batch order and the augmentation.
        checkpoint: folder for the last epoch's state, written after every epoch.
        resume: go on from the checkpoint where there is one.
        device: "cpu", "cuda", ..; None leaves it to accelerate.
        mixed_precision: "no", "bf16" or "fp16", for the stem; the pieces stay in single precision.
        progress: show a bar.

    Raises:
        ValueError: target_radius, temperature, learning_rate or epochs not positive, inputs and y of different lengths,
            a box that is empty or that the stem does not keep, or a diagram for another kind of stem.
        OTADError: training diverged.

    Source: the distances bound those of the exact certificate (`PowerDiagram.distance`); for nearest prototypes see
        Voracek, Hein, ICML 2022, arXiv 2207.07208; for the ramp Collobert, Sinz, Weston, Bottou, ICML 2006.
    """
    epochs = usual_epochs(len(inputs), batch_size) if epochs is None else epochs
    rates = {"target_radius": target_radius, "temperature": temperature, "learning_rate": learning_rate}
    for name, value in rates.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite; got {value}")
    if box is not None and not box[0] < box[1]:
        raise ValueError(f"a box is from the least to the largest value; got {box}")
    if ramp is not None and not -math.inf < ramp < math.inf:
        raise ValueError(f"ramp must be a number or None; got {ramp}")
    encoding = [parameter for parameter in stem.parameters() if parameter.requires_grad]
    if bool(encoding) != diagram.encoded:
        raise ValueError("a stem to be trained along goes with LearnedDiagram.on_encoder, and one that stays without")
    if encoding:
        optimizer: torch.optim.Optimizer = torch.optim.Adam([*diagram.parameters(), *encoding], betas=BETAS)
        usual = ENCODED_RATE
    else:
        optimizer, usual = _descent(diagram, target_radius, temperature, min(batch_size, max(1, len(inputs))))
    before, after, history = refined(
        "diagram",
        nn.ModuleDict({"diagram": diagram, "stem": stem}),
        _Objective(stem, diagram, target_radius, temperature, ramp, box),
        inputs,
        y,
        optimizer,
        settings={"temperature": temperature, "box": None if box is None else list(box)}
        | ({} if ramp is None else {"ramp": ramp}),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=usual if learning_rate is None else learning_rate,
        augment=augment,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
    )
    return DiagramRefinement(diagram.fixed(), before, after, history)


def _descent(
    diagram: LearnedDiagram, target_radius: float, temperature: float, batch_size: int
) -> tuple[torch.optim.Optimizer, float]:
    """The optimizer of pieces alone, and its usual rate."""
    share = WEIGHTS * target_radius**2
    groups = [{"params": [diagram.sites]}, {"params": [diagram.weights], "share": share}]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
    most = PULL / (temperature * target_radius * batch_size)
    optimizer.register_step_pre_hook(lambda *_: _shorten(diagram.sites, most))
    return optimizer, RATE * target_radius**2


def _shorten(sites: nn.Parameter, most: float) -> None:
    """Cut the gradient of each site to a length."""
    if sites.grad is not None:
        sites.grad *= most / sites.grad.norm(dim=1, keepdim=True).clamp(min=most)


class _Objective(Objective):
    """Loss, accuracy and certified share of a batch; a module of its own so that any engine can wrap it."""

    def __init__(
        self,
        stem: nn.Module,
        diagram: LearnedDiagram,
        target_radius: float,
        temperature: float,
        ramp: float | None,
        box: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        if box is not None and not isinstance(stem, CenteredFlatten):
            raise ValueError("a box of inputs is one of points only where the stem is a CenteredFlatten; leave box out")
        self.box, self.temperature, self.ramp = box, temperature, ramp
        self.stem, self.diagram, self.target_radius = stem, diagram, target_radius
        self.lipschitz = float(stem.lipschitz)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = self.stem(inputs)
        with torch.autocast(points.device.type, enabled=False):
            distance = self._distance(points, y)
            short = (BEYOND * self.target_radius - distance) / (self.temperature * self.target_radius)
            loss = torch.cat([torch.zeros_like(short[:, :1]), short], 1).logsumexp(1)
            radius = distance.detach().amin(1)
            if self.ramp is not None:
                loss = loss * ((radius / self.target_radius + self.ramp) / RAMP_WIDTH).sigmoid()
        return loss.mean(), (radius > 0).float().mean(), (radius > self.target_radius).float().mean()

    def radius(self, inputs: Tensor, y: Tensor) -> Float[Tensor, " batch"]:
        return self._distance(self.stem(inputs), y).amin(1)

    def _distance(self, points: Tensor, y: Tensor) -> Float[Tensor, "batch few"]:
        box = None if self.box is None else self.stem.box(*self.box)  # type: ignore[operator]
        return self.diagram(points.to(self.diagram.sites), y, box) / self.lipschitz

    def facts(self) -> dict[str, float]:
        return {}
