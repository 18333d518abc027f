"""otad info, and versions."""

import importlib.metadata
import os
import platform
from pathlib import Path

import typer

from otad.cli.failures import job
from otad.cli.options import DataDir, Debug, Quiet

__all__ = ["info", "version"]

PACKAGES = (
    "otad",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "accelerate",
    "pyautoattack",
    "matplotlib",
)

# What `otad.data.NAMES` reads from the data folder; sets that ship in packages need none.
FILES = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion-mnist": "FashionMNIST/raw/train-images-idx3-ubyte",
    "cifar10": "cifar10_subset.npz",
    "pbmc68k": "pbmc68k_reduced.npz",
    "pancreas": "pancreas_baron_segerstolpe.npz",
    "steel-plates": "steel_plates_faults.csv.gz",
    "sensorless-drive": "sensorless_drive_2200.csv.gz",
    "shuttle": "statlog_shuttle.csv.gz",
}


@job
def info(data_dir: DataDir = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show versions, the device that would be used, and the data sets that are there."""
    from otad.data import NAMES

    typer.echo(f"{'python':14}{platform.python_version()} on {platform.platform(terse=True)}")
    for package in PACKAGES:
        typer.echo(f"{package:14}{version(package)}")
    typer.echo(f"{'device':14}{_device()}")
    folder = "none; give --data-dir or set OTAD_DATA" if data_dir is None else str(data_dir)
    typer.echo(f"\ndata sets (data folder: {folder})")
    for name, words in NAMES.items():
        typer.echo(f"  {'yes' if _there(name, data_dir) else 'no':5}{name:18}{words}")


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda, {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _there(name: str, data_dir: Path | None) -> bool:
    return name not in FILES or (data_dir is not None and (data_dir / FILES[name]).is_file())
