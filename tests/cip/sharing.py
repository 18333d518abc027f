"""What each process of `test_sharded.py` does, and the data that it shares: run by torchrun as a module.

torchrun --nproc-per-node 2 --module tests.cip.sharing FOLDER CASE CASE ..
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from otad.cip import BrenierPotential, Regularity, pairs, sharded_envelope, shards
from otad.errors import OTADError

from .problems import BRANCHES, KnownPotential


@dataclass(frozen=True)
class Case:
    """Points, features, queries and the options of a fit; `counts`: rows of each process, where not equal."""

    x: Tensor
    z: Tensor
    queries: Tensor
    options: dict[str, Any]
    counts: list[int] | None = None

    def own(self, rank: int, world: int) -> slice:
        n = len(self.x)
        counts = self.counts or [n // world + (r < n % world) for r in range(world)]
        return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def digits(noise: float, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Case:
    """Real digits, with the features of a known smooth map; with noise its smoothness must be searched."""
    rng = np.random.default_rng(0)
    x = np.asarray(load_digits(return_X_y=True)[0]) / 16
    potential = KnownPotential.random(64, l=-1.0, L=1.0, rng=rng)
    z = potential.gradient(x) + noise * rng.normal(size=x.shape)
    order = torch.from_numpy(rng.permutation(len(x)))
    points, features = (torch.from_numpy(t)[order].to(dtype) for t in (x, z))
    return Case(points[:701], features[:701], points[701:741].double(), options)


def cloud(n: int, counts: list[int] | None = None) -> Case:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, 3))
    z = x + 0.3 * rng.normal(size=x.shape)
    points, features, queries = (torch.from_numpy(t) for t in (x, z, 2 * rng.normal(size=(20, 3))))
    return Case(points, features, queries, {"ratio": -0.5}, counts)


CASES: dict[str, Callable[[], Case]] = {
    "known": lambda: digits(0.0, {"regularity": Regularity(-1.0, 1.0)}),
    "searched": lambda: digits(0.02, {"ratio": -1.0}, torch.float32),
    "uneven": lambda: cloud(100),
    "lopsided": lambda: cloud(60, counts=[40, 19, 1]),
    "few": lambda: cloud(4),
}
PAIR, ALL = ("known", "searched"), ("uneven", "lopsided", "few")


class LargestArray(TorchDispatchMode):
    """Most rows of any (rows, d) array that an operation returns."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d, self.rows = d, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 2 and result.shape[1] in (self.d, self.d + 1):
            self.rows = max(self.rows, len(result))
        return result


def answers(phi: BrenierPotential, queries: Tensor) -> dict[str, Tensor]:
    """All that a fitted potential tells, by name."""
    assert phi.proof is not None
    found = {
        "potentials": phi.proof.potentials,
        "own potentials": phi.potentials,
        "L": torch.tensor([phi.lipschitz, phi.proof.infeasible_below or 0.0], dtype=torch.float64),
        "proof": torch.tensor([phi.proof.pairs, phi.proof.searches, phi.proof.edges, *phi.proof.cycle]),
    }
    for branch in BRANCHES:
        x = queries.clone().requires_grad_()
        feature = phi.gradient(x, branch)
        (slope,) = torch.autograd.grad(feature.checked().square().sum(), x)
        value = phi(x, branch)
        found |= {f"{branch} value": value.checked(), f"{branch} feature": feature.value, f"{branch} slope": slope}
        # The pieces that make up the feature, in the order of their weight.
        best = feature.stats["weights"].sort(dim=1, descending=True, stable=True)
        found[f"{branch} weights"] = best.values[:, :1]
        found[f"{branch} first"] = feature.stats["indices"].gather(1, best.indices[:, :1])
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def held(phi: BrenierPotential) -> int:
    """Bytes of its points, features and pieces."""
    return sum(buffer.nbytes for buffer in phi.buffers())


def shared(case: Case, group: dist.ProcessGroup) -> tuple[dict[str, Tensor], dict[str, int]]:
    own = case.own(dist.get_rank(group), dist.get_world_size(group))
    x, z = case.x[own].clone(), case.z[own].clone()
    with LargestArray(x.shape[1]) as arrays:
        phi = BrenierPotential.fit(x, z, **case.options, process_group=group)
    found = answers(phi, case.queries)
    found["gathered"] = phi.gathered().gradient(case.queries).value
    found["smoothed"] = phi.smoothed(0.5).gradient(case.queries).value
    return found, {"bytes": held(phi), "rows": arrays.rows}


def errors(group: dist.ProcessGroup) -> dict[str, list[str]]:
    """What is raised where one process, or all together, ask for what cannot be."""
    case, rank = cloud(60), dist.get_rank(group)
    own = case.own(rank, dist.get_world_size(group))
    x, z = case.x[own], case.z[own]
    # One process alone passes what is wrong; the equal points lie in different processes.
    broken = torch.full_like(x, torch.nan) if rank == 1 else x
    equal, torn = x.clone(), z.clone()
    equal[0], torn[0] = 0.0, float(rank)
    phi = BrenierPotential.fit(x, z, process_group=group)
    attempts: dict[str, Callable[[], Any]] = {
        "infeasible": lambda: BrenierPotential.fit(x, z, regularity=Regularity(0.0, 1.0), process_group=group),
        "nothing fits": lambda: BrenierPotential.fit(x, -x, ratio=0.0, process_group=group),
        "not finite": lambda: BrenierPotential.fit(broken, z, process_group=group),
        "torn": lambda: BrenierPotential.fit(equal, torn, process_group=group),
        "no rows": lambda: BrenierPotential.fit(x[: 0 if rank else 5], z[: 0 if rank else 5], process_group=group),
        "widths": lambda: BrenierPotential.fit(x[:, : 2 + rank], z[:, : 2 + rank], process_group=group),
        "options": lambda: BrenierPotential.fit(x, z, ratio=-1.0 - rank, process_group=group),
        "queries": lambda: phi(case.queries + rank),
        "number of queries": lambda: phi(case.queries[: 5 + rank]),
        "width of queries": lambda: phi(case.queries[:, : 3 - (rank == 1)]),
    }
    raised = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OTADError, ValueError) as error:
            raised[name] = [type(error).__name__, str(error)]
    return raised


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    report(folder)
    gc.collect()  # a group that outlives its processes' store ends the interpreter
    dist.barrier()
    dist.destroy_process_group()


def report(folder: Path) -> None:
    """Write what this process found and raised."""
    rank, everyone = dist.get_rank(), dist.group.WORLD
    two = dist.new_group([0, 1])
    assert everyone is not None
    torch.set_num_threads(1)
    # Blocks as small as these data: several visits, several chunks of queries.
    shards.VISIT, pairs.CHUNK, sharded_envelope.ShardedEnvelope.rows_at_once = 2**17, 2**14, 32
    sizes: dict[str, Any] = {}
    for names, group in ((PAIR, two), (ALL, everyone)):
        if isinstance(group, dist.ProcessGroup):  # the third process is not one of two
            for name in names:
                found, sizes[name] = shared(CASES[name](), group)
                save_file(found, folder / f"{name}-{rank}.safetensors")
    sizes["errors"] = errors(everyone)
    (folder / f"report-{rank}.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
