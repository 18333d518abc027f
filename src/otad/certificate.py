"""Radii within which a prediction provably does not change (L2)."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from otad.cip import PowerDiagram, Solution
from otad.defense import (
    OTAD,
    CellInterpolation,
    GlobalInterpolation,
    NeighborhoodInterpolation,
    NetworkInterpolation,
)
from otad.nn import CenteredFlatten, EncodedStem

__all__ = ["ROUNDING", "Certificate", "boundary_distance", "certify"]

NEIGHBORHOOD_ARGUMENTS = ("neighborhood", "unanimous")
ROUNDING = 1e-4
POINT_ROUNDING = 1e-6  # of points in float32, relative to their size: neighbours closer to a tie may swap
FLOAT32 = 2.0**-23
MOST_FLOAT32 = 1e38
FIRST_OUTSIDE = 64  # points of other classes that mostly decide


@dataclass(frozen=True)
class Certificate:
    """One row per sample.

    Attributes:
        label: predicted class, shape (n,).
        radius: no perturbation of smaller L2 norm changes the label, but for the kinds in a box; in units of the
            model's input; 0 where nothing is certified. Shape (n,), float64.
        kind: which argument proves the radius, shape (n,): "global" (one Lipschitz constant everywhere), "neighborhood"
            (Lipschitz constant while the neighbours provably stay the same), "unanimous" (every neighbourhood within
            the radius has only features of the class), "cells" (distance to the cells of other classes of a power
            diagram), "nearest" (the 1-NN baseline's planes between samples), "cells-in-box" and "nearest-in-box" (the
            same for perturbed inputs inside the box that was given, and for no others), "1-lipschitz" (the baseline
            network of orthogonal layers). "conditional" assumes the neighbours fixed: never count it as certified.
            "randomised" (smoothing) holds for each sample with a probability only, and for a
            majority vote that no finite number of evaluations knows exactly: name it so wherever it is shown. "none": a
            network in place of the solver proves nothing, the radius is 0.
    """

    label: np.ndarray
    radius: np.ndarray
    kind: np.ndarray

    @property
    def proven(self) -> np.ndarray:
        """The radii that count, (n,): 0 for the kinds "conditional" and "none". Randomised ones count as they stand."""
        return np.where(np.isin(self.kind, ("conditional", "none")), 0.0, np.asarray(self.radius, dtype=np.float64))

    def certified(self, radius: float, y: np.ndarray) -> float:
        """Share of samples that are classified as y and keep their label under every perturbation up to this norm.

        Raises:
            ValueError: some rows are proven and some hold with a probability only: count them apart.
        """
        randomised = self.kind == "randomised"
        if randomised.any() and not randomised.all():
            raise ValueError(
                "a certificate must not mix the kind 'randomised' with deterministic kinds; count them apart"
            )
        return float(np.mean((self.label == y) & (self.proven > radius)))


def certify(
    model: OTAD,
    inputs: Float[Tensor, "n ..."],
    *,
    conditional: bool = False,
    arguments: Collection[str] = NEIGHBORHOOD_ARGUMENTS,
    rounding: float = ROUNDING,
    box: tuple[float, float] | None = None,
    batch_size: int = 256,
) -> Certificate:
    """Certify a defended classifier at each input, by the best sound argument that applies.

    The model is evaluated in float64, and the certificate speaks of the exact function: the distance of the feature
    to each decision boundary |f_y - f_j| / |w_y - w_j| is lowered by the solver's proven error sqrt(2 (L - l) gap) and
    by an allowance for evaluating the shipped model in float32, before it is divided by the Lipschitz constant. The
    radius is lowered by what float32 takes from the points and from the inputs themselves.

    Args:
        model: global or neighbourhood interpolation, or cells; a network's certificate is of the kind "none".
        inputs: in the model's input units.
        conditional: for neighbourhoods, assume the neighbour set fixed; labelled so, and no proof.
        arguments: which of the kinds "neighborhood" and "unanimous" a neighbourhood may be certified by; each radius is
            the larger of theirs.
        rounding: allowance for float32 in the feature, relative to 1 + |z|, at least 0; cells have their own.
        box: the least and the largest value of every input, (0, 1) for images: then only perturbed inputs inside of it
            count, as in attacks on images. Cells on `CenteredFlatten` know what to do with it; other radii are the same
            as without.
        batch_size: inputs at a time.

    Returns:
        Labels are class indices.

    Raises:
        ValueError: rounding < 0, arguments that are none or not known, or softened cells.

    Source: docs/guarantees.md.
    """
    if not arguments or not set(arguments) <= set(NEIGHBORHOOD_ARGUMENTS):
        raise ValueError(f"arguments must be some of {', '.join(NEIGHBORHOOD_ARGUMENTS)}; got {arguments!r}")
    if not rounding >= 0:
        raise ValueError(f"rounding is an allowance and must be at least 0; got {rounding}")
    exact = model.exact()
    constant = float(exact.stem.lipschitz)  # type: ignore[arg-type]
    rows: list[tuple[Tensor, Tensor, np.ndarray]] = []
    with torch.no_grad():
        for part in inputs.double().split(batch_size):
            points = exact.stem(part)
            coordinates = exact.coordinates(part)
            solution = exact.interpolation(points, coordinates)
            if isinstance(exact.interpolation, NetworkInterpolation):
                label = exact.head(solution.value).argmax(1)
                rows.append((label, torch.zeros_like(points[:, 0]), np.full(len(part), "none", object)))
                continue
            if isinstance(exact.interpolation, CellInterpolation):
                _check_cells(exact.interpolation.diagram, exact.head)
                label = solution.value.argmax(1)
                inside = exact.stem.box(*box) if box is not None and isinstance(exact.stem, CenteredFlatten) else None
                reach = exact.interpolation.diagram.distance(points, label, box=inside, rounding=FLOAT32)
                reach = torch.where(exact.interpolation.diagram.largest(points, reach) < MOST_FLOAT32, reach, 0)
                radius = _rounded(part, _free_radius(exact.stem, part, reach, constant))
                rows.append((label, radius, np.full(len(part), "cells" if inside is None else "cells-in-box", object)))
                continue
            label, boundary = boundary_distance(exact.head, solution.value, solution.stats["feature_error"], rounding)
            if isinstance(exact.interpolation, GlobalInterpolation):
                reach = boundary / exact.interpolation.potential.lipschitz
                radius, kind = _free_radius(exact.stem, part, reach, constant), np.full(len(part), "global", object)
            else:
                reach = boundary / torch.maximum(solution.stats["l"].abs(), solution.stats["L"])
                free = _free_radius(exact.stem, part, reach, constant)
                where = points if coordinates is None else coordinates
                radius, kind = _neighborhood(exact, where, solution, label, free, conditional, arguments, rounding)
            rows.append((label, _rounded(part, radius), kind))
    label, radius = (torch.cat([row[i] for row in rows]).cpu().numpy() for i in (0, 1))  # type: ignore[arg-type]
    return Certificate(label, radius, np.concatenate([row[2] for row in rows]).astype(str))


def _check_cells(diagram: PowerDiagram, head: nn.Linear) -> None:
    """Distances are about the largest scores themselves.

    Raises:
        ValueError: a softened diagram, which is an attacker's surrogate, or a head that is not the identity.
    """
    identity = torch.eye(diagram.n_classes).to(head.weight)
    if diagram.temperature or not torch.equal(head.weight, identity) or bool(head.bias.any()):
        raise ValueError("cells are certified with hard scores and the identity as head, not softened or recombined")


def _rounded(inputs: Float[Tensor, "batch ..."], radius: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """An input and what it is moved to are rounded to float32 themselves."""
    radius = radius - FLOAT32 * inputs.flatten(1).norm(dim=1)
    return torch.where(radius > 0, radius, 0)  # 0 also where it is NaN


def _free_radius(
    stem: nn.Module, inputs: Float[Tensor, "batch ..."], reach: Float[Tensor, " batch"], constant: float
) -> Float[Tensor, " batch"]:
    """How far an input may move so that its point, in float32, moves by no more than `reach`.

    Far from the data points are rounded by more than features tell, which may be bounded there.
    """
    layers = 1 + len(stem.encoders) if isinstance(stem, EncodedStem) else 1
    return (reach - POINT_ROUNDING * _size(stem, inputs)).clamp(min=0) / (constant * (1 + layers * POINT_ROUNDING))


def _size(stem: nn.Module, inputs: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Length of the points; with encoders the sum of the lengths of theirs and of the first, as each layer rounds."""
    if not isinstance(stem, EncodedStem):
        return stem(inputs).norm(dim=1)
    points, size = stem.stem(inputs), _size(stem.stem, inputs)
    for encoder in stem.encoders:
        points = encoder(points)
        size = size + points.norm(dim=1)
    return size


def boundary_distance(
    head: nn.Linear, z: Float[Tensor, "batch d"], error: Float[Tensor, " batch"], rounding: float
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Label, and how far the feature is at least from any feature of another label; 0 where a number is not finite.

    Two allowances: `error` and rounding for the feature, and float32 arithmetic in the head for the logits, which
    counts all the more the nearer two rows of the head are to each other. Both are those of the farthest feature that
    the distance admits, as they grow with its length.

    Args:
        head: features to logits.
        z: features.
        error: how far z may be from the exact feature.
        rounding: allowance for float32 in z, relative to 1 + |z|.
    """
    logits = head(z)
    finite = logits.isfinite().all(1) & error.isfinite()
    label = logits.nan_to_num(-torch.inf).argmax(1)
    rows, biases = head.weight, head.bias
    apart, lengths = _distances(rows, rows)[label], rows.norm(dim=1)
    size = z.norm(dim=1)
    terms = int((rows != 0).sum(1).amax())  # zeros, as in a head on one token, add no rounding
    head_error = terms * FLOAT32 * (size[:, None] * lengths + biases.abs())
    margin = logits.gather(1, label[:, None]) - logits - head_error - head_error.gather(1, label[:, None])
    margin = margin - apart * (error + rounding * (1 + size))[:, None]
    # What a step of the feature costs at most, per unit of its length: of the margin, and in rounding.
    price = apart * (1 + rounding) + terms * FLOAT32 * (lengths[label][:, None] + lengths)
    distance = torch.where(margin > 0, margin / price, 0)  # infinite where two rows are zero
    others = torch.ones_like(margin, dtype=torch.bool).scatter(1, label[:, None], False)
    distance = torch.where(others, distance, torch.inf).amin(1)
    return label, torch.where(finite, distance, 0).clamp(min=0)


def _neighborhood(
    model: OTAD,
    where: Float[Tensor, "batch e"],
    solution: Solution,
    label: Int[Tensor, " batch"],
    free: Float[Tensor, " batch"],
    conditional: bool,
    arguments: Collection[str],
    rounding: float,
) -> tuple[Float[Tensor, " batch"], np.ndarray]:
    """Radii in input units; `free`, with the neighbours held, is in them already, `where` is where these are sought."""
    interpolation, stats = model.interpolation, solution.stats
    assert isinstance(interpolation, NeighborhoodInterpolation)
    if conditional:
        return free, np.full(len(where), "conditional", object)
    if interpolation.retrieval is None:
        sought, stretch = interpolation.x, float(model.stem.lipschitz)  # type: ignore[arg-type]
    else:
        sought, stretch = interpolation.retrieval.points, interpolation.retrieval.lipschitz
    # A distance to a training point changes by at most stretch r when the input moves by r, so the set stays while
    # 2 stretch r < the gap.
    room = (stats["next_distance"] - stats["distances"][:, -1]) / 2
    ties = POINT_ROUNDING * (1 + where.norm(dim=1) + stats["distances"][:, -1])
    room = torch.where(room.isfinite(), (room - ties).clamp(min=0) / stretch, room)
    radius = free.minimum(room) if "neighborhood" in arguments else torch.zeros_like(free)
    kind = np.full(len(where), "neighborhood", object)
    if "unanimous" in arguments and bool((stats["l"] == 0).all()) and interpolation.branch == "lower":
        exact_features = torch.zeros_like(interpolation.z[:, 0])
        classes, inside = boundary_distance(model.head, interpolation.z, exact_features, rounding)
        classes = torch.where(inside > 0, classes, -1)  # a feature within rounding of a boundary vouches for none
        unanimous = torch.zeros_like(radius)
        finite = where.isfinite().all(1)
        for own in label[finite].unique():
            rows = finite & (label == own)
            unanimous[rows] = _unanimous(where[rows], sought, classes == own, interpolation.k)
        # Infinite where all training points are of the class: then no retrieval can go wrong, known or not.
        unanimous = torch.where(unanimous.isfinite(), unanimous / stretch, unanimous)
        better = unanimous > radius
        radius = torch.where(better, unanimous, radius)
        kind[better.cpu().numpy()] = "unanimous"
    return radius, kind


def _unanimous(
    x: Float[Tensor, "batch d"], points: Float[Tensor, "n d"], own: Bool[Tensor, " n"], k: int
) -> Float[Tensor, " batch"]:
    """Radius within which the K nearest points are all of the class, in the units of x and points.

    With l = 0 the lower interpolant is in the convex hull of the neighbours' features, which lies in the class if
    they all do.
    Point i stays nearer than point j while |delta| < (d_j^2 - d_i^2) / (2 |x_i - x_j|); a j of another class stays
    out while that holds for k points i of the class.
    """
    if int(own.sum()) < k:
        return torch.zeros_like(x[:, 0])
    if own.all():
        return torch.full_like(x[:, 0], torch.inf)
    inside, outside = points[own], points[~own]
    d_in, d_out = _distances(x, inside), _distances(x, outside)
    # The nearest points of the class give the largest bounds or nearly so; fewer than all only lowers the radius.
    near = d_in.topk(min(len(inside), 4 * k), largest=False)
    radius = torch.empty_like(x[:, 0])
    for row in range(len(x)):
        first = d_out[row] <= d_out[row].topk(min(FIRST_OUTSIDE, len(outside)), largest=False).values[-1]
        known = _kept_out(inside[near.indices[row]], near.values[row], outside[first], d_out[row, first], k)
        # By the triangle inequality a point j stays out for at least (d_j - d_K) / 2.
        rest = ~first & (d_out[row] < near.values[row, k - 1] + 2 * known)
        if rest.any():
            more = _kept_out(inside[near.indices[row]], near.values[row], outside[rest], d_out[row, rest], k)
            known = torch.minimum(known, more)
        radius[row] = known
    return (radius - POINT_ROUNDING * (1 + x.norm(dim=1) + d_in.amin(1))).clamp(min=0)


def _kept_out(inside: Tensor, d_in: Tensor, outside: Tensor, d_out: Tensor, k: int) -> Tensor:
    """Radius within which at least k of the points inside stay nearer than each of those outside."""
    apart = _distances(inside, outside)
    bound = (d_out.square() - d_in.square()[:, None]) / (2 * apart)
    bound = torch.where(apart > POINT_ROUNDING * (1 + inside.abs().amax()), bound, 0)
    return bound.topk(k, dim=0).values[-1].amin()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """From differences: products lose the distance of near points."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
