"""How long does the adjoint of a neighbourhood's interpolation take, beside the forward pass?

Neighbourhoods of digits as in `neighborhood_interpolation`; gradients of <g, z> for random g, either in the queries
alone, as an attack needs them, or in queries, neighbours, features, l and L, as training needs them.

    python benchmarks/run.py adjoint
    python benchmarks/run.py adjoint --device cuda
"""

import statistics
import time
from typing import Any

import torch
from harness import Benchmark, Table, copy_bandwidth, median_seconds, settle, sizes_of, with_threads
from neighborhood_interpolation import LARGE, SEED, SMALL, Neighborhoods, digit_neighborhoods
from torch import Tensor

from otad.cip import Regularity, interpolate_neighborhood
from otad.cip.interpolation import Branch

__all__ = ["DEVICES", "run"]

DEVICES = ("cpu", "cuda")
REPEATS = 7
CASES: tuple[tuple[Branch, float, float], ...] = (("lower", 0.0, 2.0), ("mean", -2.0, 2.0))
COLUMNS = (
    "d",
    "batch",
    "threads",
    "branch",
    "l",
    "gradients in",
    "forward",
    "forward, recorded",
    "backward",
    "backward / forward",
    "queries a second",
    "share of bandwidth",
)
TIMED = {
    "forward": "interpolate_neighborhood without gradients, float64; microseconds a query",
    "forward, recorded": "the same with what backward needs kept",
    "backward": "torch.autograd.grad of <g, z>, the gradients allocated anew, as PyTorch does",
    "queries a second": "forward and backward together",
    "share of bandwidth": "bytes of the neighbours and their features, read once, over the time of the forward pass "
    "and over the bandwidth of a copy (bytes read and written) in the same run",
}


def run(quick: bool = False, device: str = "cpu") -> Benchmark:
    shapes = [(SMALL, 128)] if quick else [(SMALL, 1024), (LARGE, 64)]
    threads = sorted({1, torch.get_num_threads()}) if device == "cpu" else [torch.get_num_threads()]
    rows = []
    for size, batch in shapes:
        data = digit_neighborhoods(size, batch)
        data = Neighborhoods(*(part.to(device) for part in (data.x, data.x_i, data.z_i)))
        for count in threads:
            rows += with_threads(count, _times, data, device)
    return Benchmark(
        name="adjoint" if device == "cpu" else f"adjoint_{device}",
        question="Microseconds a query: backward beside forward, K = 10, float64.",
        timed=TIMED,
        tables=[Table("Potentials, interpolation and their adjoint", COLUMNS, rows)],
        seed=SEED,
    )


def _times(data: Neighborhoods, device: str) -> list[tuple[Any, ...]]:
    batch, d = data.shape
    bandwidth = copy_bandwidth(device)
    rows = []
    for branch, l, L in CASES:
        for everything in (False, True):
            inputs = [part.clone().requires_grad_(everything) for part in (data.x, data.x_i, data.z_i)]
            bounds = [torch.full((batch,), c, dtype=torch.float64, device=device) for c in (l, L)]
            inputs[0].requires_grad_()
            regularity = Regularity(*(bound.requires_grad_() for bound in bounds)) if everything else Regularity(l, L)
            wanted = [*inputs, *bounds] if everything else inputs[:1]
            forward, recorded, backward = _three(inputs, regularity, branch, wanted, device)
            share = sizes_of(data.x_i, data.z_i) / forward / bandwidth
            rows.append(
                (
                    d,
                    batch,
                    torch.get_num_threads(),
                    branch,
                    l,
                    "everything" if everything else "x",
                    *(1e6 * seconds / batch for seconds in (forward, recorded, backward)),
                    backward / forward,
                    batch / (recorded + backward),
                    share,
                )
            )
    return rows


def _three(
    inputs: list[Tensor], regularity: Regularity, branch: Branch, wanted: list[Tensor], device: str
) -> tuple[float, float, float]:
    """Median seconds of a batch: forward, forward recorded, backward."""
    x, x_i, z_i = inputs
    g = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)).to(device)

    def forward() -> Tensor:
        return interpolate_neighborhood(x, x_i, z_i, regularity, branch).value

    def plain() -> Tensor:
        with torch.no_grad():
            return forward()

    seconds = []
    for turn in range(REPEATS + 1):
        z = forward()
        settle(device)
        start = time.perf_counter()
        torch.autograd.grad(z, wanted, g)
        settle(device)
        if turn:
            seconds.append(time.perf_counter() - start)
    return (
        median_seconds(plain, REPEATS, device=device),
        median_seconds(forward, REPEATS, device=device),
        statistics.median(seconds),
    )
