"""What every batched solver returns."""

from dataclasses import dataclass, field
from enum import IntEnum

from jaxtyping import Int
from torch import Tensor

from otad.errors import InfeasibleError

__all__ = ["Solution", "Status"]


class Status(IntEnum):
    """How one row of a batch ended, with the advice the user reads."""

    CONVERGED = 0
    MAX_STEPS = 1
    INFEASIBLE = 2
    GUESSED = 3

    @property
    def advice(self) -> str:
        return {
            Status.CONVERGED: "solved to tolerance",
            Status.MAX_STEPS: "stopped at the largest number of steps; rescale the inputs or use float64",
            Status.INFEASIBLE: "no potential with these bounds fits; lower l, raise L, or use fewer neighbours",
            Status.GUESSED: "answered by a network, which proves nothing; solve the problem where it matters",
        }[self]


@dataclass(frozen=True)
class Solution:
    """Result of a batched solver; row b of each field belongs to problem b.

    Attributes:
        value: what was asked for, shape (batch, ...); NaN in rows that are infeasible.
        status: one `Status` per row, shape (batch,).
        stats: further facts per row: "steps", "residual", and what the solver's docstring names.
    """

    value: Tensor
    status: Int[Tensor, " batch"]
    stats: dict[str, Tensor] = field(default_factory=dict)

    def checked(self) -> Tensor:
        """The value, or an error that counts the rows that were not solved.

        Raises:
            InfeasibleError: a row is infeasible or did not converge.
        """
        for status in (Status.INFEASIBLE, Status.MAX_STEPS):
            rows = (self.status == status).nonzero().flatten()
            if len(rows):
                raise InfeasibleError(
                    f"{len(rows)} of {len(self.status)} problems ended as {status.name} "
                    f"(first: row {int(rows[0])}): {status.advice}"
                )
        return self.value
