"""Pieces of a power diagram as they are trained: found fast, their distances differentiable."""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import PowerDiagram
from otad.train.poses import Poses

__all__ = ["LearnedDiagram"]

SLOPES = 0.1  # each coordinate's standard deviation at first, on an encoder
LOOKED_AT = 8  # best pieces of each class
ALL_PAIRS = 1000  # pieces
AT_ONCE = 1 << 21, 1 << 26  # numbers that are copied: such as a processor's cache holds; on a GPU
FEW = 4  # pieces of a sample's class that may keep the others away
NEAREST = 4  # other classes that the loss looks at
NEWTON = 4
POSED_AGAIN = 8  # steps that find pieces among the same copies
TINY = 1e-12

Box = tuple[Tensor, Tensor]


class _Search(NamedTuple):
    """Pieces to be searched, the same in the precision they are found in, their squared lengths, and steps left."""

    sites: Tensor
    coarse: Tensor
    squares: Tensor
    left: int


class LearnedDiagram(nn.Module):
    """A `PowerDiagram` to be trained: sites p_i and weights w_i, scores <p_i, x> - |p_i|^2 / 2 + w_i.

    Starts as the diagram of nearest points. In these parameters a step of gradient descent moves a site along the line
    to a sample, and leaves alone what the samples about it have in common.

    Args:
        points: the sites to start from, shape (n, d), at least one of each class.
        classes: of the sites, which they keep, shape (n,).
        encoded: see `on_encoder`.
        poses: then every site has a copy in each of them, a piece of its own with a weight of its own, and is trained
            through its copies: what they share need not be learned for each.

    Raises:
        ValueError: a class without points, or fewer than two classes.

    Source: Aurenhammer, SIAM J. Comput. 16 (1987).
    """

    classes: Tensor

    def __init__(
        self,
        points: Float[Tensor, "n d"],
        classes: Int[Tensor, " n"],
        *,
        encoded: bool = False,
        poses: Poses | None = None,
    ) -> None:
        super().__init__()
        self.encoded, self.poses = encoded, poses
        copies = 1 if poses is None else poses.count
        self.counts = (copies * torch.bincount(classes)).tolist()
        if 0 in self.counts or len(self.counts) < 2:
            raise ValueError(f"every class 0, 1, .. needs at least one point, and there must be two; got {self.counts}")
        order = torch.argsort(classes, stable=True)
        self.register_buffer("classes", classes[order].repeat_interleave(copies))
        self.sites = nn.Parameter(points.detach()[order].clone())
        self.weights = nn.Parameter(self.sites.new_zeros(len(self.classes)))
        self._search: _Search | None = None

    @classmethod
    def on_encoder(cls, d: int, classes: Int[Tensor, " n"]) -> Self:
        """Small random slopes p_i and intercepts w_i, scores <p_i, x> + w_i, to be trained along with an encoder.

        Then all other classes count, not the nearest four, and a sample on the wrong side may come nearer by driving
        pieces apart, which would know no end where points stay as they are.

        Args:
            d: of the encoder's points; torch draws the slopes.
            classes: of the pieces, at least one of each class.
        """
        return cls(SLOPES * torch.randn(len(classes), d), classes, encoded=True)

    def forward(
        self, x: Float[Tensor, "batch d"], y: Int[Tensor, " batch"], box: Box | None = None
    ) -> Float[Tensor, "batch few"]:
        """Signed distances to planes that keep some piece of y apart from one of each of the nearest other classes.

        The least of a row bounds the distance to the cells of other classes, and is negative where y is not predicted,
        as far as the pieces that decide are found: those looked at are the best ones by rounded scores, and the
        nearest ones without the box. `PowerDiagram.distance` proves.

        Args:
            x: points.
            y: their classes.
            box: the least and the largest value of every coordinate; then distances are those to the parts of the
                planes inside of it, and there is no gradient in x.
        """
        x = x if box is None else x.detach()
        own, other = self._chosen(x.detach(), y)
        first, second = self._pieces(own[:, None]), self._pieces(other)
        apart = first - second
        middle = 0 if self.encoded else (first + second) / 2
        ahead = torch.einsum("bcd,bcd->bc", apart, x[:, None] - middle)
        ahead = ahead + self._weighed(own[:, None]) - self._weighed(other)
        length = apart.square().sum(2).clamp(min=TINY).sqrt()
        distance = ahead / (length if self.encoded else torch.where(ahead > 0, length, length.detach()))
        if box is None:
            return distance
        far = ahead.detach()
        delta, boxed, rate = _boxed(x, -apart.detach(), far.clamp(min=TINY), box)
        # At the nearest point p = x + delta of a plane, delta being x + t g cut to the box, the distance r changes with
        # the plane by t / r times the change of its value at p.
        changed = ahead + torch.einsum("bcd,bcd->bc", apart, delta)
        return torch.where(far > TINY, boxed + rate * (changed - changed.detach()), distance)

    def fixed(self) -> PowerDiagram:
        """The same pieces, evaluated in float64 and with proofs."""
        slopes, intercepts = self._copies().double(), self.weights.detach().double()
        return PowerDiagram(slopes, intercepts - (0 if self.encoded else slopes.square().sum(1) / 2), self.classes)

    def train(self, mode: bool = True) -> Self:
        """Also forgets what copies were searched, so that training resumed after an epoch goes on as it would have."""
        self._search = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # type: ignore[override]
        self._search = None
        return super()._apply(fn, recurse)

    def _pieces(self, which: Int[Tensor, "batch few"]) -> Float[Tensor, "batch few d"]:
        # Unlike an index, an embedding has a backward pass whose sums do not depend on the order of threads (nor have
        # poses on a CPU). So have the weights.
        if self.poses is None:
            return nn.functional.embedding(which, self.sites)
        rows = which.flatten()
        sites = nn.functional.embedding(rows // self.poses.count, self.sites)
        return self.poses(sites, rows % self.poses.count).unflatten(0, which.shape)

    def _weighed(self, which: Int[Tensor, "batch few"]) -> Float[Tensor, "batch few"]:
        return nn.functional.embedding(which, self.weights[:, None]).squeeze(2)

    @torch.no_grad()
    def _copies(self) -> Float[Tensor, "pieces d"]:
        """All pieces."""
        return self.sites.detach() if self.poses is None else self.poses.every(self.sites)

    def _searched(self) -> "_Search":
        """All pieces; in poses as they were a few steps ago, which is near enough to find some by."""
        found = self._search
        if found is None:
            sites = self._copies()
            left = 1 if self.poses is None else POSED_AGAIN
            found = _Search(sites, sites.to(_coarse(sites.device)), sites.square().sum(1), left)
        self._search = None if found.left == 1 else found._replace(left=found.left - 1)
        return found

    @torch.no_grad()
    def _chosen(self, x: Tensor, y: Tensor) -> tuple[Int[Tensor, " batch"], Int[Tensor, "batch few"]]:
        """Of the best pieces of y the one that keeps all others farthest away; of the nearest classes the nearest one.

        Only the best eight of each class are looked at; scores are in half precision where that is fast, the distances
        to what is chosen are not.
        """
        sites, coarse, squares, _ = self._searched()
        heights = self.weights - (0 if self.encoded else squares / 2)
        scores = (x.to(coarse.dtype) @ coarse.T).to(x.dtype) + heights
        most, start, best = min(LOOKED_AT, max(self.counts)), 0, []
        for part in scores.split(self.counts, dim=1):
            top = start + part.topk(min(most, part.shape[1]), dim=1).indices
            best.append(torch.cat([top, top[:, :1].expand(-1, most - top.shape[1])], 1))
            start += part.shape[1]
        pieces = torch.stack(best, 1)  # (batch, classes, most)
        rows = torch.arange(len(x), device=x.device)
        own, every = pieces[rows, y, :FEW], pieces.flatten(1)
        ahead = scores.gather(1, own)[:, :, None] - scores.gather(1, every)[:, None]
        apart = squares[own][:, :, None] + squares[every][:, None] - 2 * _products(sites, own, every)
        distance = (ahead * apart.clamp(min=TINY).rsqrt()).unflatten(2, pieces.shape[1:])
        distance[rows, :, y] = torch.inf
        first = distance.amin((2, 3)).argmax(1)
        nearest = distance[rows, first].min(2)
        others = len(self.counts) - 1
        near = nearest.values.topk(others if self.encoded else min(NEAREST, others), dim=1, largest=False).indices
        other = pieces.gather(2, nearest.indices[:, :, None]).squeeze(2)
        return own[rows, first], other.gather(1, near)


def _products(
    sites: Float[Tensor, "n d"], own: Int[Tensor, "batch few"], other: Int[Tensor, "batch many"]
) -> Float[Tensor, "batch few many"]:
    """Inner products of sites: of all where these are few, else of those asked for, some samples at a time."""
    if len(sites) <= ALL_PAIRS:
        return (sites @ sites.T)[own[:, :, None], other[:, None]]
    found = sites.new_empty(*own.shape, other.shape[1])
    at_once = max(1, AT_ONCE[sites.device.type == "cuda"] // (other.shape[1] * sites.shape[1]))
    for part, first, second in zip(*(rows.split(at_once) for rows in (found, own, other)), strict=True):
        torch.bmm(sites[first], sites[second].mT, out=part)
    return found


def _coarse(device: torch.device) -> torch.dtype:
    """A precision to find pieces in: half of it where processors multiply so several times as fast."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@torch.no_grad()
def _boxed(x: Tensor, g: Tensor, ahead: Tensor, box: Box) -> tuple[Tensor, Tensor, Tensor]:
    """Steps to the nearest points, within the box, of planes in direction g that lie `ahead` of x; lengths, t / r."""
    start = x[:, None]
    t = ahead / g.square().sum(2).clamp(min=TINY)
    for _ in range(NEWTON):
        moved = start + t[:, :, None] * g
        gained = ((moved.clamp(*box) - start) * g).sum(2)
        slope = (g.square() * torch.where(g > 0, moved < box[1], moved > box[0])).sum(2)
        t = torch.where((gained < ahead) & (slope > TINY), t + (ahead - gained) / slope.clamp(min=TINY), t)
    delta = (start + t[:, :, None] * g).clamp(*box) - start
    distance = delta.norm(dim=2)
    return delta, distance, t / distance.clamp(min=TINY)
