"""What the benchmarks share: timing, the machine's shape, plain tables, results as JSON."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "Benchmark", "Table", "machine", "median_seconds", "save"]

RESULTS = Path(__file__).parent / "results"
# Read before the benchmark itself loads the machine: timings taken beside other work are worth little.
LOAD_AT_START = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
PACKAGES = ("otad", "torch", "numpy", "scipy", "cvxpy", "clarabel", "POT")


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
        _settle(device)
        start = time.perf_counter()
        call()
        _settle(device)
        if turn >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 or abs(value) >= 1e7 else f"{value:,.4g}"
    return "-" if value is None else str(value)


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
