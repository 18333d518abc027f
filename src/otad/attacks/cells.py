"""The nearest points of cells of other classes: the attack that a certificate of cells is the answer to."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.best import Best
from otad.attacks.threat_model import ThreatModel
from otad.cip import PowerDiagram

__all__ = ["nearest_cells"]

OWN = 8  # pieces of the label that a point of another cell has to beat, as many again after each round
ROUNDS, STEPS = 4, 60
STRETCHES = (1.0, 1.001, 1.01, 1.1)  # of the way to the point, which lies on the edge of the cell
AT_ONCE = 64  # samples, for memory
TINY = 1e-12


def nearest_cells(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    cells: tuple[nn.Module, PowerDiagram],
    neighbors: int = 5,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """Walk from each sample to the nearest points of the nearest cells of other classes, inside the box.

    Of piece k, the point p nearest to x where k scores as high as the pieces i of the label is x + sum_i mu_i (a_k -
    a_i), cut to the box, for the mu >= 0 that maximise the dual, a concave problem, by accelerated projected ascent.

    Args:
        model: inputs -> logits, the best score of each class in the cells.
        x: samples, inside the box of the threat model.
        y: their true classes, as the model predicts them.
        threat: norm, budget, box. Points are nearest in L2; under another norm they are merely near.
        cells: an isometry from inputs to points, with `inverse` and `box`, and the diagram of the points.
        neighbors: cells tried, those of the nearest planes.
        seed: not used; the attack is deterministic.

    Returns:
        one input a row inside the budget and box, misclassified where the attack succeeded.
    """
    stem, diagram = cells
    best = Best(x, y)
    with torch.no_grad():
        box = None if threat.box is None else stem.box(*threat.box)  # type: ignore[operator]
        for part in torch.arange(len(x), device=x.device).split(AT_ONCE):
            reach = threat.eps if threat.norm == "l2" else threat.eps * x[0].numel() ** 0.5
            for few, points in _nearest_points(diagram, stem(x[part]).double(), y[part], neighbors, reach, box):
                rows, goal = part[few], stem.inverse(points).to(x)  # type: ignore[operator]
                for stretch in STRETCHES:
                    left = ~best.broken[rows]
                    rows, goal = rows[left], goal[left]
                    if len(rows) == 0:
                        break
                    candidates = threat.project(x[rows] + stretch * (goal - x[rows]), x[rows])
                    best.offer(rows, candidates, model(candidates))
    return best.x_adv


def _nearest_points(
    diagram: PowerDiagram, x: Tensor, y: Tensor, neighbors: int, eps: float, box: tuple[Tensor, Tensor] | None
) -> Iterator[tuple[Int[Tensor, " rows"], Float[Tensor, "rows d"]]]:
    """Of the cells of other classes with the nearest planes, those in reach: rows of x and one point for each."""
    scores, own = diagram.scores(x), diagram.classes == y[:, None]
    mine = _best(scores, own)
    length = torch.cdist(diagram.slopes[mine[:, 0]], diagram.slopes).clamp(min=TINY)
    planes = ((scores.gather(1, mine[:, :1]) - scores) / length).masked_fill(own, torch.inf)
    nearest = planes.topk(min(neighbors, int((~own).sum(1).min())), dim=1, largest=False)
    for away, other in zip(nearest.values.T, nearest.indices.T, strict=True):
        rows = (away < eps).nonzero().squeeze(1)
        if len(rows):
            yield rows, _projected(diagram, x[rows], own[rows], mine[rows], other[rows], box)


def _best(scores: Tensor, own: Tensor) -> Int[Tensor, "batch few"]:
    """The pieces of highest score, the first one again where there are fewer."""
    few = min(OWN, int(own.sum(1).max()))
    found = scores.masked_fill(~own, -torch.inf).topk(few, dim=1).indices
    return torch.where(own.gather(1, found), found, found[:, :1])


def _projected(
    diagram: PowerDiagram, x: Tensor, own: Tensor, mine: Tensor, other: Tensor, box: tuple[Tensor, Tensor] | None
) -> Float[Tensor, "batch d"]:
    """The points nearest to x where each of `other` scores as high as all pieces of the label."""
    here = x.float()
    normals = here.new_zeros(len(x), 0, x.shape[1])
    short = mu = here.new_zeros(len(x), 0)
    known = torch.zeros_like(own)
    point = here
    for _ in range(ROUNDS):
        # A piece that is known already is one of no weight.
        added = diagram.slopes[other][:, None] - diagram.slopes[mine]
        behind = -((added * x[:, None]).sum(2) + diagram.intercepts[other][:, None] - diagram.intercepts[mine])
        fresh = ~known.gather(1, mine)
        known = known.scatter(1, mine, True)
        normals = torch.cat([normals, (added * fresh[:, :, None]).float()], 1)
        short = torch.cat([short, (behind * fresh).float()], 1)
        mu = torch.cat([mu, mu.new_zeros(behind.shape)], 1)
        rate = 1 / torch.linalg.matrix_norm(normals @ normals.mT, ord=2).clamp(min=TINY)[:, None]
        ahead, momentum = mu, 1.0
        for _ in range(STEPS):
            point = _cut(here + torch.bmm(ahead[:, None], normals).squeeze(1), box)
            slope = short - torch.bmm(normals, (point - here)[:, :, None]).squeeze(2)
            after = (ahead + rate * slope).clamp(min=0)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = after + (momentum - 1) / following * (after - mu)
            mu, momentum = after, following
        point = _cut(here + torch.bmm(mu[:, None], normals).squeeze(1), box)
        mine = _best(diagram.scores(point), own)
    return point


def _cut(points: Tensor, box: tuple[Tensor, Tensor] | None) -> Tensor:
    return points if box is None else points.clamp(box[0].to(points), box[1].to(points))
