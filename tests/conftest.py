"""Checks of shapes and types, and the places of data that no package ships."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

import tests.annotations  # noqa: F401  (the hook looks it up by name)

# Must come before the first import of otad: every annotation is then checked at each call, in tests only.
hook = install_import_hook("otad", "tests.annotations.check")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA_DIR = Path(os.environ.get("OTAD_DATA") or SHARED_DATA)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with MNIST, CIFAR-10 and the tables; tests that need it are skipped where there is none."""
    if not DATA_DIR.is_dir():
        pytest.skip(f"no data folder {DATA_DIR}; set OTAD_DATA to the one with MNIST, CIFAR-10 and the tables")
    return DATA_DIR


@pytest.fixture(autouse=True)
def own_data_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test says where data lies; the variable of the shell must not decide."""
    monkeypatch.delenv("OTAD_DATA", raising=False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """At least two threads in torch, on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)
