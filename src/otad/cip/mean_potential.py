"""The mean of several potentials: as smooth as they are, and with fewer pieces learned by heart."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otad.cip.brenier import BrenierPotential
from otad.cip.interpolation import Branch
from otad.cip.solution import Solution

__all__ = ["MeanPotential"]


class MeanPotential(nn.Module):
    """phi = (phi_1 + .. + phi_m) / m; its gradient is Lipschitz with the mean of their constants.

    Args:
        members: potentials on the same space, each with its own pieces.

    Raises:
        ValueError: no members, or spaces of different dimensions.
    """

    def __init__(self, members: Sequence[BrenierPotential]) -> None:
        super().__init__()
        if not members or len({member.x.shape[1] for member in members}) > 1:
            raise ValueError(f"members must be potentials on one space; got {[tuple(m.x.shape) for m in members]}")
        self.members = nn.ModuleList(members)

    @property
    def lipschitz(self) -> float:
        """Of the gradient, on all of R^d."""
        return sum(member.lipschitz for member in self._members()) / len(self.members)

    def forward(self, x: Float[Tensor, "m d"], branch: Branch = "mean") -> Solution:
        """Phi at x; see `BrenierPotential`."""
        return self._mean([member(x, branch) for member in self._members()])

    def gradient(self, x: Float[Tensor, "m d"], branch: Branch = "mean") -> Solution:
        """Features at x; see `BrenierPotential.gradient`.

        Returns:
            value: shape (m, d).
            status: the worst of the members'.
            stats: "gap" and "feature_error", means of the members'; "rounds", their sum; "indices" and "weights", of
                the members' pieces one after the other, the second member's counted from the end of the first's.
        """
        return self._mean([member.gradient(x, branch) for member in self._members()])

    def smoothed(self, factor: float) -> "MeanPotential":
        return MeanPotential([member.smoothed(factor) for member in self._members()])

    def _members(self) -> list[BrenierPotential]:
        return list(self.members)  # type: ignore[arg-type]

    def _mean(self, parts: list[Solution]) -> Solution:
        stats = {name: torch.stack([part.stats[name] for part in parts]) for name in ("gap", "feature_error", "rounds")}
        starts = torch.tensor([0, *(len(member.x) for member in self._members())]).cumsum(0).tolist()
        return Solution(
            torch.stack([part.value for part in parts]).mean(0),
            torch.stack([part.status for part in parts]).amax(0),
            {
                "gap": stats["gap"].mean(0),
                "feature_error": stats["feature_error"].mean(0),
                "rounds": stats["rounds"].sum(0),
                "indices": torch.cat([p.stats["indices"] + s for p, s in zip(parts, starts, strict=False)], 1),
                "weights": torch.cat([part.stats["weights"] for part in parts], 1) / len(parts),
            },
        )
