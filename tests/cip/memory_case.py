"""Bytes that one call takes beyond what is there before it; run as a process of its own by `test_memory`.

python tests/cip/memory_case.py BATCH K D BUDGET
"""

import sys
from pathlib import Path

import torch

from otad.cip import Regularity, interpolate_neighborhood


def resident(line: str) -> int:
    """Bytes from /proc: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(row for row in status if row.startswith(line)).split()[1])


def main(batch: int, k: int, d: int, budget: int) -> None:
    torch.set_num_threads(1)
    x_i = torch.randn(batch, k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_i = 0.3 * x_i + torch.tanh(x_i)
    x = x_i.mean(1)
    regularity = Regularity(-2.0, 2.0)
    interpolate_neighborhood(x[:2], x_i[:2], z_i[:2], regularity, "mean")  # what is loaded on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    interpolate_neighborhood(x, x_i, z_i, regularity, "mean", memory=budget).checked()
    sys.stdout.write(str(resident("VmHWM") - before))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
