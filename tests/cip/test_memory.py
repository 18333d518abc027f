"""The local kernels keep to their memory budget, whatever the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).with_name("memory_case.py")
SLACK = 16 * 2**20  # the allocator's, and pieces of points worked on at a time


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("batch", "k", "d"), [(4096, 30, 8), (400, 100, 8), (20, 100, 2000)])
def test_peak_stays_within_the_budget(batch: int, k: int, d: int) -> None:
    budget = 2**26
    command = [sys.executable, str(CASE), *map(str, (batch, k, d, budget))]
    # Freed blocks go back at once: what the allocator keeps would be counted, and differs from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    took = int(done.stdout)
    results = 8 * batch * (3 * d + 3 * k + 8)
    assert took <= budget + results + SLACK
