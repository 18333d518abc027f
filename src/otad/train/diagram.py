"""A power diagram trained for the distance of the samples to the cells of other classes."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import PowerDiagram
from otad.nn import CenteredFlatten
from otad.train.loop import Augment
from otad.train.refinement import Objective, RefinementEpoch, refined

__all__ = ["DiagramRefinement", "LearnedDiagram", "refine_diagram", "usual_epochs"]

BEYOND = 1.25  # times the target radius: what the loss asks for, so that unseen samples reach the target
TEMPERATURE = 0.16  # of the cross entropy, times the target radius
INTERCEPTS = 5.0  # their rate, times that of slopes: they are in squared units
BATCH = 256
USUAL_EPOCHS, LEAST_EPOCHS, MOST_STEPS = 80, 12, 5000
FEW = 4  # pieces of a sample's class that may keep the others away
BOXED = 3  # classes whose distance within the box is computed
NEWTON = 4
TINY = 1e-12

Box = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DiagramRefinement:
    """What came of it.

    Attributes:
        diagram: with the learned pieces.
        before, after: on the training samples, without augmentation: "accuracy", and "certified", the share beyond the
            target radius by the single planes of training, in float32; `otad.certify` proves more.
        history: one row per epoch, those before a resumed checkpoint included.
    """

    diagram: PowerDiagram
    before: dict[str, float]
    after: dict[str, float]
    history: list[RefinementEpoch]


class LearnedDiagram(nn.Module):
    """The pieces of a `PowerDiagram` as parameters, in single precision; starts as the diagram of nearest points.

    Args:
        points: what the pieces start from, shape (n, d), at least one of each class.
        classes: of the pieces, which they keep, shape (n,).

    Raises:
        ValueError: a class without points.
    """

    classes: Tensor

    def __init__(self, points: Float[Tensor, "n d"], classes: Int[Tensor, " n"]) -> None:
        super().__init__()
        self.counts = torch.bincount(classes).tolist()
        if 0 in self.counts:
            raise ValueError("every class 0, 1, .. needs at least one point")
        order = torch.argsort(classes, stable=True)
        self.register_buffer("classes", classes[order])
        self.slopes = nn.Parameter(points.detach()[order].clone())
        self.intercepts = nn.Parameter(-self.slopes.detach().square().sum(1) / 2)

    def forward(
        self, x: Float[Tensor, "batch d"], y: Int[Tensor, " batch"], box: Box | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Signed distance to a plane of every class that keeps it from one piece of y; infinite for y.

        The least of a row bounds the distance to the cells of other classes; it is negative where y is not predicted.
        Within a box, the nearest three of a row are the distances to the parts of the planes inside of it.

        Args:
            x: points.
            y: their classes.
            box: the least and the largest value of every coordinate; then there is no gradient in x.
        """
        own, other = self._chosen(x.detach(), y)
        apart = self.slopes[own][:, None] - nn.functional.embedding(other, self.slopes)
        offset = self.intercepts[own][:, None] - self.intercepts[other]
        ahead = torch.einsum("bcd,bd->bc", apart, x) + offset
        distance = (ahead / apart.square().sum(2).clamp(min=TINY).sqrt()).scatter(1, y[:, None], torch.inf)
        if box is None:
            return distance
        near = distance.detach().topk(min(BOXED, distance.shape[1]), dim=1, largest=False).indices
        apart, offset = apart.gather(1, near[:, :, None].expand(-1, -1, apart.shape[2])), offset.gather(1, near)
        ahead = ahead.detach().gather(1, near)
        boxed = _boxed(x.detach(), apart, offset, ahead.clamp(min=TINY), box)
        return distance.scatter(1, near, torch.where(ahead > TINY, boxed, distance.gather(1, near)))

    def fixed(self) -> PowerDiagram:
        """The same pieces, evaluated in float64 and with proofs."""
        return PowerDiagram(self.slopes, self.intercepts, self.classes)

    @torch.no_grad()
    def _chosen(self, x: Tensor, y: Tensor) -> tuple[Int[Tensor, " batch"], Int[Tensor, "batch classes"]]:
        """Of the best pieces of y the one that keeps all others farthest away; of every class the one nearest to it."""
        scores = torch.addmm(self.intercepts, x, self.slopes.T)
        mine = self.classes == y[:, None]
        few = min(FEW, max(self.counts))
        best = scores.masked_fill(~mine, -torch.inf).topk(few, dim=1).indices
        best = torch.where(torch.arange(few, device=x.device) < mine.sum(1, keepdim=True), best, best[:, :1])
        squares, planes = self.slopes.square().sum(1), []
        for i in best.T:
            apart = torch.addmm(squares, self.slopes[i], self.slopes.T, alpha=-2) + squares[i][:, None]
            distance = (scores.gather(1, i[:, None]) - scores) / apart.clamp(min=TINY).sqrt()
            planes.append(distance.masked_fill(mine, torch.inf))
        first = torch.stack([distance.amin(1) for distance in planes], 1).argmax(1)
        distance = torch.stack(planes, 1)[torch.arange(len(x), device=x.device), first]
        start, other = 0, []
        for part in distance.split(self.counts, dim=1):
            other.append(start + part.argmin(1))
            start += part.shape[1]
        return best.gather(1, first[:, None]).squeeze(1), torch.stack(other, 1)


def _boxed(x: Tensor, apart: Tensor, offset: Tensor, ahead: Tensor, box: Box) -> Float[Tensor, "batch few"]:
    """Distances within the box to planes, with their gradients, for x on the near side of them.

    At the nearest point p = x + delta of a plane, delta being x + t g cut to the box, the distance r changes with the
    normal -g and the offset by t / r times the change of <-g, p> + offset.
    """
    with torch.no_grad():
        g, start = -apart, x[:, None]
        t = ahead / g.square().sum(2).clamp(min=TINY)
        for _ in range(NEWTON):
            moved = start + t[:, :, None] * g
            gained = ((moved.clamp(*box) - start) * g).sum(2)
            slope = (g.square() * torch.where(g > 0, moved < box[1], moved > box[0])).sum(2)
            t = torch.where((gained < ahead) & (slope > TINY), t + (ahead - gained) / slope.clamp(min=TINY), t)
        delta = (start + t[:, :, None] * g).clamp(*box) - start
        distance = delta.norm(dim=2)
        rate = t / distance.clamp(min=TINY)
    changed = torch.einsum("bcd,bcd->bc", apart, start + delta) + offset
    return distance + rate * (changed - changed.detach())


def usual_epochs(n: int, batch_size: int = BATCH) -> int:
    """Of training on n samples: 80, and fewer, but 12, where these are more than 5,000 steps."""
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
    learning_rate: float = 3e-2,
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
    target radii being paid for, by Adam, in place.

    Args:
        diagram: trained in place and left on the CPU, as is the stem.
        stem: inputs to points, with its Lipschitz constant; trained along where it has parameters.
        inputs: training inputs.
        y: class indices.
        target_radius: L2 radius, in units of the inputs, to be certified at.
        epochs: passes over the data; None takes `usual_epochs`.
        batch_size: samples a step, per process.
        learning_rate: the largest of the schedule, in units of the points; five times it for the intercepts.
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
        ValueError: target_radius or epochs not positive, inputs and y of different lengths, or a box that the stem does
            not keep.
        OTADError: training diverged.

    Source: the distances bound those of the exact certificate (`PowerDiagram.distance`); for nearest prototypes see
        Voracek, Hein, ICML 2022, arXiv 2207.07208.
    """
    epochs = usual_epochs(len(inputs), batch_size) if epochs is None else epochs
    before, after, history = refined(
        "diagram",
        nn.ModuleDict({"diagram": diagram, "stem": stem}),
        _Objective(stem, diagram, target_radius, box),
        inputs,
        y,
        diagram.intercepts,
        share=INTERCEPTS,
        settings={"box": None if box is None else list(box)},
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        augment=augment,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
    )
    return DiagramRefinement(diagram.fixed(), before, after, history)


class _Objective(Objective):
    """Loss, accuracy and certified share of a batch; a module of its own so that any engine can wrap it."""

    def __init__(
        self, stem: nn.Module, diagram: LearnedDiagram, target_radius: float, box: tuple[float, float] | None
    ) -> None:
        super().__init__()
        if box is not None and not isinstance(stem, CenteredFlatten):
            raise ValueError("a box of inputs is one of points only where the stem is a CenteredFlatten; leave box out")
        self.box = box
        self.stem, self.diagram, self.target_radius = stem, diagram, target_radius
        self.lipschitz = float(stem.lipschitz)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = self.stem(inputs)
        with torch.autocast(points.device.type, enabled=False):
            distance = self._distance(points.to(self.diagram.slopes), y)
            short = (BEYOND * self.target_radius - distance).scatter(1, y[:, None], 0)
            loss = nn.functional.cross_entropy(short / (TEMPERATURE * self.target_radius), y)
            radius = distance.detach().amin(1)
        return loss, (radius > 0).float().mean(), (radius > self.target_radius).float().mean()

    def radius(self, inputs: Tensor, y: Tensor) -> Float[Tensor, " batch"]:
        return self._distance(self.stem(inputs), y).amin(1)

    def _distance(self, points: Tensor, y: Tensor) -> Float[Tensor, "batch classes"]:
        box = None if self.box is None else self.stem.box(*self.box)  # type: ignore[operator]
        return self.diagram(points, y, box) / self.lipschitz

    def facts(self) -> dict[str, float]:
        return {}
