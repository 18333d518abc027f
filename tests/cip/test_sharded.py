"""One potential over several processes, started by torchrun: what one process finds, and half of the points each."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from otad.cip import BrenierPotential
from otad.cip.shards import Shards

from . import sharing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes found, of which two share some of the potentials."""
    folder = tmp_path_factory.mktemp("processes")
    launch = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "3"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "--module", sharing.__name__, str(folder)]
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **loopback}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder


@cache
def alone(name: str) -> tuple[dict[str, Tensor], BrenierPotential]:
    case = sharing.CASES[name]()
    phi = BrenierPotential.fit(case.x, case.z, **case.options)
    return sharing.answers(phi, case.queries), phi


@pytest.mark.parametrize("name", sharing.CASES)
def test_same_as_one_process(folder: Path, name: str) -> None:
    case = sharing.CASES[name]()
    expected, phi = alone(name)
    world = 2 if name in sharing.PAIR else 3
    for rank in range(world):
        found = load_file(folder / f"{name}-{rank}.safetensors")
        own, gathered, smoothed = (found.pop(key) for key in ("own potentials", "gathered", "smoothed"))
        torch.testing.assert_close(own, phi.potentials[case.own(rank, world)], atol=1e-9, rtol=0)
        torch.testing.assert_close(gathered, expected["mean feature"], atol=1e-9, rtol=0)
        exact = phi.smoothed(0.5).gradient(case.queries).value
        torch.testing.assert_close(smoothed, exact, atol=1e-9, rtol=0)
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], atol=1e-9, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_searched_smoothness_was_searched() -> None:
    """Else the case above would not compare what it is there for."""
    _, phi = alone("searched")
    assert phi.proof is not None
    assert phi.proof.searches > 1
    assert phi.proof.infeasible_below is not None
    assert len(phi.proof.cycle) >= 2


@pytest.mark.parametrize("name", sharing.PAIR)
def test_each_process_holds_its_half(folder: Path, name: str) -> None:
    case = sharing.CASES[name]()
    _, phi = alone(name)
    for rank in range(2):
        size = json.loads((folder / f"report-{rank}.json").read_text())[name]
        assert size["bytes"] <= 0.51 * sharing.held(phi)
        # The fit never puts more rows side by side than its own.
        assert size["rows"] <= (len(case.x) + 1) // 2


EXPECTED = {
    "infeasible": ("InfeasibleError", "raise L or lower l"),
    "nothing fits": ("InfeasibleError", "no smoothness"),
    "not finite": ("ValueError", "finite|another process"),
    "torn": ("ValueError", "equal points carry different features"),
    "no rows": ("ValueError", "n >= 1|another process"),
    "widths": ("ValueError", "one width"),
    "options": ("ValueError", "the same options"),
    "queries": ("ValueError", "the same x"),
    "number of queries": ("ValueError", "the same x"),
    "width of queries": ("ValueError", "x must be|another process"),
}


def test_errors_reach_every_process(folder: Path) -> None:
    for rank in range(3):
        raised = json.loads((folder / f"report-{rank}.json").read_text())["errors"]
        assert set(raised) == set(EXPECTED)
        for name, (kind, message) in EXPECTED.items():
            assert raised[name][0] == kind
            assert any(part in raised[name][1] for part in message.split("|")), raised[name][1]


def test_one_process_tells_itself() -> None:
    rows = torch.arange(12.0).reshape(4, 3)
    shards = Shards(rows)
    assert (shards.n, shards.start, shards.stop, shards.world) == (4, 0, 4, 1)
    for same in (shards.total, shards.largest, shards.first, shards.gather):
        assert same(rows) is rows
    ((place, (seen,)),) = shards.visits(rows)
    assert (place, seen is rows) == (slice(0, 4), True)
    assert shards.owns(torch.tensor([0, 3, 4])).tolist() == [True, True, False]
