"""Imports point down: a module may import lower layers, and siblings only inside its own package."""

import ast
from pathlib import Path

import otad

SOURCE = Path(otad.__file__).parent

LAYERS = [
    {"__init__", "__main__"},
    {"cli"},
    {"runs"},
    {"estimator", "evaluation"},
    {"baselines", "fitting"},
    {"train", "attacks", "audit", "certificate", "explanation", "report"},
    {"defense", "storage"},
    {"transport", "retrieval"},
    {"cip", "nn", "neighbors", "data"},
    {"results", "files"},
    {"errors"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Plain data that siblings may name in annotations, hence only under TYPE_CHECKING.
ANNOTATIONS = {
    "otad.attacks.threat_model.ThreatModel",
    "otad.attacks.ThreatModel",
    "otad.certificate.Certificate",
}


def test_every_module_has_a_layer() -> None:
    assert {unit(path) for path in modules()} <= set(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {target}"
        for path in modules()
        for line, target, typing_only in imports(path)
        if not allowed(unit(path), target, typing_only)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_imports_sees_them_all(tmp_path: Path) -> None:
    folder = tmp_path / "attacks"
    folder.mkdir()
    file = folder / "suite.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import otad.errors\n"
        "from otad import data, ThreatModel\n"
        "from .threat_model import project\n"
        "from ..cip import interpolate\n"
        "if TYPE_CHECKING:\n"
        "    from otad.certificate import Certificate\n"
        "else:\n"
        "    import otad.report as r\n"
        "def late():\n"
        "    from otad.cli import main\n"
    )
    assert set(imports(file, tmp_path)) == {
        (2, "otad.errors", False),
        (3, "otad.data", False),
        (3, "otad.ThreatModel", False),
        (4, "otad.attacks.threat_model.project", False),
        (5, "otad.cip.interpolate", False),
        (7, "otad.certificate.Certificate", True),
        (9, "otad.report", False),
        (11, "otad.cli.main", False),
    }
    assert allowed("attacks", "otad.cip.interpolate", False)
    assert allowed("attacks", "otad.attacks.threat_model.project", False)
    assert allowed("attacks", "otad.certificate.Certificate", True)
    assert not allowed("attacks", "otad.certificate.Certificate", False)
    assert not allowed("attacks", "otad.report", False)
    assert not allowed("attacks", "otad.ThreatModel", False)
    assert not allowed("cip", "otad.nn.MLP", False)
    assert not allowed("cip", "otad.cli.main", False)


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def unit(path: Path, source: Path = SOURCE) -> str:
    """The module or package directly under otad that the file belongs to."""
    return path.relative_to(source).parts[0].removesuffix(".py")


def allowed(importer: str, target: str, typing_only: bool) -> bool:
    imported = target.split(".")[1]
    if importer == imported or (typing_only and target in ANNOTATIONS):
        return True
    # A name that is no module comes from otad/__init__.py, which stands above all.
    return LEVEL[importer] < LEVEL.get(imported, 0)


def imports(path: Path, source: Path = SOURCE) -> list[tuple[int, str, bool]]:
    """Every import of otad in a file: line, dotted target, whether it is under TYPE_CHECKING."""
    package = ("otad", *path.relative_to(source).parts[:-1])
    return list(_walk(ast.parse(path.read_text()).body, package, False))


def _walk(nodes: list[ast.AST] | list[ast.stmt], package: tuple[str, ...], typing_only: bool):
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "otad":
                    yield node.lineno, alias.name if "." in alias.name else "otad.__init__", typing_only
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            if module.split(".")[0] == "otad":
                for alias in node.names:
                    yield node.lineno, f"{module}.{alias.name}", typing_only
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _walk(node.body, package, True)
            yield from _walk(node.orelse, package, typing_only)
        else:
            yield from _walk(list(ast.iter_child_nodes(node)), package, typing_only)
