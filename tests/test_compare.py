"""otad compare: the same samples for all methods, finished cells kept, and no table of contradictory numbers."""

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from otad.attacks.threat_model import ThreatModel
from otad.baselines import NearestNeighbor
from otad.certificate import Certificate
from otad.cli import main
from otad.data import load
from otad.data.splits import held_out, stratified_subset
from otad.errors import ContradictionError, DataError
from otad.files import write_json, write_text
from otad.report.cell import RANDOMISED, Cell
from otad.report.comparison import compared
from otad.report.comparison_plot import comparison_plot
from otad.report.comparison_table import markdown
from otad.runs import METHODS, compare, method_named, read_cells
from otad.runs.compare import judged_again
from otad.runs.fitted import Fitted
from otad.runs.methods import fit_otad
from otad.runs.radii import radii_for
from otad.runs.splits import source_epochs

pytestmark = pytest.mark.slow

DIGITS: dict[str, Any] = {"n_train": 300, "n_test": 40, "n_attacked": 10, "eps": (0.2, 0.5), "attacks": ["lines"]}


def fit_linear(x: Tensor, y: Tensor, threat: ThreatModel, **_: Any) -> Fitted:
    """Least squares to one-hot classes, certified by its exact distance to each boundary."""
    flat = x.flatten(1).double()
    ones = torch.cat([flat, torch.ones(len(x), 1)], dim=1)
    solution = torch.linalg.solve(ones.T @ ones + torch.eye(ones.shape[1]), ones.T @ nn.functional.one_hot(y).double())
    linear = nn.Linear(flat.shape[1], int(y.max()) + 1)
    linear.weight.data, linear.bias.data = solution[:-1].T.float(), solution[-1].float()
    module = nn.Sequential(nn.Flatten(), linear)

    def certify(inputs: Tensor) -> Certificate:
        logits, rows = module(inputs).detach(), linear.weight.detach()
        label = logits.argmax(1)
        apart = torch.cdist(rows[label], rows).scatter(1, label[:, None], 1.0)
        distance = (logits.gather(1, label[:, None]) - logits).scatter(1, label[:, None], torch.inf) / apart
        return Certificate(label.numpy(), 0.999 * distance.amin(1).double().numpy(), np.full(len(label), "linear"))

    return Fitted(module, certify, {"epochs": 0})


def fit_nearest(x: Tensor, y: Tensor, threat: ThreatModel, **_: Any) -> Fitted:
    module = NearestNeighbor(x, y)
    return Fitted(module, module.certify)


QUICK = {"linear": fit_linear, "nearest": fit_nearest}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds, on 300 real digits."""
    folder = tmp_path_factory.mktemp("compare")
    compare(["digits"], folder, methods=QUICK, seeds=2, **DIGITS)
    return folder


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in (folder / "cells").rglob("*.json")}


def test_finished_cells_are_not_run_again(finished: Path) -> None:
    before = files(finished)
    assert set(before) == {f"cells/digits/{m}/seed-{s}.json" for m in QUICK for s in (0, 1)}
    compare(["digits"], finished, methods=QUICK, seeds=2, **DIGITS)
    assert files(finished) == before
    lost = "cells/digits/linear/seed-1.json"
    (finished / lost).unlink()
    compare(["digits"], finished, methods=QUICK, seeds=2, **DIGITS)
    after = files(finished)
    assert {name for name in before if after[name] != before[name]} == {lost}


def test_an_interruption_keeps_finished_cells(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    calls: list[int] = []

    def stops(x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int, **_: Any) -> Fitted:
        calls.append(seed)
        if seed == 1:
            raise Stop
        return fit_linear(x, y, threat)

    with pytest.raises(Stop):
        compare(["digits"], tmp_path, methods={"linear": stops, "nearest": fit_nearest}, seeds=2, **DIGITS)
    kept = files(tmp_path)
    assert set(kept) == {"cells/digits/linear/seed-0.json", "cells/digits/nearest/seed-0.json"}
    assert not list(tmp_path.rglob(".*")), "nothing half-written"
    (one,) = compare(["digits"], tmp_path, methods=QUICK, seeds=2, **DIGITS)
    assert calls == [0, 1]
    assert kept.items() <= files(tmp_path).items()
    assert [row.seeds for row in one.rows] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("changed", [{"eps": (0.2,)}, {"n_attacked": 5}, {"attacks": ["noise"]}, {"budget": 9.0}])
def test_other_settings_are_refused_before_any_work(finished: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"seed-0.json: finished with other settings .*{next(iter(changed))}.*--out"):
        compare(["digits"], finished, methods=QUICK, seeds=2, **{**DIGITS, **changed})


@pytest.mark.parametrize(
    "wrong", [{"attacks": []}, {"attacks": ["magic"]}, {"seeds": 0}, {"budget": float("nan")}, {"n_attacked": 0}]
)
def test_settings_out_of_range(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("s")):
        compare(["digits"], tmp_path, methods=QUICK, **{**DIGITS, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_method_on_another_backbone(tmp_path: Path) -> None:
    names = ["undefended@resnet", "undefended", "otad-neighborhood@transformer"]
    settings = DIGITS | {"n_train": 100, "budget": 1e-3}
    (one,) = compare(["digits"], tmp_path, methods={name: method_named(name) for name in names}, **settings)
    assert [row.method for row in one.rows] == ["undefended", "undefended@resnet", "otad-neighborhood@transformer"]
    cells = {cell.method: cell for cell in read_cells(tmp_path)}
    assert cells["undefended"].clean_accuracy != cells["undefended@resnet"].clean_accuracy, "two networks"
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 2
    fitted = method_named("pgd@resnet")(x, y, ThreatModel("l2", 0.1), minutes=1e-3)
    assert any(isinstance(part, nn.Conv2d) for part in fitted.module.modules())


@pytest.mark.parametrize("name", ["magic", "pgd@magic", "pgd@", "1-nn@resnet", "lipschitz@mlp"])
def test_an_unknown_method_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name.partition('@')[0]}'|{name!r}"):
        method_named(name)


def test_a_constant_column_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    kinds = np.arange(60) % 2
    values = rng.normal(size=(60, 2)) + 4 * kinds[:, None]
    lines = ["a,same,b,label", *(f"{a:.4f},7,{b:.4f},{kind}" for (a, b), kind in zip(values, kinds))]
    write_text(tmp_path / "table.csv", "\n".join(lines) + "\n")
    methods = {name: METHODS[name] for name in ("otad-global", "1-nn", "lipschitz")}
    settings = {"n_attacked": 5, "attacks": ["lines"], "budget": 1e-3}
    with caplog.at_level(logging.WARNING, "otad"):
        (one,) = compare([str(tmp_path / "table.csv")], tmp_path / "out", methods=methods, **settings)
    assert "same" in caplog.text
    assert [row.method for row in one.rows] == list(methods)
    assert next(row for row in one.rows if row.method == "1-nn").clean == (1.0,)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "mine")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        compare(["digits"], tmp_path / "file", methods=QUICK, **DIGITS)


def test_all_methods_see_the_same_samples(finished: Path) -> None:
    cells = read_cells(finished)
    splits = {seed: {c.split for c in cells if c.seed == seed} for seed in (0, 1)}
    assert [len(found) for found in splits.values()] == [1, 1]
    assert splits[0] != splits[1]
    data = load("digits", n_train=300, n_test=40, seed=1)
    (linear,) = (c for c in cells if (c.method, c.seed) == ("linear", 1))
    module = fit_linear(torch.as_tensor(data.x_train), torch.as_tensor(data.y_train), ThreatModel("l2", 1.0)).module
    right = module(torch.as_tensor(data.x_test)).argmax(1).numpy() == data.y_test
    assert linear.clean_accuracy == right.mean()
    assert (linear.correct == right[:10]).all()
    strange = replace(cells[0], split="another")
    with pytest.raises(ContradictionError, match="digits, linear, seed 0: its samples are not those"):
        compared([*cells[1:], strange], ())


def test_every_cell_keeps_the_order(finished: Path) -> None:
    for cell in read_cells(finished):
        assert cell.certified["0.2"].any()
        for radius, survived in cell.survived.items():
            assert (cell.certified[radius] <= survived).all()
            assert (survived <= cell.correct).all()
            assert survived.mean() == cell.attack_accuracy[radius]["worst_case"]
        cell.check()


def broken(cell: Cell, **changes: Any) -> Cell:
    """The cell with these first entries: planted contradictions."""
    arrays = {"correct": np.array([1, 1, 0, 0], bool)}
    arrays |= {"survived": {"0.2": np.array([1, 1, 0, 0], bool), "0.5": np.array([1, 0, 0, 0], bool)}}
    arrays |= {"certified": {"0.2": np.array([1, 0, 0, 0], bool), "0.5": np.array([0, 0, 0, 0], bool)}}
    return replace(cell, **{**arrays, **changes})


@pytest.mark.parametrize(
    ("name", "radius", "flags", "words"),
    [
        ("certified", "0.5", [1, 1, 0, 0], "L2 0.5 certified, and yet broken"),
        ("survived", "0.5", [1, 0, 1, 0], "L2 0.5 misclassified, and yet said to survive"),
        ("survived", "0.2", [0, 1, 0, 0], "certified, and yet broken"),
    ],
)
def test_a_planted_contradiction_makes_no_table(
    finished: Path, tmp_path: Path, name: str, radius: str, flags: list[int], words: str
) -> None:
    good = broken(read_cells(finished)[0])
    good.check()
    bad = broken(good, **{name: {**getattr(good, name), radius: np.array(flags, bool)}})
    with pytest.raises(ContradictionError, match=f"digits, linear, seed 0: .*{words}"):
        compared([bad], ())
    # The same through the files: the command finds every cell finished, and still makes no table of them.
    for cell in read_cells(finished):
        write_json(tmp_path / "cells" / "digits" / cell.method / f"seed-{cell.seed}.json", cell.to_dict())
    write_json(tmp_path / "cells" / "digits" / "linear" / "seed-0.json", bad.to_dict())
    with pytest.raises(ContradictionError, match=words):
        compare(["digits"], tmp_path, methods=QUICK, seeds=2, **DIGITS)
    assert not (tmp_path / "table.md").exists()


def test_survival_may_not_rise_with_the_radius(finished: Path) -> None:
    cell = broken(read_cells(finished)[0], certified={})
    cell = replace(cell, survived={"0.2": cell.survived["0.5"], "0.5": cell.survived["0.2"]})
    with pytest.raises(ContradictionError, match=r"broken within 0\.2"):
        cell.check()


def test_a_randomised_certificate_may_err_once_and_is_marked(finished: Path) -> None:
    cell = broken(read_cells(finished)[0], certificate=RANDOMISED)
    once = replace(cell, certified={**cell.certified, "0.5": np.array([1, 1, 0, 0], bool)})
    text = markdown(compared([once], ()))
    assert "50.0†" in text
    assert "† a randomised certificate" in text
    assert "†" not in markdown(compared([broken(cell, certificate="deterministic")], ()))
    twice = replace(once, survived={**cell.survived, "0.5": np.zeros(4, bool)})
    with pytest.raises(ContradictionError):
        twice.check()


def test_a_randomised_certificate_judges_its_own_samples_again() -> None:
    # One number a sample: its sign is the class, and within 0.1 of the boundary the certificate abstains.
    def certify(inputs: Tensor) -> Certificate:
        far = inputs.abs().clamp(max=1.0).flatten()
        radius = torch.where(far > 0.1, far, 0).double().numpy()
        return Certificate((inputs.flatten() > 0).long().numpy(), radius, np.full(len(radius), RANDOMISED))

    y, broken_at = np.array([1, 1, 1]), np.array([[-0.05], [-0.5], [-0.5]], np.float32)
    survived = judged_again(
        Fitted(nn.Identity(), certify),
        {"0.3": np.zeros(3, bool), "0.6": np.array([True, True, False])},
        {"0.3": np.array([True, True, True]), "0.6": np.array([False, False, False])},
        {"0.3": broken_at, "0.6": broken_at},
        y,
    )
    assert survived["0.3"].tolist() == [True, False, False]
    assert survived["0.6"].tolist() == [True, False, False], "broken within 0.3, so within 0.6"


def test_a_cell_survives_its_file(finished: Path) -> None:
    for cell in read_cells(finished):
        text = json.dumps(cell.to_dict(), allow_nan=False)
        again = Cell.from_dict(json.loads(text), "here")
        assert json.dumps(again.to_dict()) == text
        assert (again.correct == cell.correct).all()


@pytest.mark.parametrize("damage", ["", "[]", '{"format": "another"}', '{"format": "otad compare cell, version 1"}'])
def test_a_damaged_cell_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cells" / "digits" / "linear" / "seed-0.json"
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    with pytest.raises(DataError, match=r"seed-0\.json: .*delete the file"):
        compare(["digits"], tmp_path, methods=QUICK, **DIGITS)


def test_the_outputs_say_the_same(finished: Path) -> None:
    compare(["digits"], finished, methods=QUICK, seeds=2, **DIGITS)
    found = json.loads((finished / "compare.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    (one,) = found["comparisons"]
    cells = [c for c in read_cells(finished) if c.method == "nearest"]
    shares = [c.survived["0.5"].mean() for c in cells]
    (row,) = (m for m in one["methods"] if m["method"] == "nearest")
    assert row["worst_case"]["0.5"]["mean"] == pytest.approx(np.mean(shares))
    assert row["worst_case"]["0.5"]["sd"] == pytest.approx(np.std(shares, ddof=1))
    words = f"{100 * np.mean(shares):.1f} ± {100 * np.std(shares, ddof=1):.1f}"
    lines = [line for line in (finished / "table.md").read_text().splitlines() if line.startswith("| nearest")]
    line, _ = lines  # over the attacked samples, over all
    assert line.split("|")[6].strip() == words
    ElementTree.parse(finished / "plot-digits.svg")
    html = (finished / "report.html").read_text("utf-8")
    assert html.count(f"<td>{words}</td>") == 1
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    one = compared(read_cells(finished), ("nearest",))
    assert [r.method for r in one.rows] == ["nearest", "linear"]
    assert comparison_plot(one, ("nearest",)) == comparison_plot(one, ("nearest",))


def test_radii_are_where_nearest_neighbors_certify_less_and_less() -> None:
    digits = load("digits", n_train=300)
    radii = radii_for(digits)
    assert radii == sorted(set(radii))
    # The distance to the plane between the nearest sample and one of another class, by the book, without a box.
    x, y = digits.x_train.reshape(300, -1).astype(float), digits.y_train
    order = stratified_subset(y, 300, 0)
    x, y = x[order], y[order]
    held = held_out(y, 0.2, 0)
    known, classes = x[~held], y[~held]
    own = []
    for point, label in zip(x[held], y[held]):
        d = ((point - known) ** 2).sum(1)
        if classes[d.argmin()] == label:
            i, others = np.flatnonzero(classes == label), np.flatnonzero(classes != label)
            planes = (d[others] - d[i][:, None]) / (2 * cdist(known[i], known[others]))
            own.append(planes.max(axis=0).min())
    assert radii_for(replace(digits, box=None)) == pytest.approx(np.quantile(own, [0.1, 0.3, 0.5]), rel=0.06)
    assert np.all(np.array(radii) >= radii_for(replace(digits, box=None)))  # a box leaves an attacker less
    doubled = replace(digits, x_train=2 * digits.x_train, box=(0.0, 2.0))
    assert radii_for(doubled) == pytest.approx(2 * np.array(radii), rel=0.11)
    assert radii_for(replace(digits, x_train=np.zeros((300, 1, 28, 28), np.float32))) == [0.5, 1.0, 1.58]
    for x, y in (
        (np.zeros((300, 64), np.float32), digits.y_train),  # all of them twins
        (digits.x_train[:10], np.arange(10)),  # nothing to hold out
    ):
        with pytest.raises(DataError, match="give --eps"):
            radii_for(replace(digits, x_train=x, y_train=y, box=None))
    apart = np.repeat([0.0, 2.0, 4.0], 100)[:, None] + 1e-4 * np.arange(300)[:, None] % 7e-4
    classes = np.repeat([0, 1, 2], 100)
    assert radii_for(replace(digits, x_train=apart.astype(np.float32), y_train=classes, box=None)) == [1.0]


@pytest.mark.parametrize("interpolation", ["global", "neighborhood"])
def test_otad_keeps_its_budget(interpolation: str, caplog: pytest.LogCaptureFixture) -> None:
    data = load("digits", n_train=120, n_test=40)
    x, y = torch.as_tensor(data.x_train), torch.as_tensor(data.y_train)
    with caplog.at_level(logging.WARNING, "otad"):
        short = fit_otad(x, y, ThreatModel("l2", 0.3), minutes=1e-6, interpolation=interpolation)
    assert "1 of the usual 500 epochs" in caplog.text
    assert short.facts["epochs"] == 1
    assert short.facts["validation"] == []
    assert short.certify is not None
    certificate = short.certify(torch.as_tensor(data.x_test))
    assert (certificate.label == short.module(torch.as_tensor(data.x_test)).argmax(1).numpy()).all()


def test_settings_are_chosen_on_training_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otad.runs.methods.LEAST_STEPS", 1)
    monkeypatch.setattr("otad.runs.methods.LEAST_EPOCHS", 5)
    data = load("digits", n_train=120, n_test=10)
    x, y = torch.as_tensor(data.x_train), torch.as_tensor(data.y_train)
    fitted = fit_otad(x, y, ThreatModel("l2", 0.1), minutes=2.0)
    tried = fitted.facts["validation"]
    assert len(tried) == 5
    best = max(tried, key=lambda c: (c["certified"], c["clean"]))
    assert fitted.facts["settings"] == {k: best[k] for k in ("alpha", "margin", "longer")}
    assert fitted.facts["epochs"] == 5 * best["longer"]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """`otad compare digits ..` in this process: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        options = ["--out", tmp_path, "--n-train", 100, "--n-test", 20, "--n-attacked", 5, "--attacks", "lines", "-q"]
        code = main(["compare", *(str(word) for word in [*words, *options])])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_command_prints_the_table(command: Command, tmp_path: Path) -> None:
    code, out, err = command("digits", "--methods", "1-nn", "--eps", "0.3,0.6")
    assert (code, err) == (0, "")
    assert "1-nn" in out
    assert "certified" in out
    assert {p.name for p in tmp_path.iterdir()} == {
        "cells",
        "compare.json",
        "table.md",
        "report.html",
        "plot-digits.svg",
    }


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["digits", "--methods", "magic"], 2, "magic"),
        (["digits", "--eps", "0"], 1, "--eps"),
        (["digits", "--budget", "-1"], 1, "budget"),
        (["digitz"], 1, "digits"),
        (["digits", "--eps", "0.3", "--seeds", "0"], 2, "seeds"),
    ],
)
def test_the_command_refuses(command: Command, words: list[str], code: int, named: str) -> None:
    found, out, err = command(*words)
    assert (found, out) == (code, "")
    assert named in err


def test_ctrl_c_says_how_to_go_on(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Fitted:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "undefended", interrupted)
    code, _, err = command("digits", "--methods", "1-nn,undefended", "--eps", "0.3")
    assert code == 130
    assert err.count("\n") == 1
    assert f"finished cells are kept in {tmp_path / 'cells'}; go on with: otad compare digits --methods 1-nn,und" in err
    assert set(files(tmp_path)) == {"cells/digits/1-nn/seed-0.json"}


@pytest.mark.parametrize("n", [1, 127, 128, 129, 3000, 60_000])
def test_the_network_to_transfer_from_takes_hundreds_of_steps_whatever_the_samples(n: int) -> None:
    epochs, a_pass = source_epochs(n), math.ceil(n / 128)
    assert epochs >= 6
    assert 200 < epochs * a_pass <= max(300, 6 * a_pass)
