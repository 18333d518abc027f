"""The worst example found so far, for every sample under attack."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otad.attacks.gradients import margin

__all__ = ["Best"]


class Best:
    """Keeps, for every row, the candidate that fools the true model best; all attacks report to it.

    A misclassified candidate beats a correctly classified one; among equals the higher margin wins. Margins
    are always those of the model under attack, never of a surrogate.

    Attributes:
        x: the samples, (batch, ...); y: their true classes, (batch,).
        x_adv: the best candidate of each row, the sample itself before any was offered.
        margin: its margin, -inf before any was offered, (batch,).
        broken: whether it is misclassified, bool (batch,).
    """

    def __init__(self, x: Float[Tensor, "batch ..."], y: Int[Tensor, " batch"]) -> None:
        self.x = x.detach()
        self.y = y
        self.x_adv = self.x.clone()
        self.margin = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def rows_left(self) -> Int[Tensor, " left"]:
        """Indices of the rows that are not broken yet."""
        return (~self.broken).nonzero().squeeze(1)

    def offer(
        self,
        rows: Int[Tensor, " rows"],
        candidates: Float[Tensor, "rows ..."],
        logits: Float[Tensor, "rows classes"],
    ) -> Tensor:
        """Show candidates for `rows`, with the true model's logits there; rows must not repeat.

        Returns:
            whether each candidate is misclassified, bool of shape (rows,).
        """
        y = self.y[rows]
        broken = logits.argmax(dim=1) != y
        margins = margin(logits, y).to(self.margin.dtype)
        better = (broken & ~self.broken[rows]) | ((broken == self.broken[rows]) & (margins > self.margin[rows]))
        winners = rows[better]
        self.x_adv[winners] = candidates[better].detach()
        self.margin[winners] = margins[better]
        self.broken[winners] = broken[better]
        return broken
