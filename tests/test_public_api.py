"""Public means listed: every public module has `__all__`, and every name in it exists."""

import importlib
import pkgutil

import pytest

import otad

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(otad.__path__, "otad.")
    if not any(part.startswith("_") for part in module.name.split("."))
)

# What users, notebooks and other programs call.
CONTRACT = {
    "otad": {"OTADClassifier", "ThreatModel", "evaluate"},
    "otad.cip": {
        "BrenierPotential",
        "Regularity",
        "feasible_potentials",
        "interpolate",
        "smallest_smoothness",
    },
    "otad.data": {"NAMES", "load", "load_features"},
    "otad.defense": {"OTAD"},
}


@pytest.mark.parametrize("name", ["otad", *MODULES])
def test_listed_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", None)
    assert listed is not None, f"{name} has no __all__"
    assert len(set(listed)) == len(listed), f"{name}.__all__ lists a name twice"
    missing = [n for n in listed if not hasattr(module, n)]
    assert not missing, f"{name}.__all__ lists names that do not exist: {missing}"


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_contract_names_are_public(name: str) -> None:
    assert CONTRACT[name] <= set(importlib.import_module(name).__all__)


@pytest.mark.parametrize("name", ["otad", *MODULES])
def test_public_things_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for n in module.__all__:
        thing = getattr(module, n)
        if callable(thing) and getattr(thing, "__module__", "").startswith("otad"):
            assert thing.__doc__, f"{name}.{n} has no docstring"
