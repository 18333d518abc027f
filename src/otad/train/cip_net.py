"""Fit CIP-net: solve many neighbourhoods exactly, imitate their solutions, measure the imitation on others."""

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from otad.cip.gram import inner_products
from otad.defense import NeighborhoodInterpolation, NetworkInterpolation, guessed_weights, known_smoothness
from otad.neighbors import nearest_neighbors
from otad.nn.cip_net import CIPNet, Imitation
from otad.train.loop import EpochRow, train

__all__ = ["CIPEpoch", "Problems", "compare", "fit_cip_net", "imitate", "solved_problems"]

HELD_OUT_SHARE, HELD_OUT_LEAST = 0.1, 200
MEASURED = 2000  # problems behind each figure of an imitation
NUMBERS_AT_ONCE = 2**23  # of neighbours in a chunk


class CIPEpoch(EpochRow):
    """Its loss is the mean squared error of the features, in units of the spread of the neighbours' features."""


Neighborhoods = tuple[Tensor, Tensor, Tensor]  # queries (batch, d), neighbours and their features (batch, k, d)
Coordinates = Callable[[Tensor], Tensor | None]  # points (batch, d) in stem units -> (batch, e)


class Problems(NamedTuple):
    """Solved problems, as `CIPNet.forward` takes them, with the exact weights; float32."""

    zz: Float[Tensor, "n k k"]
    zd: Float[Tensor, "n k k"]
    dd: Float[Tensor, "n k k"]
    tilt: Float[Tensor, "n k"]
    weights: Float[Tensor, "n k"]


def imitate(
    solver: NeighborhoodInterpolation,
    head: nn.Linear,
    *,
    coordinates: Coordinates = lambda points: None,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    n_problems: int = 50_000,
    epochs: int = 20,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    mixed_precision: str = "no",
    progress: bool = False,
) -> tuple[NetworkInterpolation, dict[str, Imitation], list[CIPEpoch]]:
    """A network in place of the solver, and how near it comes.

    A tenth of the training points (at least 200, at most half) is held out: no query of the training starts from them.

    Args:
        solver: the exact interpolation.
        head: features to logits, to compare labels.
        coordinates: of points in stem units, by the solver's retrieval; the default belongs to Euclidean neighbours.
        width: see `CIPNet`.
        layers: see `CIPNet`.
        heads: see `CIPNet`.
        n_problems: solved and learned from.
        epochs: passes over them.
        seed: of the queries, the weights and the batch order.
        checkpoint: see `fit_cip_net`.
        resume: see `fit_cip_net`.
        device: see `fit_cip_net`.
        mixed_precision: see `fit_cip_net`.
        progress: show progress bars.

    Returns:
        the interpolation, its imitation on "new samples" (held-out points that their neighbourhoods do not contain) and
        on "perturbed" queries made as those it learned from, and one `CIPEpoch` per epoch.

    Raises:
        ValueError: a solver that no network can imitate, see `NetworkInterpolation`, or of a single point; no
            coordinates for its retrieval.
        KeyboardInterrupt: after Ctrl-C; the checkpoint of the last finished epoch stays.
    """
    smoothness = known_smoothness(solver)
    n = len(solver.x)
    if n < 2:
        raise ValueError(f"a network learns from queries near at least 2 distinct training points; got {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(solver.x.device)
    held_out = max(1, min(n // 2, max(round(HELD_OUT_SHARE * n), HELD_OUT_LEAST)))
    problems = solved_problems(
        solver, n_problems, rows=order[held_out:], coordinates=coordinates, seed=seed + 1, progress=progress
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = CIPNet(width, layers, heads)
    history = fit_cip_net(
        net,
        problems,
        smoothness,
        epochs=epochs,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
    )
    net.to(solver.x.device)
    rows = order[:held_out]
    new = [_neighborhoods(solver, solver.x[own], own, coordinates) for own in rows[:MEASURED].split(_chunk(solver))]
    found = {
        "new samples": compare(solver, net, head, new),
        "perturbed": compare(solver, net, head, _queries(solver, MEASURED, rows, coordinates, seed + 2)),
    }
    return NetworkInterpolation(solver, net, found["new samples"]), found, history


def solved_problems(
    solver: NeighborhoodInterpolation,
    n: int,
    *,
    rows: Int[Tensor, " m"],
    coordinates: Coordinates = lambda points: None,
    seed: int = 0,
    progress: bool = False,
) -> Problems:
    """Queries of four kinds, as many of each, with their exact solutions.

    The kinds are: training points whose neighbourhood does not contain them, as new samples are; training points with
    noise, contained or not; points on the line to any other training point, up to its middle, and to a near one, with
    noise. The noise is 0.01 to 1 times the distance of the nearest neighbour. Near and distance are meant in stem units
    here; the neighbourhoods are those of the solver's retrieval.

    Args:
        solver: what solves them.
        n: how many.
        rows: training points that queries start from.
        coordinates: see `imitate`.
        seed: of the queries.
        progress: show a bar.
    """
    chunks: list[Problems] = []
    with tqdm(total=n, desc="solving", unit="problem", disable=not progress) as bar, torch.no_grad():
        for x, x_i, z_i in _queries(solver, n, rows, coordinates, seed):
            products = inner_products(x, x_i, z_i)
            assert products.dd is not None  # made with distances
            parts = (products.zz, products.zd, products.dd, products.tilt, solver.solve(x, x_i, z_i).stats["weights"])
            chunks.append(Problems(*(part.float().cpu() for part in parts)))
            bar.update(len(x))
    return Problems(*(torch.cat([chunk[i] for chunk in chunks]) for i in range(5)))


def fit_cip_net(
    net: CIPNet,
    problems: Problems,
    smoothness: float | None,
    *,
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    mixed_precision: str = "no",
    progress: bool = False,
) -> list[CIPEpoch]:
    """Minimise the mean squared error of the features by AdamW with a cosine schedule, in place.

    A difference of weights dw moves the feature by dw' zz dw: the dimension d is never seen.

    Args:
        net: trained in place and left in eval mode on the CPU.
        problems: what to learn from.
        smoothness: L, None where it is searched for each neighbourhood.
        epochs: passes over the problems.
        batch_size: problems a step, per process.
        learning_rate: the largest of the schedule.
        seed: of the batch order; the caller seeds the weights.
        checkpoint: folder for the last epoch's state, written after every epoch.
        resume: go on from the checkpoint where there is one.
        device: "cpu", "cuda", ..; None leaves it to accelerate.
        mixed_precision: "no", "bf16" or "fp16".
        progress: show a bar with the loss.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the checkpoint of the last finished epoch stays.
    """
    history = train(
        "cip_net",
        net,
        _Objective(net, smoothness),
        tuple(problems),
        torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.0),
        CIPEpoch,
        settings={"smoothness": smoothness},
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
    )
    net.to("cpu").eval().requires_grad_(False)
    return history


def compare(
    solver: NeighborhoodInterpolation, net: CIPNet, head: nn.Linear, queries: Iterable[Neighborhoods]
) -> Imitation:
    """How near the network comes to the solver.

    Args:
        solver: what is imitated.
        net: what imitates it.
        head: features to logits.
        queries: with their neighbours, in chunks.
    """
    smoothness = known_smoothness(solver)
    head = copy.deepcopy(head).double()
    net = copy.deepcopy(net).eval()
    errors, same = [], []
    with torch.no_grad():
        for x, x_i, z_i in queries:
            exact = solver.solve(x, x_i, z_i).value
            weights = guessed_weights(net, inner_products(x, x_i, z_i), smoothness)
            guesses = [(weights[:, None] @ z_i).squeeze(1), z_i[:, 0], z_i.mean(1)]
            size = exact.norm(dim=1).clamp(min=torch.finfo(exact.dtype).tiny)
            errors.append(torch.stack([(guess - exact).norm(dim=1) / size for guess in guesses], 1))
            same.append(head(guesses[0]).argmax(1) == head(exact).argmax(1))
    error, agreement = torch.cat(errors), torch.cat(same).double().mean()
    mean_errors = error.mean(0).tolist()
    return Imitation(
        feature_error=mean_errors[0],
        feature_error_95=float(error[:, 0].quantile(0.95)),
        label_agreement=float(agreement),
        nearest_error=mean_errors[1],
        mean_error=mean_errors[2],
        problems=len(error),
    )


class _Objective(nn.Module):
    """The loss of a batch; a module of its own so that any engine can wrap it."""

    def __init__(self, net: CIPNet, smoothness: float | None) -> None:
        super().__init__()
        self.net, self.smoothness = net, smoothness

    def forward(self, zz: Tensor, zd: Tensor, dd: Tensor, tilt: Tensor, weights: Tensor) -> tuple[Tensor]:
        spread = zz.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(zz.dtype).tiny)
        apart = self.net(zz, zd, dd, tilt, self.smoothness).softmax(1) - weights
        return (((apart[:, None] @ zz @ apart[:, :, None]).flatten() / spread).mean(),)


def _queries(
    solver: NeighborhoodInterpolation, n: int, rows: Int[Tensor, " m"], coordinates: Coordinates, seed: int
) -> Iterator[Neighborhoods]:
    """Queries of the four kinds of `solved_problems` with their neighbours, in chunks."""
    generator = torch.Generator().manual_seed(seed)
    points = solver.x

    def uniform(count: int) -> Tensor:
        return torch.rand(count, 1, generator=generator, dtype=torch.float64).to(points.device)

    def chosen(count: int, among: int) -> Tensor:
        return torch.randint(among, (count,), generator=generator).to(points.device)

    while n > 0:
        count = min(n, _chunk(solver))
        n -= count
        own = rows[chosen(count, len(rows))]
        x = points[own]
        distances, near = nearest_neighbors(x, points, min(solver.k + 1, len(points)))
        near = near.gather(1, chosen(count, near.shape[1])[:, None]).squeeze(1)
        kind = chosen(count, 4)[:, None]
        x = torch.where(kind == 2, x + uniform(count) / 2 * (points[chosen(count, len(points))] - x), x)
        x = torch.where(kind == 3, x + uniform(count) * (points[near] - x), x)
        reach = distances[:, min(1, distances.shape[1] - 1), None] * 100 ** (uniform(count) - 1)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) / x.shape[1] ** 0.5
        x = torch.where(kind > 0, x + reach * noise, x)
        leave = (kind == 0) | ((kind == 1) & (uniform(count) < 0.5))
        yield _neighborhoods(solver, x, torch.where(leave.squeeze(1), own, -1), coordinates)


def _neighborhoods(
    solver: NeighborhoodInterpolation, x: Tensor, without: Int[Tensor, " batch"], coordinates: Coordinates
) -> Neighborhoods:
    """Nearest training points in the solver's retrieval, but for one of each query (-1: all)."""
    n = len(solver.x)
    found = solver.nearest(x, coordinates(x), min(solver.k + 1, n)).indices
    if n > solver.k:
        # The points to keep in their order, then the one to leave out or else the farthest.
        found = found.gather(1, (found == without[:, None]).long().argsort(dim=1, stable=True))[:, : solver.k]
    return x, solver.x[found], solver.z[found]


def _chunk(solver: NeighborhoodInterpolation) -> int:
    return max(1, min(1024, NUMBERS_AT_ONCE // (solver.k * solver.x.shape[1])))
