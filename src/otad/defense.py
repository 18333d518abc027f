"""The defended classifier: stem, interpolated transport map, linear head."""

import copy
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otad.cip import BrenierPotential, Regularity, Solution
from otad.cip.gram import InnerProducts, inner_products
from otad.cip.interpolation import BRANCHES, Branch, interpolant
from otad.cip.mean_potential import MeanPotential
from otad.cip.potentials import potentials, smoothness_of
from otad.errors import InfeasibleError
from otad.retrieval import Retrieval, neighborhood

__all__ = ["OTAD", "GlobalInterpolation", "Interpolation", "NeighborhoodInterpolation"]


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
        interpolation: points to features, `GlobalInterpolation` or `NeighborhoodInterpolation`.
        head: features to logits.

    Source: Gai, Wang, Zhang, arXiv 2408.00329.
    """

    def __init__(self, stem: nn.Module, interpolation: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        # The head before the interpolation: tools, `evaluate` among them, take the precision of a module's first
        # parameter for that of its inputs, and an embedding may lie in float64.
        self.stem, self.head, self.interpolation = stem, head, interpolation
        self.eval().requires_grad_(False)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x).value)

    def features(self, x: Float[Tensor, "batch ..."]) -> Solution:
        """Interpolated features and, in `stats`, how they came about; see the interpolation's docstring."""
        retrieval = self.interpolation.retrieval
        with torch.no_grad():  # the neighbours are held
            coordinates = None if retrieval is None else retrieval(x)  # type: ignore[operator]
        return self.interpolation(self.stem(x), coordinates)

    @property
    def retrieval_space(self) -> nn.Module | None:
        """Inputs -> coordinates in which the neighbours are looked up, differentiable: what an attacker steers.

        None where none are looked up.
        """
        if isinstance(self.interpolation, GlobalInterpolation):
            return None
        retrieval = self.interpolation.retrieval
        return self.stem if retrieval is None else retrieval  # type: ignore[return-value]

    @property
    def lipschitz(self) -> float | None:
        """Lipschitz constant from input to feature, or None where only a neighbourhood has one."""
        if isinstance(self.interpolation, GlobalInterpolation):
            return float(self.stem.lipschitz) * self.interpolation.potential.lipschitz  # type: ignore[arg-type]
        return None

    def smoothed(self, factor: float) -> "OTAD":
        """The same classifier with wider smoothing (M times factor < 1): an attacker's surrogate, not a defence."""
        return OTAD(self.stem, self.interpolation.smoothed(factor), self.head)  # type: ignore[operator]

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
        if (coordinates is None) != (self.retrieval is None):
            raise ValueError("coordinates go with a retrieval: give both or neither")
        if self.retrieval is None or coordinates is None:
            distances, indices, beyond = neighborhood(x, self.x, self.k)
        else:
            distances, indices, beyond = self.retrieval.nearest(coordinates, self.k)
        x_i, z_i = self.x[indices], self.z[indices]
        query = x.double()
        products = inner_products(query, x_i, z_i)
        with torch.no_grad():
            regularity, u_i, relaxed = self._potentials(products)
        solution = interpolant(products, query, x_i, z_i, u_i, regularity, self.branch, self.smoothing)
        ones = torch.ones_like(beyond)
        stats = {"indices": indices, "distances": distances, "next_distance": beyond, "relaxed": relaxed}
        stats |= {"l": ones * regularity.l, "L": ones * regularity.L}
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
            if widest is None:
                widest = _positive(smoothness_of(products, -1.0, torch.float64))
            if not widest[relaxed].isfinite().all():
                raise InfeasibleError("equal training points carry different features; merge duplicates first")
            wide = potentials(products, -widest * (1 + 1e-6), 2 * widest * (1 + 1e-6), torch.float64)
            return regularity, torch.where(relaxed[:, None], wide.value, found.value), relaxed
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


def _positive(smoothness: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """A neighbourhood whose features are all equal allows L = 0; any tiny L > 0 gives the same flat map."""
    return smoothness.clamp(min=1e-6)


def _checked(branch: Branch) -> Branch:
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}; got {branch!r}")
    return branch
