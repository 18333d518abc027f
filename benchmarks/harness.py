"""What the benchmarks share: timing, the machine's shape, plain tables, results as JSON."""

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = [
    "RESULTS",
    "Benchmark",
    "ExtraMemory",
    "Table",
    "copy_bandwidth",
    "machine",
    "markdown",
    "median_seconds",
    "save",
    "settle",
    "sizes_of",
    "with_threads",
]

RESULTS = Path(__file__).parent / "results"
# Read before the benchmark itself loads the machine: timings taken beside other work are worth little.
LOAD_AT_START = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
PACKAGES = ("otad", "torch", "numpy", "scipy", "cvxpy", "clarabel", "POT")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def __str__(self) -> str:
        cells = [self.columns, *(tuple(_cell(value) for value in row) for row in self.rows)]
        widths = [max(len(row[j]) for row in cells) for j in range(len(self.columns))]
        lines = ["  ".join(_pad(row[j], widths[j], j) for j in range(len(widths))).rstrip() for row in cells]
        return "\n".join([self.title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


@dataclass(frozen=True)
class Benchmark:
    """One question and its answer."""

    name: str
    question: str
    timed: dict[str, str]  # label -> what exactly is inside the clock
    tables: list[Table]
    seed: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        timed = "\n".join(f"  {label}: {meaning}" for label, meaning in self.timed.items())
        tables = "\n\n".join(str(table) for table in self.tables)
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return f"{self.question}\n\nWhat is timed\n{timed}\n\n{tables}{notes}"


def median_seconds(call: Callable[[], Any], repeats: int = 5, warm_up: int = 1, device: str = "cpu") -> float:
    """Median wall-clock seconds of a call, after calls that are not counted."""
    seconds = []
    for turn in range(warm_up + repeats):
        settle(device)
        start = time.perf_counter()
        call()
        settle(device)
        if turn >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def with_threads(n: int, call: Callable[..., Answer], *inputs: Any) -> Answer:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return call(*inputs)
    finally:
        torch.set_num_threads(before)


def sizes_of(*tensors: torch.Tensor) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of copying 256 MiB (1 GiB on an accelerator)."""
    source = torch.zeros(2**28 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device=device)


class ExtraMemory:
    """Peak bytes within the block beyond what was there before it, in `extra`.

    On Linux the peak is counted anew from the start of the block; elsewhere only a new high of the process shows.
    """

    def __init__(self, device: str) -> None:
        self.device, self.extra = device, 0

    def __enter__(self) -> "ExtraMemory":
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _resident("VmRSS")
        else:
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
        return self

    def __exit__(self, *failure: object) -> None:
        if self.device != "cpu":
            peak = torch.cuda.max_memory_allocated()
        elif sys.platform == "linux":
            peak = _resident("VmHWM")
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.extra = peak - self.before


def _resident(line: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(row for row in status if row.startswith(line)).split()[1])


def markdown(results: dict[str, Any]) -> str:
    """The tables of results/<name>.json, for the docs."""
    texts = []
    for table in results["tables"]:
        columns = list(table["rows"][0])
        lines = [columns, ["-"] * len(columns), *([_cell(row[name]) for name in columns] for row in table["rows"])]
        texts.append("\n".join([table["title"], "", *("| " + " | ".join(line) + " |" for line in lines)]))
    return "\n\n".join(texts)


def machine() -> dict[str, Any]:
    shape: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": LOAD_AT_START,
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        shape["gpu"] = torch.cuda.get_device_name()
    return shape


def save(benchmark: Benchmark) -> Path:
    """Write results/<name>.json; without dates, so that two runs differ by their timings alone."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark.name}.json"
    content = {
        "name": benchmark.name,
        "question": benchmark.question,
        "timed": benchmark.timed,
        "tables": [_records(table) for table in benchmark.tables],
        "notes": benchmark.notes,
        "seed": benchmark.seed,
        "machine": machine(),
        "versions": {"python": platform.python_version(), **_versions(PACKAGES)},
    }
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
    return path


def _records(table: Table) -> dict[str, Any]:
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    return {"title": table.title, "rows": rows}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def settle(device: str) -> None:
    """Wait until an accelerator is done."""
    if device != "cpu":
        torch.cuda.synchronize()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 or abs(value) >= 1e7 else f"{value:,.4g}"
    return "-" if value is None else str(value)


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
