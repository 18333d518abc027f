"""The defended classifier: stem, interpolated transport map, linear head."""

import copy
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otad.cip import BrenierPotential, PowerDiagram, Regularity, Solution, Status
from otad.cip.gram import InnerProducts, inner_products
from otad.cip.interpolation import BRANCHES, Branch, interpolant
from otad.cip.mean_potential import MeanPotential
from otad.cip.potentials import potentials, smoothness_of
from otad.errors import InfeasibleError
from otad.neighbors import PointIndex, indexed
from otad.nn import CenteredFlatten, EncodedStem
from otad.nn.cip_net import CIPNet, Imitation
from otad.retrieval import Neighbors, Retrieval, neighborhood

__all__ = [
    "OTAD",
    "CellInterpolation",
    "GlobalInterpolation",
    "Interpolation",
    "NeighborhoodInterpolation",
    "NetworkInterpolation",
    "guessed_weights",
    "identity_head",
    "known_smoothness",
]


class Interpolation(Protocol):
    """Points to features: a module whose solution's stats name the training points ("indices", "weights").

    Where it has a retrieval, it takes the coordinates of the same inputs beside their points.
    """

    branch: Branch
    retrieval: Retrieval | None

    def __call__(
        self, x: Float[Tensor, "batch d"], coordinates: Float[Tensor, "batch e"] | None = None
    ) -> Solution: ...

    def smoothed(self, factor: float) -> "nn.Module": ...


class OTAD(nn.Module):
    """A classifier from inputs to logits that is frozen, deterministic and differentiable in its input.

    Args:
        stem: inputs to points, with its exact Lipschitz constant `stem.lipschitz`.
        interpolation: points to features: `GlobalInterpolation`, `NeighborhoodInterpolation`,
            `CellInterpolation`, `NetworkInterpolation`.
        head: features to logits.

    Source: Gai, Wang, Zhang, arXiv 2408.00329.
    """

    def __init__(self, stem: nn.Module, interpolation: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        # The head before the interpolation: tools, `evaluate` among them, take the precision of a module's first
        # parameter for that of its inputs, and an embedding may lie in float64.
        self.stem, self.head, self.interpolation = stem, head, interpolation
        if isinstance(stem, EncodedStem):
            stem.settle()
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "OTAD":
        """Stays in evaluation mode: batch statistics of an embedding would make answers depend on the batch, and move.

        Args:
            mode: not heeded.
        """
        return super().train(False)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x).value)

    def features(self, x: Float[Tensor, "batch ..."]) -> Solution:
        """Interpolated features and, in `stats`, how they came about; see the interpolation's docstring."""
        return self.interpolation(self.stem(x), self.coordinates(x))

    def coordinates(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch e"] | None:
        """Of inputs, by the interpolation's retrieval; None where it has none. No gradient: neighbours are held."""
        retrieval = self.interpolation.retrieval
        with torch.no_grad():
            return None if retrieval is None else retrieval(x)  # type: ignore[operator]

    @property
    def retrieval_space(self) -> nn.Module | None:
        """Inputs -> coordinates in which the neighbours are looked up, differentiable: what an attacker steers.

        None where none are looked up.
        """
        if isinstance(self.interpolation, GlobalInterpolation | CellInterpolation):
            return None
        retrieval = self.interpolation.retrieval
        return self.stem if retrieval is None else retrieval  # type: ignore[return-value]

    @property
    def cells(self) -> tuple[nn.Module, PowerDiagram] | None:
        """The stem and the power diagram on it, where the logits are its scores and the stem is an isometry."""
        cells = isinstance(self.interpolation, CellInterpolation) and isinstance(self.stem, CenteredFlatten)
        return (self.stem, self.interpolation.diagram) if cells else None  # type: ignore[return-value]

    @property
    def lipschitz(self) -> float | None:
        """Lipschitz constant from input to feature, or None where only a neighbourhood has one."""
        if isinstance(self.interpolation, GlobalInterpolation):
            return float(self.stem.lipschitz) * self.interpolation.potential.lipschitz  # type: ignore[arg-type]
        return None

    def smoothed(self, factor: float) -> "OTAD":
        """The same classifier with wider smoothing (M times factor < 1): an attacker's surrogate, not a defence."""
        return OTAD(self.stem, self.interpolation.smoothed(factor), self.head)  # type: ignore[operator]

    def solved(self) -> "OTAD":
        """The same classifier with the exact solver where a network stands in for it."""
        inner = self.interpolation
        return OTAD(self.stem, inner.solver, self.head) if isinstance(inner, NetworkInterpolation) else self

    def exact(self) -> "OTAD":
        """A float64 copy: the same function, evaluated with more digits."""
        return copy.deepcopy(self).double()


class GlobalInterpolation(nn.Module):
    """One potential for all training points: max(|l|, L)-Lipschitz on all of R^d.

    Args:
        potential: fitted to the transport map, or refined; or the mean of several.
        branch: "lower", "upper" or "mean".
    """

    retrieval = None

    def __init__(self, potential: BrenierPotential | MeanPotential, branch: Branch = "mean") -> None:
        super().__init__()
        self.potential = potential
        self.branch: Branch = _checked(branch)

    def forward(self, x: Float[Tensor, "batch d"], coordinates: Float[Tensor, "batch e"] | None = None) -> Solution:
        """See `BrenierPotential.gradient`; there are no neighbours, so coordinates say nothing."""
        return self.potential.gradient(x, self.branch)

    def smoothed(self, factor: float) -> "GlobalInterpolation":
        return GlobalInterpolation(self.potential.smoothed(factor), self.branch)


class CellInterpolation(nn.Module):
    """A power diagram in place of a smooth potential: to the best score of each class, for a head that is the identity.

    Args:
        diagram: the pieces and their classes.
    """

    retrieval = None
    branch: Branch = "lower"

    def __init__(self, diagram: PowerDiagram) -> None:
        super().__init__()
        self.diagram = diagram

    def forward(self, x: Float[Tensor, "batch d"], coordinates: Float[Tensor, "batch e"] | None = None) -> Solution:
        """Scores; there are no neighbours, so coordinates say nothing.

        Returns:
            value: (batch, classes), in the dtype of x.
            stats: "indices" (batch, 1), the piece in whose cell x is, and "weights" (batch, 1), all of them 1.
        """
        value, best = self.diagram(x)
        cell = best.gather(1, value.detach().argmax(1, keepdim=True))
        status = torch.full_like(cell[:, 0], Status.CONVERGED)
        return Solution(value.to(x.dtype), status, {"indices": cell, "weights": torch.ones_like(cell).double()})

    def smoothed(self, factor: float) -> "CellInterpolation":
        return CellInterpolation(self.diagram.smoothed(factor))


def identity_head(classes: int) -> nn.Linear:
    """For scores that are logits already."""
    head = nn.Linear(classes, classes)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class NeighborhoodInterpolation(nn.Module):
    """The published OTAD: a convex integration problem over the K nearest training points of each query.

    Args:
        x: training points, shape (n, d), in stem units.
        z: their features, shape (n, d).
        k: neighbours; all points where there are fewer.
        retrieval: the metric that chooses them and the training points in it; None: Euclidean, in stem units.
        regularity: fixed bounds (published: l = 0, L = 2), or None for the smallest feasible L of each neighbourhood.
        ratio: l / L <= 0 where the bounds are searched.
        factor: the smallest L is multiplied by this.
        branch: "lower" (published), "upper" or "mean".
        infeasible: what to do where the neighbours admit no potential within the bounds. "relax" keeps the bounds and
            takes the potentials of the smallest class F(-L', L') that admits them: the Lipschitz bound and the hull
            property stay, the exact fit at the neighbours is lost; such rows are flagged in `stats["relaxed"]`. "raise"
            raises.

    Raises:
        ValueError: a setting out of range, or a retrieval that does not hold one point for each of x.

    Source: Gai, Wang, Zhang, arXiv 2408.00329, Section 4.
    """

    x: Tensor
    z: Tensor

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        z: Float[Tensor, "n d"],
        *,
        k: int = 10,
        retrieval: Retrieval | None = None,
        regularity: Regularity | None = None,
        ratio: float = 0.0,
        factor: float = 1.0,
        branch: Branch = "lower",
        infeasible: Literal["relax", "raise"] = "relax",
        smoothing: float = 1.0,
    ) -> None:
        super().__init__()
        if infeasible not in ("relax", "raise"):
            raise ValueError(f"infeasible must be 'relax' or 'raise'; got {infeasible!r}")
        if k < 1 or factor < 1 or ratio > 0:
            raise ValueError(f"need k >= 1, factor >= 1 and ratio <= 0; got {k}, {factor} and {ratio}")
        if retrieval is not None and len(retrieval.points) != len(x):
            raise ValueError(f"the retrieval holds {len(retrieval.points)} points, but there are {len(x)} to retrieve")
        self.retrieval = retrieval
        self._index: PointIndex | None = None
        # In float64, whatever the queries are: near points lose their distances in float32.
        self.register_buffer("x", x.double())
        self.register_buffer("z", z.double())
        self.k, self.regularity, self.ratio, self.factor = min(k, len(x)), regularity, ratio, factor
        self.branch: Branch = _checked(branch)
        self.infeasible: Literal["relax", "raise"] = infeasible
        self.smoothing = smoothing

    def _apply(self, fn, recurse=True):  # type: ignore[override]
        exact = self.x, self.z
        super()._apply(fn, recurse)
        self.x, self.z = (part.to(self.x.device) for part in exact)
        return self

    def forward(self, x: Float[Tensor, "batch d"], coordinates: Float[Tensor, "batch e"] | None = None) -> Solution:
        """Features; differentiable in x with the neighbours held.

        Args:
            x: in stem units.
            coordinates: of the same inputs, by `retrieval`; none for Euclidean neighbours.

        Returns:
            value: shape (batch, d).
            stats: "indices", "weights" (batch, k); "distances" (batch, k), in the metric of the retrieval;
                "next_distance" (batch,), to the first point outside, inf where there is none; "l", "L" (batch,) used;
                "relaxed" (batch,); and those of `interpolate`.

        Raises:
            InfeasibleError: `infeasible="raise"` and a neighbourhood admits no potential.
            ValueError: coordinates are missing, or given to Euclidean neighbours.
        """
        x_i, z_i, found = self.neighbors(x, coordinates)
        solution = self.solve(x, x_i, z_i)
        return Solution(solution.value, solution.status, solution.stats | found)

    def neighbors(
        self, x: Float[Tensor, "batch d"], coordinates: Float[Tensor, "batch e"] | None = None
    ) -> tuple[Float[Tensor, "batch k d"], Float[Tensor, "batch k d"], dict[str, Tensor]]:
        """Neighbours of queries, their features, and "indices", "distances", "next_distance" as in `forward`."""
        found = self.nearest(x, coordinates, self.k)
        return self.x[found.indices], self.z[found.indices], found._asdict()

    def nearest(self, x: Float[Tensor, "batch d"], coordinates: Float[Tensor, "batch e"] | None, k: int) -> Neighbors:
        """The k nearest training points of queries, in the metric of the retrieval.

        Raises:
            ValueError: as `forward`.
        """
        if (coordinates is None) != (self.retrieval is None):
            raise ValueError("coordinates go with a retrieval: give both or neither")
        if self.retrieval is None or coordinates is None:
            self._index = indexed(self.x, self._index)
            return neighborhood(x, self._index, k)
        return self.retrieval.nearest(coordinates, k)

    def solve(
        self, x: Float[Tensor, "batch d"], x_i: Float[Tensor, "batch k d"], z_i: Float[Tensor, "batch k d"]
    ) -> Solution:
        """`forward` for neighbours at hand."""
        query = x.double()
        products = inner_products(query, x_i, z_i)
        with torch.no_grad():
            # Not of the query's products: seen from far away, points lose their distances to each other.
            regularity, u_i, relaxed = self._potentials(inner_products(None, x_i, z_i))
        solution = interpolant(products, query, x_i, z_i, u_i, regularity, self.branch, self.smoothing)
        ones = torch.ones_like(query[:, 0])
        stats = {"relaxed": relaxed, "l": ones * regularity.l, "L": ones * regularity.L}
        return Solution(solution.value.to(x.dtype), solution.status, solution.stats | stats)

    def _potentials(self, products: InnerProducts) -> tuple[Regularity, Tensor, Tensor]:
        widest = None
        if self.regularity is not None:
            regularity = self.regularity
        else:
            widest = _positive(smoothness_of(products, -1.0, torch.float64))
            L = widest if self.ratio == -1.0 else _positive(smoothness_of(products, self.ratio, torch.float64))
            L = torch.where(L.isfinite(), L, widest) * self.factor
            # A hair above what the search found, so that rounding l and L - l anew cannot make it infeasible.
            L = L * (1 + 1e-7)
            regularity = Regularity(self.ratio * L, L)
        found = potentials(products, regularity.l, regularity.curvature_range, torch.float64)
        relaxed = found.value.isnan().any(1)
        if relaxed.any():
            if self.infeasible == "raise":
                found.checked()
            some = products.rows(relaxed)
            wider = _positive(smoothness_of(some, -1.0, torch.float64)) if widest is None else widest[relaxed]
            if not wider.isfinite().all():
                raise InfeasibleError("equal training points carry different features; merge duplicates first")
            wide = potentials(some, -wider * (1 + 1e-6), 2 * wider * (1 + 1e-6), torch.float64)
            return regularity, found.value.index_put((relaxed,), wide.value), relaxed
        return regularity, found.value, relaxed

    def smoothed(self, factor: float) -> "NeighborhoodInterpolation":
        return NeighborhoodInterpolation(
            self.x,
            self.z,
            k=self.k,
            retrieval=self.retrieval,
            regularity=self.regularity,
            ratio=self.ratio,
            factor=self.factor,
            branch=self.branch,
            infeasible=self.infeasible,
            smoothing=self.smoothing * factor,
        )


class NetworkInterpolation(nn.Module):
    """The published OTAD-NN: the neighbours of each query, and a network that guesses their weights.

    The feature is sum_i w_i z_i as for l = 0, in the convex hull of the neighbours' features. No proof comes with it:
    it neither fits the training points exactly nor has a known Lipschitz constant.

    Args:
        solver: the exact interpolation that the network imitates: l = 0, lower branch.
        net: the network.
        imitation: how near it comes to the solver; in the statistics of every answer.
        sharpness: factor of the network's logits; below 1 for an attacker's surrogate.

    Raises:
        ValueError: a solver of another branch, or with l other than 0.

    Source: Gai, Wang, Zhang, arXiv 2408.00329 (OTAD-NN, OTAD-T-NN).
    """

    def __init__(
        self, solver: NeighborhoodInterpolation, net: CIPNet, imitation: Imitation, sharpness: float = 1.0
    ) -> None:
        super().__init__()
        self.smoothness = known_smoothness(solver)
        self.solver, self.net, self.imitation, self.sharpness = solver, net, imitation, sharpness
        self.branch: Branch = "lower"
        self.eval().requires_grad_(False)

    @property
    def retrieval(self) -> Retrieval | None:
        """The solver's."""
        return self.solver.retrieval

    def forward(self, x: Float[Tensor, "batch d"], coordinates: Float[Tensor, "batch e"] | None = None) -> Solution:
        """Features; differentiable in x with the neighbours held.

        Args:
            x: in stem units.
            coordinates: of the same inputs, by `retrieval`; none for Euclidean neighbours.

        Returns:
            value: shape (batch, d).
            status: GUESSED.
            stats: "indices", "weights" (batch, k), the network's; "distances" (batch, k); "next_distance" (batch,);
                "expected_error" and "expected_agreement" (batch,): the mean relative feature error and the share of
                equal labels measured on held-out problems, the same in every row.

        Raises:
            ValueError: coordinates are missing, or given to Euclidean neighbours.
        """
        x_i, z_i, found = self.solver.neighbors(x, coordinates)
        weights = guessed_weights(self.net, inner_products(x.double(), x_i, z_i), self.smoothness, self.sharpness)
        ones = torch.ones_like(found["next_distance"])
        expected = {
            "expected_error": ones * self.imitation.feature_error,
            "expected_agreement": ones * self.imitation.label_agreement,
        }
        status = torch.full_like(found["indices"][:, 0], int(Status.GUESSED))
        z = (weights[:, None] @ z_i).squeeze(1)
        return Solution(z.to(x.dtype), status, {"weights": weights} | found | expected)

    def smoothed(self, factor: float) -> "NetworkInterpolation":
        return NetworkInterpolation(self.solver, self.net, self.imitation, self.sharpness * factor)


def guessed_weights(
    net: CIPNet, products: InnerProducts, smoothness: float | None, sharpness: float = 1.0
) -> Float[Tensor, "batch k"]:
    """The network's weights, float64, on the simplex."""
    assert products.dd is not None  # made with distances
    logits = net(products.zz, products.zd, products.dd, products.tilt, smoothness)
    return (sharpness * logits.double()).softmax(1)


def known_smoothness(solver: NeighborhoodInterpolation) -> float | None:
    """L of a solver that a network can imitate; None where it is searched for each neighbourhood.

    Raises:
        ValueError: another branch than the lower one, or l other than 0.
    """
    bounds = solver.regularity
    if solver.branch != "lower":
        raise ValueError(f"a network imitates the branch 'lower' alone; got {solver.branch!r}")
    if (solver.ratio if bounds is None else bounds.l) != 0:
        raise ValueError("a network imitates l = 0 alone: leave strong_convexity and ratio out, or set them to 0")
    return None if bounds is None else float(bounds.L)


def _positive(smoothness: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """A neighbourhood whose features are all equal allows L = 0; any tiny L > 0 gives the same flat map."""
    return smoothness.clamp(min=1e-6)


def _checked(branch: Branch) -> Branch:
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}; got {branch!r}")
    return branch
