"""One potential for all training points: fitted once, evaluated exactly anywhere."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from otad.cip.envelope import EnvelopeSolution, MoreauEnvelope
from otad.cip.interpolation import BRANCHES, Branch
from otad.cip.longest_paths import PotentialFit, fit_potentials
from otad.cip.regularity import Regularity
from otad.cip.sharded_envelope import ShardedEnvelope
from otad.cip.shards import Shards, check_on_every_process
from otad.cip.solution import Solution

__all__ = ["BrenierPotential"]

PAIR_MEMORY = 2**30  # bytes for a block of pair scores


class BrenierPotential(nn.Module):
    """A potential in F(l, L) with grad phi(x_i) = z_i at all n points; its gradient is max(|l|, L)-Lipschitz
    everywhere.

    The lower and the upper extreme potential are Moreau envelopes of n affine pieces (`MoreauEnvelope`); "mean" is half
    their sum. The Lipschitz bound holds by construction, whatever was fitted; fitting decides the values at the points.

    Several processes can share one potential: each passes its own rows to `fit` and keeps them; then all evaluate the
    same queries together, and each gets the whole answer.

    Args:
        x: points, shape (n, d), in stem units; of this process, where several share the potential.
        z: features, shape (n, d).
        potentials: phi(x_i), shape (n,).
        regularity: numbers l < L.
        process_group: of `torch.distributed`, the processes that share the potential; None: this one has all points.
    """

    x: Tensor
    z: Tensor
    potentials: Tensor
    x_mean: Tensor
    z_mean: Tensor
    proof: PotentialFit | None = None  # what `fit` showed; None where the potentials were given

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        z: Float[Tensor, "n d"],
        potentials: Float[Tensor, " n"],
        regularity: Regularity,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.regularity = regularity
        self.shards = Shards(x, process_group)
        self.register_buffer("x", x)
        self.register_buffer("z", z)
        self.register_buffer("potentials", potentials.double())
        self._build()
        self.register_load_state_dict_post_hook(_rebuild)

    def _build(self) -> None:
        """What follows from the points, features and potentials."""
        l, L = float(self.regularity.l), float(self.regularity.L)
        # Origins in the middle of the data keep the scores small, hence their rounding.
        x_mean, z_mean = (self.shards.total(t.double().sum(0)) / self.shards.n for t in (self.x, self.z))
        self.register_buffer("x_mean", x_mean, persistent=False)
        self.register_buffer("z_mean", z_mean, persistent=False)
        self.lower = self._envelope(1.0, l, L - l)
        self.upper = self._envelope(-1.0, L, L - l)

    def _envelope(self, sign: float, curvature: float, M: float) -> MoreauEnvelope:
        """Of +phi from below (sign 1, curvature l) or of -phi from below (sign -1, curvature L)."""
        x, z = self.x.double() - self.x_mean, self.z.double() - self.z_mean
        slopes = sign * (z - curvature * x)
        tilted = self.potentials - (self.z_mean * x).sum(1) - curvature / 2 * x.square().sum(1)
        offsets = sign * tilted - (slopes * x).sum(1) + slopes.square().sum(1) / (2 * M)
        if self.shards.world == 1:
            return MoreauEnvelope(slopes, offsets, M)
        return ShardedEnvelope(slopes, offsets, M, self.shards)

    def _apply(self, fn, recurse=True):  # type: ignore[override]
        exact = self.potentials, self.x_mean, self.z_mean
        super()._apply(fn, recurse)
        self.potentials, self.x_mean, self.z_mean = (part.to(self.x.device) for part in exact)
        return self

    @property
    def lipschitz(self) -> float:
        """max(|l|, L), the Lipschitz constant of the gradient on all of R^d."""
        return float(self.regularity.lipschitz)

    @classmethod
    def fit(
        cls,
        x: Float[Tensor, "n d"],
        z: Float[Tensor, "n d"],
        ratio: float = -1.0,
        *,
        regularity: Regularity | None = None,
        rtol: float = 1e-3,
        memory: int = PAIR_MEMORY,
        progress: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> "BrenierPotential":
        """Fit the potentials of all points, in the smallest class F(ratio * L, L) that admits them.

        `proof` on the result tells what was shown: all n (n - 1) pairs hold, and which smaller L are ruled out.

        Args:
            x: distinct points, shape (n, d); with a process group those of this process.
            z: their features, shape (n, d).
            ratio: l / L <= 0; ignored where `regularity` is given.
            regularity: use these bounds instead of searching the smallest.
            rtol: L is at most this much above the smallest feasible one.
            memory: bytes for a block of pair scores; the fit takes besides about 8 n d bytes for copies of the
                data and 4 kB a point for chosen pairs.
            progress: show a bar for each look at all pairs.
            process_group: of `torch.distributed`, the processes that share the points, each calling this with its own
                rows and the same options (`torch.distributed.group.WORLD` for all of them). The potential is that of
                all rows, those of process 0 first; each process holds only its own.

        Raises:
            InfeasibleError: the given bounds, or for ratio = 0 any, admit no potential.
            ValueError: shapes differ, ratio > 0, numbers are not finite, or equal points carry different features; or
                the processes pass different options. Raised on all processes alike.

        Source: METHOD "Global"; Taylor, Hendrickx, Glineur (2017), Theorem 4.
        """
        check_on_every_process(_problem(x, z, ratio), x.device, process_group)
        with torch.no_grad():
            L = None
            if regularity is not None:
                L = float(regularity.L)
                ratio = float(regularity.l) / L
            shards = Shards(x, process_group)
            shards.check_same(torch.tensor([ratio, L or 0.0, rtol, memory], device=x.device).double(), "options")
            found = fit_potentials(x, z, ratio, L=L, rtol=rtol, memory=memory, progress=progress, shards=shards)
            L = found.smoothness
            own = found.potentials[shards.start : shards.stop].clone()
            potential = cls(x, z, own, regularity or Regularity(ratio * L, L), process_group)
            potential.proof = found
            return potential

    def gathered(self) -> "BrenierPotential":
        """The same potential, all of it in each of the processes that share it; every one of them calls this."""
        x, z, potentials = (self.shards.gather(part) for part in (self.x, self.z, self.potentials))
        whole = BrenierPotential(x, z, potentials, self.regularity)
        whole.proof = self.proof
        return whole

    def forward(self, x: Float[Tensor, "m d"], branch: Branch = "mean") -> Solution:
        """Phi at x.

        Returns:
            value: shape (m,), float64; its gradient is `gradient(x, branch).value`.
            stats, status: as in `gradient`.

        Raises:
            ValueError: an unknown branch, or x is not (m, d).
        """
        parts = self._extremes(x, branch)
        shift = x.double() - self.x_mean
        square, tilt = shift.square().sum(1), (shift * self.z_mean).sum(1)
        curvatures, signs = self._curvatures(branch)
        total = sum(s * p.value + c / 2 * square for s, p, c in zip(signs, parts, curvatures, strict=True))
        return Solution(total / len(parts) + tilt, *self._report(parts))

    def gradient(self, x: Float[Tensor, "m d"], branch: Branch = "mean") -> Solution:
        """The transport map z(x) = grad phi(x).

        Args:
            x: queries, shape (m, d).
            branch: "lower", "upper" or "mean".

        Returns:
            value: features, shape (m, d); differentiable in x.
            status: CONVERGED where all n pieces were checked and none is violated beyond rounding.
            stats: "gap" (m,), how far phi can be from its exact value; "feature_error" (m,), the error of z that this
                allows, at most sqrt(2 (L - l) gap); "rounds" (m,), products with all n points; "indices" and
                "weights" (m, k), the training points that make up the feature.

        Raises:
            ValueError: an unknown branch, or x is not (m, d).
        """
        parts = self._extremes(x, branch)
        shift = x.double() - self.x_mean
        curvatures, signs = self._curvatures(branch)
        total = sum(s * p.gradient + c * shift for s, p, c in zip(signs, parts, curvatures, strict=True))
        return Solution((total / len(parts) + self.z_mean).to(x.dtype), *self._report(parts))

    def smoothed(self, factor: float) -> "BrenierPotential":
        """The same affine pieces under wider smoothing: M becomes factor * M. For attacks; interpolates nothing."""
        if not 0 < factor <= 1:
            raise ValueError(f"factor must be in (0, 1]; got {factor}")
        wider = BrenierPotential(self.x, self.z, self.potentials, self.regularity, self.shards.process_group)
        wider.lower, wider.upper = self.lower.smoothed(factor), self.upper.smoothed(factor)
        return wider

    def _extremes(self, x: Tensor, branch: Branch) -> list[EnvelopeSolution]:
        problem = None
        if branch not in BRANCHES:
            problem = f"branch must be one of {', '.join(BRANCHES)}; got {branch!r}"
        elif x.ndim != 2 or x.shape[1] != self.x.shape[1]:
            problem = f"x must be (m, {self.x.shape[1]}); got {tuple(x.shape)}"
        check_on_every_process(problem, x.device, self.shards.process_group)
        shift = x.double() - self.x_mean
        envelopes = {"lower": [self.lower], "upper": [self.upper], "mean": [self.lower, self.upper]}[branch]
        return [envelope(shift) for envelope in envelopes]

    def _curvatures(self, branch: Branch) -> tuple[list[float], list[int]]:
        l, L = float(self.regularity.l), float(self.regularity.L)
        return {"lower": ([l], [1]), "upper": ([L], [-1]), "mean": ([l, L], [1, -1])}[branch]

    def _report(self, parts: list[EnvelopeSolution]) -> tuple[Tensor, dict[str, Tensor]]:
        gaps = torch.stack([part.gap for part in parts])
        M = float(self.regularity.curvature_range)
        stats = {
            "gap": gaps.amax(0),
            "feature_error": (2 * M * gaps).sqrt().mean(0),
            "rounds": torch.stack([part.rounds for part in parts]).sum(0),
            "indices": torch.cat([part.indices for part in parts], 1),
            "weights": torch.cat([part.weights for part in parts], 1) / len(parts),
        }
        return torch.stack([part.status for part in parts]).amax(0), stats


def _problem(x: Tensor, z: Tensor, ratio: float) -> str | None:
    """What is wrong with the data of one process."""
    if x.ndim != 2 or x.shape != z.shape or len(x) == 0:
        return f"x and z must both be (n, d), n >= 1; got {tuple(x.shape)} and {tuple(z.shape)}"
    if ratio > 0:
        return f"ratio = l / L must be <= 0; got {ratio}"
    if not (x.isfinite().all() and z.isfinite().all()):
        return "x and z must be finite; some entries are NaN or infinite"
    return None


def _rebuild(potential: BrenierPotential, _: object) -> None:
    potential._build()
