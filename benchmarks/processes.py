"""What do two processes gain over one, where they share the points of a potential?

MNIST digits with the features of `global_fit.py`; l = -L, the smallest L to 1 %; then 1,000 new digits evaluated
exactly. One and two processes are started by torchrun alike, with one thread each, and give the same answer.

    python benchmarks/run.py processes
    python benchmarks/processes.py 1000 4000     other sizes; nothing written
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from global_fit import ALPHA, RATIO, RTOL, SEED, load_digits, peak_memory, transport_map
from harness import Benchmark, Table
from safetensors.torch import load_file, save_file

from otad.cip import BrenierPotential

__all__ = ["run"]

QUERIES = 1000
QUICK, FULL = (500, 1000), (4000, 16000)
COLUMNS = (
    "n",
    "processes",
    "fit, seconds",
    "fit, CPU seconds each",
    "1,000 queries, seconds",
    "1,000 queries, CPU seconds each",
    "peak memory each, GiB",
    "of it for the data, GiB",
    "points held each, GiB",
    "L",
)
COMPARED = (
    "n",
    "fit, two / one",
    "fit CPU, two / one",
    "queries, two / one",
    "queries CPU, two / one",
    "memory for the data, two / one",
    "points held, two / one",
    "potentials differ by, relative",
    "L differs by",
    "features differ by",
)
TIMED = {
    "fit": "BrenierPotential.fit of the own rows: smallest L, potentials, proof over all pairs; the slower process",
    "1,000 queries": "gradient(x, 'mean') in float64, all queries in every process",
    "CPU seconds": "time that the busier process computed, without waiting for the other or for a free core",
    "peak memory": "largest resident size of a process; `of it for the data`: beyond the interpreter with its packages",
    "points held": "buffers of the fitted potential: points, features, and the pieces of both branches in float64",
}


def run(quick: bool = False, sizes: tuple[int, ...] | None = None) -> Benchmark:
    digits = load_digits()
    sizes = tuple(n for n in sizes or (QUICK if quick else FULL) if n <= len(digits.x_train))
    _, transport = transport_map(digits, max(sizes))
    rows, compared = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "queries.npy", digits.x_test[:QUERIES].reshape(len(digits.x_test[:QUERIES]), -1))
        for n in sizes:
            for array, points in (("x", transport.x), ("z", transport.z)):
                np.save(folder / f"{array}.npy", points[:n].numpy())
            one, two = (_started(folder, world) for world in (1, 2))
            rows += [tuple(n if c == "n" else facts[c] for c in COLUMNS) for facts, _ in (one, two)]
            compared.append((n, *_compared(one, two)))
            print("  ".join(f"{c} {value}" for c, value in zip(COMPARED, compared[-1], strict=True)), flush=True)
    return Benchmark(
        name="processes",
        question="Seconds and memory of one potential in two processes, one thread each, against one process.",
        timed=TIMED,
        tables=[
            Table(f"Digits: {digits.name}, alpha = {ALPHA:g}", COLUMNS, rows),
            Table("Two processes beside one", COMPARED, compared),
        ],
        seed=SEED,
        notes=[
            "The processes look at all pairs together, each for its own rows; the sweeps over the chosen pairs run in "
            "both. Halves are the limit; where cores are shared with other work, compare the CPU seconds."
        ],
    )


def _started(folder: Path, world: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    launch = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(world)]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, __file__, "--measure", str(folder)]
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **loopback})
    each = [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(world)]
    return {name: max(facts[name] for facts in each) for name in each[0]}, load_file(folder / "answers.safetensors")


def _compared(one: tuple[dict[str, Any], Any], two: tuple[dict[str, Any], Any]) -> tuple[float, ...]:
    ratios = (2, 3, 4, 5, 7, 8)
    potentials, features = ((one[1][name] - two[1][name]).abs().max() for name in ("potentials", "features"))
    return (
        *(two[0][COLUMNS[c]] / one[0][COLUMNS[c]] for c in ratios),
        float(potentials / one[1]["potentials"].max()),
        abs(one[0]["L"] - two[0]["L"]),
        float(features),
    )


def _measure(folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    idle = peak_memory()
    stored = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xz"]
    share = np.array_split(np.arange(len(stored[0])), world)[rank]
    x, z = (torch.from_numpy(array[share]) for array in stored)
    queries = torch.from_numpy(np.load(folder / "queries.npy")).double()
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    phi = BrenierPotential.fit(x, z, RATIO, rtol=RTOL, process_group=dist.group.WORLD)
    fitted, fitted_busy = time.perf_counter(), time.process_time()
    features = phi.gradient(queries).checked()
    end, end_busy = time.perf_counter(), time.process_time()
    peak = peak_memory()
    held = sum(buffer.nbytes for buffer in phi.buffers())
    memory = (peak / 2**30, (peak - idle) / 2**30, held / 2**30)
    seconds = (fitted - start, fitted_busy - busy, end - fitted, end_busy - fitted_busy)
    facts = dict(zip(COLUMNS[1:], (world, *seconds, *memory, phi.lipschitz), strict=True))
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    if rank == 0 and phi.proof is not None:
        save_file({"potentials": phi.proof.potentials, "features": features}, folder / "answers.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=QUICK, metavar="N")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        _measure(arguments.measure)
    else:
        print(run(sizes=tuple(arguments.sizes)))
