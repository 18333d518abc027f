"""CIP-net: a network that guesses the solution of a neighbourhood's convex integration problem."""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["CIPNet", "Imitation"]

PAIR_FACTS, NODE_FACTS = 11, 5
TINY, FAR = 1e-30, 1e3


@dataclass(frozen=True)
class Imitation:
    """How near a network's answers are to the exact ones, on problems that it was not trained on.

    Attributes:
        feature_error: mean of |z_net - z| / |z|.
        feature_error_95: its 95th percentile.
        label_agreement: share of queries to which the head gives the same label from both.
        nearest_error, mean_error: the mean error of two guesses that need no network: the nearest neighbour's feature,
            and the mean feature.
        problems: how many.
    """

    feature_error: float
    feature_error_95: float
    label_agreement: float
    nearest_error: float
    mean_error: float
    problems: int

    @property
    def near(self) -> bool:
        """Whether it may stand in for the exact solution: feature error at most 10 %, labels equal in 97 %."""
        return self.feature_error <= 0.1 and self.label_agreement >= 0.97

    def __str__(self) -> str:
        return (
            f"feature error {self.feature_error:.1%} (95th percentile {self.feature_error_95:.1%}), same label as the "
            f"exact solution {self.label_agreement:.1%}, on {self.problems:,} problems"
        )

    def to_dict(self) -> dict[str, float]:
        """The attributes by their names."""
        return asdict(self)


class CIPNet(nn.Module):
    """A transformer over the K neighbours of a query that answers with their weights on the simplex.

    For l = 0 the exact feature is sum_i w_i z_i with weights that depend on the points through inner products alone,
    and so do these: each neighbour (x_i, z_i) is a token, and what two neighbours have to do with each other enters
    attention as its bias and among its values; the query is the origin of all products. The weights are therefore
    unchanged by translations of x, by rotations, and by a common factor of x or of z (L following), and move with any
    permutation of the neighbours. One network serves every dimension and every K.

    Args:
        width: of a token.
        layers: of attention and perceptron.
        heads: of attention; must divide the width.

    Raises:
        ValueError: a size below 1, or heads that do not divide the width.

    Source: Gai, Wang, Zhang, arXiv 2408.00329 (CIP-net: 6 layers, 8 heads, width 2048, the points themselves as 2K + 1
        tokens, the feature itself as its answer).
    """

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        if min(width, layers, heads) < 1 or width % heads:
            raise ValueError(f"need width, layers, heads >= 1 and heads a divisor of width; got {width, layers, heads}")
        channels = 4 * heads
        self.nodes = nn.Sequential(nn.Linear(NODE_FACTS, width), nn.GELU(), nn.Linear(width, width))
        self.pairs = nn.Sequential(nn.Linear(PAIR_FACTS, channels), nn.GELU(), nn.Linear(channels, channels), nn.GELU())
        self.layers = nn.ModuleList(_Layer(width, heads, channels) for _ in range(layers))
        self.score = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(
        self,
        zz: Float[Tensor, "batch k k"],
        zd: Float[Tensor, "batch k k"],
        dd: Float[Tensor, "batch k k"],
        tilt: Float[Tensor, "batch k"],
        L: float | None = None,
    ) -> Float[Tensor, "batch k"]:
        """Logits of the weights.

        Args:
            zz: <z_i, z_j>, the z_i centred; as the others, see `otad.cip.gram.InnerProducts`.
            zd: <z_i, x - x_j>, the z_i centred.
            dd: <x - x_i, x - x_j>.
            tilt: <mean of the z_i, x - x_j>.
            L: the smoothness; None where it is to be the smallest feasible one of the neighbourhood.
        """
        nodes, pairs = _facts(zz, zd, dd, tilt, L)
        kind = next(self.parameters()).dtype
        h, e = self.nodes(nodes.to(kind)), self.pairs(pairs.to(kind))
        for layer in self.layers:
            h = layer(h, e)
        return self.score(h).squeeze(2)


class _Layer(nn.Module):
    """Attention among neighbours, with what is known of each pair as bias and among the values; then a perceptron."""

    def __init__(self, width: int, heads: int, channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.bias = nn.Linear(channels, heads)
        self.out = nn.Linear(width + heads * channels, width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Float[Tensor, "batch k width"], e: Float[Tensor, "batch k k channels"]) -> Tensor:
        batch, k, width = h.shape
        q, key, value = self.qkv(self.norm(h)).view(batch, k, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ key.transpose(2, 3)) * (width // self.heads) ** -0.5 + self.bias(e).permute(0, 3, 1, 2)
        attention = scores.softmax(3)  # (batch, heads, k, k)
        tokens = (attention @ value).transpose(1, 2).reshape(batch, k, width)
        seen = (attention.transpose(1, 2) @ e).flatten(2)  # (batch, k, heads * channels)
        h = h + self.out(torch.cat([tokens, seen], 2))
        return h + self.inner(self.inner_norm(h))


def _facts(zz: Tensor, zd: Tensor, dd: Tensor, tilt: Tensor, smoothness: float | None) -> tuple[Tensor, Tensor]:
    """What decides the weights, without units: facts of each neighbour (batch, k, 5), of each pair (batch, k, k, 11).

    With b_i the value at x of the i-th lower bound of the potential, the constraints read b_i >= r_i = <z_i, x - x_i>
    and b_i - b_j >= V_ij = <z_i - z_j, x - x_i> + |z_i - z_j|^2 / (2L); the weights then maximise
    w . (b + diag S / 2) - w' S w / 2, S the products of the features over L. Where V has a positive cycle, it is
    replaced by that of the class F(-L', L') with the smallest L', at least max |z_i - z_j| / |x_i - x_j|.
    """
    z_square, x_square = _square_distances(zz), _square_distances(dd)
    own = zd.diagonal(dim1=1, dim2=2)
    ahead = own[:, :, None] - zd.transpose(1, 2)  # <z_i - z_j, x - x_i>
    both = -(ahead + ahead.transpose(1, 2))  # <z_i - z_j, x_i - x_j>
    with torch.no_grad():  # differences of neighbours do not move with the query
        lipschitz = _largest(z_square, x_square).sqrt()
        # The pairs' bound on L is the smallest L or nearly so, unless features go back where points go ahead.
        back = ((both <= 0) & (z_square > 0)).any(2, keepdim=True).any(1, keepdim=True)
        L = torch.where(back, lipschitz, _largest(z_square, both)).clamp(min=TINY)
        if smoothness is not None:
            L = torch.full_like(L, smoothness)
    bend = z_square / (2 * L)
    unit = (ahead.abs() + bend).mean((1, 2), keepdim=True).clamp(min=TINY)
    wide = ahead + (z_square / lipschitz.clamp(min=TINY) + 2 * both - lipschitz * x_square) / 4
    V, wide, S, r = (ahead + bend) / unit, wide / unit, zz / (L * unit), (own + tilt) / unit[:, 0]
    R = r[:, None, :] - r[:, :, None]
    torn = (V + V.transpose(1, 2)).amax((1, 2), keepdim=True)  # above 0: a pair alone makes a positive cycle
    # V + R is positive where the bound of j lifts that of i above its start.
    directed = [V, wide, (V + R).asinh(), (wide + R).asinh()]
    pairs = [*directed, *(fact.transpose(1, 2) for fact in directed), S, bend / unit, R.asinh()]
    nodes = [
        (r - r.amax(1, keepdim=True)).asinh(),
        S.diagonal(dim1=1, dim2=2),
        V.amax(1),
        V.amax(2),
        torn[:, 0].expand_as(r).asinh(),
    ]
    # Beyond FAR only where all features are equal but for rounding, and any weights will do.
    return torch.stack(nodes, 2).clamp(-FAR, FAR), torch.stack(pairs, 3).clamp(-FAR, FAR)


def _square_distances(gram: Tensor) -> Tensor:
    size = gram.diagonal(dim1=1, dim2=2)
    return (size[:, :, None] + size[:, None, :] - 2 * gram).clamp(min=0)


def _largest(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Largest quotient over pairs of a positive denominator, (batch, 1, 1)."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=TINY), 0).amax((1, 2), keepdim=True)
