"""How do time and memory grow with the number of neighbours K, the dimension d and the number of points n?

Neighbourhoods are random points with features z = 0.4 x + 1.5 tanh(4 x) / 4, whose potential has curvature in
[0.4, 1.9]; the points of the global potential are those of `global_fit`. Each case runs in a process of its own.

    python benchmarks/run.py growth                   all sizes; n = 60,000 where OTAD_DATA names the 60,000 digits
    python benchmarks/run.py growth --device cuda
    python benchmarks/growth.py --quick               small sizes; nothing written
    python benchmarks/growth.py --draw                docs/images/growth.svg and tables in Markdown from the results
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from global_fit import RATIO, RTOL, SEED, load_digits, transport_map
from harness import RESULTS, Benchmark, ExtraMemory, Table, copy_bandwidth, markdown, median_seconds, sizes_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from otad.cip import BrenierPotential, Regularity, interpolate_neighborhood
from otad.report.drawing import MARKERS, MODEL_COLORS, svg_text

__all__ = ["DEVICES", "run"]

DEVICES = ("cpu", "cuda")
K, D, N = (5, 10, 20, 50, 100, 200), (64, 784, 4096, 24960), (1000, 4000, 16000, 60000)
QUICK_K, QUICK_D, QUICK_N = (5, 20), (64, 784), (500, 1000)
MOST_BYTES = {"cpu": 2**28, "cuda": 2**32}  # of the neighbours of a batch
MOST_QUERIES = {"cpu": 1024, "cuda": 2**15}
EVALUATED = 10_000  # queries of the global potential
CONVEX = Regularity(l=0.0, L=2.0)
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "growth.svg"

LOCAL = (
    "K",
    "d",
    "batch",
    "microseconds a query",
    "queries a second",
    "share of bandwidth",
    "extra memory, MiB",
    "neighbours, MiB",
)
GLOBAL = (
    "n",
    "fit, seconds",
    "fit, extra memory, MiB",
    "first query, seconds",
    "product, microseconds a query",
    "upper / product",
    "lower / product",
    "mean / product",
    "evaluation, microseconds a query",
    "queries a second",
    "evaluation, extra memory, MiB",
    "data, MiB",
    "L",
)
TIMED = {
    "microseconds a query": "interpolate_neighborhood (lower, l = 0, L = 2, float64, no gradients), the batch at once",
    "share of bandwidth": "bytes of the neighbours and their features, read once, over the time and over the bandwidth "
    "of a copy (bytes read and written) in the same process",
    "extra memory": "peak beyond what is there before the call",
    "fit": f"BrenierPotential.fit(x, z, ratio=-1, rtol={RTOL}), float32 points",
    "evaluation": f"gradient(x, 'mean') of {EVALUATED:,} test digits (fewer where there are fewer) at once, exact",
    "first query": "gradient of two queries, which also makes the sketches of all pieces",
    "product": "queries @ x.T in float32, in blocks of 1,024 queries: nothing else",
    "upper, lower, mean": "gradient(x, branch), exact and in float64, over the time of the product",
}


def run(quick: bool = False, device: str = "cpu") -> Benchmark:
    ks, ds, ns = (QUICK_K, QUICK_D, QUICK_N) if quick else (K, D, N)
    local = [_alone(_neighborhoods, k, d, device) for d in ds for k in ks]
    digits = load_digits()
    ns = tuple(n for n in ns if n <= len(digits.x_train))
    backbone, transport = transport_map(digits, max(ns))
    with torch.no_grad():
        queries = backbone.stem(torch.from_numpy(digits.x_test[:EVALUATED]))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, points in (("x", transport.x), ("z", transport.z), ("q", queries)):
            np.save(Path(folder) / f"{name}.npy", np.asarray(points))
        rows = [_alone(_global, n, Path(folder), device) for n in ns]
    return Benchmark(
        name="growth" if device == "cpu" else f"growth_{device}",
        question="Time and memory as K, d and n grow.",
        timed=TIMED,
        tables=[
            Table("A neighbourhood: potentials and interpolation", LOCAL, local),
            Table(f"One potential for n points: {digits.name}, d = {transport.x.shape[1]}", GLOBAL, rows),
        ],
        seed=SEED,
        notes=[f"Batches shrink where their neighbours would take more than {MOST_BYTES[device] // 2**20} MiB."],
    )


def _alone(case: Callable[..., tuple[Any, ...]], *inputs: Any) -> tuple[Any, ...]:
    """A case in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        row = process.submit(_with_threads, torch.get_num_threads(), case, inputs).result()
    print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row), flush=True)
    return row


def _with_threads(threads: int, case: Callable[..., tuple[Any, ...]], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    torch.set_num_threads(threads)
    return case(*inputs)


def _neighborhoods(k: int, d: int, device: str) -> tuple[Any, ...]:
    batch = max(1, min(MOST_QUERIES[device], MOST_BYTES[device] // (16 * k * d)))
    generator = torch.Generator(device).manual_seed(SEED)
    x_i = torch.randn(batch, k, d, dtype=torch.float64, device=device, generator=generator).mul_(0.3)
    z_i = (4 * x_i).tanh_().mul_(0.375).add_(x_i, alpha=0.4)
    x = x_i.mean(1)

    def solve(rows: int) -> torch.Tensor:
        with torch.no_grad():
            return interpolate_neighborhood(x[:rows], x_i[:rows], z_i[:rows], CONVEX).checked()

    solve(min(batch, 8))
    with ExtraMemory(device) as memory:
        solve(batch)
    seconds = median_seconds(lambda: solve(batch), repeats=5, warm_up=0, device=device)
    size = sizes_of(x_i, z_i)
    share = size / seconds / copy_bandwidth(device)
    return k, d, batch, 1e6 * seconds / batch, batch / seconds, share, memory.extra / 2**20, size / 2**20


def _global(n: int, folder: Path, device: str) -> tuple[Any, ...]:
    x, z, queries = (torch.from_numpy(np.load(folder / f"{name}.npy")).to(device) for name in "xzq")
    x, z = x[:n].clone(), z[:n].clone()
    BrenierPotential.fit(x[:50], z[:50], RATIO, rtol=RTOL).gradient(queries[:2])  # what is loaded on first use
    start = time.perf_counter()
    with ExtraMemory(device) as of_fit:
        phi = BrenierPotential.fit(x, z, RATIO, rtol=RTOL)
    fitted = time.perf_counter()
    with torch.no_grad(), ExtraMemory(device) as of_gradient:
        first = median_seconds(lambda: phi.gradient(queries[:2]).checked(), 1, warm_up=0, device=device)
        upper, lower, mean = (
            median_seconds(partial(phi.gradient, queries, branch), 1, warm_up=0, device=device)
            for branch in ("upper", "lower", "mean")
        )
        blocks = queries.split(1024)
        product = median_seconds(lambda: [torch.mm(block, x.T) for block in blocks], 3, device=device)
    return (
        n,
        fitted - start,
        of_fit.extra / 2**20,
        first,
        1e6 * product / len(queries),
        upper / product,
        lower / product,
        mean / product,
        1e6 * mean / len(queries),
        len(queries) / mean,
        of_gradient.extra / 2**20,
        sizes_of(x, z) / 2**20,
        float(phi.regularity.L),
    )


def draw(results: dict[str, Any]) -> str:
    """The SVG text of four logarithmic plots: time and memory, against K and against n."""
    local, whole = (table["rows"] for table in results["tables"])

    def paint(figure: Figure) -> None:
        axes = figure.subplots(2, 2)
        for i, d in enumerate(sorted({row["d"] for row in local})):
            rows = [row for row in local if row["d"] == d]
            for axis, column in ((axes[0, 0], "microseconds a query"), (axes[1, 0], "extra memory, MiB")):
                _line(axis, rows, "K", column, i, f"d = {d:,}")
        for i, column in enumerate(
            ("fit, seconds", "evaluation, microseconds a query", "product, microseconds a query")
        ):
            _line(axes[0, 1], whole, "n", column, i, column)
        for i, column in enumerate(("fit, extra memory, MiB", "evaluation, extra memory, MiB", "data, MiB")):
            _line(axes[1, 1], whole, "n", column, i, column.removesuffix(", MiB"))
        axes[0, 0].set(title="neighbourhood: microseconds a query", xlabel="K")
        axes[1, 0].set(title="neighbourhood: extra memory, MiB a batch", xlabel="K")
        axes[0, 1].set(title="one potential: time", xlabel="n")
        axes[1, 1].set(title="one potential: memory, MiB", xlabel="n")
        for axis in axes.flat:
            axis.set(xscale="log", yscale="log")
            axis.legend(fontsize=8)

    return svg_text(paint, 8.4, 6.4)


def _line(axes: Axes, rows: list[dict[str, Any]], across: str, up: str, i: int, label: str) -> None:
    points = [(row[across], row[up]) for row in rows if row[up] > 0]
    if points:
        axes.plot(*zip(*points, strict=True), color=MODEL_COLORS[i], marker=MARKERS[i], markersize=4, label=label)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    arguments = parser.parse_args()
    if arguments.draw:
        found = json.loads((RESULTS / "growth.json").read_text())
        PICTURE.write_text(draw(found))
        print(markdown(found))
    else:
        print(run(quick=arguments.quick, device=arguments.device))
