"""What one attack found."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What one attack found; row i belongs to sample i.

    Attributes:
        x_adv: the worst input found inside the budget, the sample itself where there is none, (n, ...).
        survived: whether the model still answers correctly, False also for samples it got wrong from the
            start, bool (n,).
        margin: best wrong logit minus the true one at x_adv, (n,).
        seconds: wall-clock time.
        queries: forward passes of the model (and of its smoothed surrogates), divided by the number of
            samples n.
        note: what a reader should know, empty mostly.
        inherited: whether samples that earlier attacks had broken were spared, and count as its own.
    """

    x_adv: Float[Tensor, "n ..."]
    survived: Bool[Tensor, " n"]
    margin: Float[Tensor, " n"]
    seconds: float
    queries: float
    note: str = ""
    inherited: bool = False
