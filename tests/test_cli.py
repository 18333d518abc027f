"""The command line: what it writes, and one clear line where it cannot."""

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

from otad import load_model
from otad.attacks.sets import ATTACKS, Attack
from otad.cli import main
from otad.files import write_text

pytestmark = pytest.mark.slow


OTAD = [sys.executable, "-m", "otad"]
TINY = ("--n-train", "300", "--n-test", "60", "--epochs", "40", "--device", "cpu", "--quiet")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 300 real digits, attacked."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    # The cheapest attack and one radius: the attacks have tests of their own.
    words = ["train", "digits", "--out", str(folder), *TINY]
    words += ["--attacks", "lines", "--n-attack", "10", "--radii", "0.4"]
    assert main(words) == 0
    return folder


@pytest.fixture(scope="session")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a small table with named columns and classes, and the table beside it."""
    folder = tmp_path_factory.mktemp("table")
    write_text(folder / "cells.csv", table(90))
    words = [
        "train",
        str(folder / "cells.csv"),
        "--out",
        str(folder / "run"),
        "--epochs",
        "100",
        "--attacks",
        "none",
        "-q",
    ]
    assert main([*words, "--device", "cpu", "--label", "kind"]) == 0
    return folder


def table(
    n: int,
    *,
    columns: tuple[str, ...] = ("width", "height", "depth"),
    label: str | None = "kind",
    seed: int = 0,
) -> str:
    """CSV text: two classes apart in every column, on unequal scales."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(n) % 2
    values = (rng.normal(size=(n, len(columns))) + 3 * kinds[:, None]) * 10.0 ** np.arange(len(columns)) + 100
    lines = [",".join([*columns, *([label] if label else [])])]
    for row, kind in zip(values, kinds):
        lines.append(",".join([*(f"{v:.6g}" for v in row), *(["ab"[kind]] if label else [])]))
    return "\n".join(lines) + "\n"


def one_line(code: int, out: str, err: str) -> str:
    """The error's only line; fails where there is more or less."""
    assert code == 1, err
    assert out == ""
    assert err.startswith("otad: error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "unexpected" not in err, err
    return err


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, otad.cli; print({'torch', 'sklearn', 'matplotlib', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert found.stdout == "set()\n"


def test_help_shows_every_command_and_default(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "train", "predict", "certify", "attack", "explain", "compare", "report", "info"):
        assert command in out
        code, words, _ = run(command, "--help")
        assert code == 0
        options = set(re.findall(r"--[a-z-]+", words)) - {"--help", "--debug", "--quiet"}
        assert "default" in words or not options


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"otad (\d+\.\d+.*|not installed)\n", out)


def test_info(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("info", "--data-dir", tmp_path)
    assert code == 0
    assert re.search(r"^torch +2\.", out, flags=re.M)
    assert re.search(r"^ +yes +digits ", out, flags=re.M)
    assert re.search(r"^ +no +mnist ", out, flags=re.M)


def test_info_finds_the_data(run: Run, data_dir: Path) -> None:
    assert not re.search(r"^ +no ", run("info", "--data-dir", data_dir)[1], flags=re.M)


@pytest.mark.parametrize(
    "words",
    [
        ["sing"],
        ["train", "digits"],
        ["train", "digits", "--out", "x", "--nonsense"],
        ["train", "digits", "--out", "x", "--epochs", "many"],
        ["train", "digits", "--out", "x", "--interpolation", "magic"],
        ["train", "digits", "--out", "x", "--backbone", "magic"],
        ["train", "digits", "--out", "x", "--retrieval", "magic"],
        ["train", "digits", "--out", "x", "--radii", "half"],
        ["attack", "run", "digits", "--eps", "1,,2"],
        ["attack", "run", "digits", "--norm", "l7"],
        ["explain", "run", "digits"],
        ["demo", "--seed", "-1"],
        ["train", "digits", "--out", "x", "--seed", "4294967296"],
        ["attack", "run", "digits", "--seed", "-1"],
    ],
)
def test_wrong_usage(run: Run, words: list[str]) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert "Usage" in err


def test_a_metric_without_neighbors_is_refused(run: Run, tmp_path: Path) -> None:
    code, out, err = run("train", "digits", "--out", tmp_path / "run", "--retrieval", "robust")
    assert code != 0
    assert out == ""
    assert "give interpolation='neighborhood'" in err.splitlines()[-1]
    assert "Traceback" not in err


BAD_TABLES = {
    "empty": ("", "empty"),
    "no rows": ("a,b,label\n", "no"),
    "no label": ("a,b\n1,2\n3,4\n", "label"),
    "text": ("a,b,label\n1,2,x\n3,tall,y\n5,6,x\n", "tall"),
    "nan": ("a,b,label\n1,2,x\n3,nan,y\n5,6,x\n", "b"),
    "infinity": ("a,b,label\n1,2,x\n3,inf,y\n5,6,x\n", "b"),
    "one class": ("a,b,label\n1,2,x\n3,4,x\n5,6,x\n7,8,x\n9,1,x\n", "one class"),
    "too few": ("a,b,label\n1,2,x\n3,4,y\n", ""),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_train_refuses_bad_tables(run: Run, tmp_path: Path, case: str) -> None:
    text, words = BAD_TABLES[case]
    write_text(tmp_path / "bad.csv", text)
    err = one_line(*run("train", tmp_path / "bad.csv", "--out", tmp_path / "run"))
    assert "bad.csv" in err
    assert words in err.replace("bad.csv", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere.csv"], "nowhere.csv"),
        (["digitz"], "digits"),
        (["digits", "--radii", "0"], "--radii"),
        (["digits", "--radii", "0.5,-1"], "-1"),
        (["digits", "--radii", "inf"], "inf"),
        (["digits", "--n-train", "5"], "n_train"),
        (["digits", "--n-test", "999999"], "n_test"),
        (["mnist"], "--data-dir"),
        (["mnist", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_train_refuses_bad_requests(run: Run, tmp_path: Path, words: list[str], named: str) -> None:
    assert named in one_line(*run("train", *words, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--epochs", "-3"], ["--alpha", "-1"], ["--attacks", "magic"]])
def test_train_refuses_bad_settings(run: Run, tmp_path: Path, words: list[str]) -> None:
    one_line(*run("train", "digits", "--out", tmp_path / "run", *TINY, *words))
    assert not list(tmp_path.rglob("*.json"))


def test_train_replaces_no_foreign_folder(run: Run, tmp_path: Path) -> None:
    write_text(tmp_path / "model" / "thesis.tex", "mine")
    err = one_line(*run("train", "digits", "--out", tmp_path, *TINY))
    assert "is no otad model" in err
    assert (tmp_path / "model" / "thesis.tex").read_text() == "mine"


def test_train_needs_a_folder(run: Run, tmp_path: Path) -> None:
    write_text(tmp_path / "file", "mine")
    assert "file" in one_line(*run("train", "digits", "--out", tmp_path / "file", *TINY))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_leaves_whole_files(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} - {"checkpoint"} == {
        "metrics.json",
        "report.html",
        "examples.npz",
        "model",
    }
    assert not list(trained.rglob(".*"))
    metrics = json.loads((trained / "metrics.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert metrics["data"] == "digits"
    assert (metrics["n_train"], metrics["n_test"], metrics["seed"]) == (300, 60, 0)
    assert set(metrics["certified_accuracy"]) == {"0.4"}
    assert set(metrics["rivals"]) == {"undefended backbone", "1-NN"}
    for model in (metrics, *metrics["rivals"].values()):
        for attacked in model["robust_accuracy"].values():
            assert attacked["worst_case"] <= min(share for share in attacked.values())
    subset = metrics["extra"]["attacked_subset"]["certified_accuracy"]
    assert all(subset[r] <= metrics["robust_accuracy"][r]["worst_case"] for r in subset)
    assert metrics["seconds"]["total"] > 0
    assert [epoch["epoch"] for epoch in metrics["extra"]["history"]] == list(range(1, 41))
    assert metrics["smoothness"] > 0
    assert metrics["lipschitz"] > 0
    assert metrics["extra"]["training_fit"]["agreement"] == pytest.approx(1.0, abs=1e-6)


def test_a_run_keeps_every_sample(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    with np.load(trained / "examples.npz") as kept:
        right = kept["y"] == kept["predicted"]
        assert right.mean() == pytest.approx(metrics["clean_accuracy"])
        assert (right & (kept["certified_radius"] >= 0.4)).mean() == pytest.approx(metrics["certified_accuracy"]["0.4"])
        assert len(kept["attacked"]) == 10
        assert kept["adversarial/0.4"].shape == (10, 1, 8, 8)


def test_a_run_draws_its_page(trained: Path) -> None:
    html = (trained / "report.html").read_text("utf-8")
    HTMLParser().feed(html)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    for words in (
        "1-NN",
        "undefended backbone",
        "Because of",
        "Health of the map",
        "otad train digits --out",
    ):
        assert words in html


def test_predict_writes_csv(run: Run, trained: Path, tmp_path: Path) -> None:
    code, out, err = run("predict", trained, "digits")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 60, "the test part of the model's own data"
    right = np.mean([row["predicted"] == row["label"] for row in rows])
    assert right == pytest.approx(json.loads((trained / "metrics.json").read_text())["clean_accuracy"])
    assert f"{100 * right:.1f} % correct" in err
    code, out, err = run("predict", trained / "model", "digits", "--out", tmp_path / "p.csv", "--quiet")
    assert (code, out, err) == (0, "", "")
    assert list(csv.DictReader(io.StringIO((tmp_path / "p.csv").read_text()))) == rows
    assert len(list(csv.DictReader(io.StringIO(run("predict", trained, "digits", "--part", "all")[1])))) == 1797


@pytest.mark.parametrize(
    ("refinement", "options"),
    [("cells", []), ("cells", ["--encoder", "dense"]), ("cells", ["--encoder", "patches"]), ("potential", [])],
)
def test_a_potential_is_refined_certified_attacked_and_loaded(
    run: Run, tmp_path: Path, refinement: str, options: list[str]
) -> None:
    words = ["--refinement", refinement, *options]
    words += ["--n-train", "100", "--n-test", "40", "--epochs", "4", "--device", "cpu", "--quiet"]
    words += ["--radii", "0.5", "--attacks", "lines", "--n-attack", "10", "--target-radius", "0.5"]
    code, out, err = run("train", "digits", "--out", tmp_path / "run", *words)
    assert code == 0, err
    assert "interpolated map on the training set: features reproduced" in out
    assert "before and after training for L2 0.5" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["lipschitz"] == (pytest.approx(1) if refinement == "potential" else None)
    reached = metrics["extra"]["refinement"]
    assert reached["target_radius"] == 0.5
    fit = metrics["extra"]["training_fit"]
    assert "feature_error" not in fit
    assert fit["train_accuracy"] == pytest.approx(reached["after"]["accuracy"], abs=0.01)
    assert metrics["certified_accuracy"]["0.5"] <= metrics["clean_accuracy"]
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Before and after training the pieces" in html
    assert "--target-radius 0.5" in html
    rows = list(csv.DictReader(io.StringIO(run("predict", tmp_path / "run", "digits", "--quiet")[1])))
    right = np.mean([row["predicted"] == row["label"] for row in rows])
    assert right == pytest.approx(metrics["clean_accuracy"])
    attacked = ["--attacks", "lines", "--eps", "0.5", "--n", "10", "--out", tmp_path / "attack", "--quiet"]
    code, _, err = run("attack", tmp_path / "run", "digits", *attacked)
    assert code == 0, err
    code, _, err = run("explain", tmp_path / "run", "digits", "--index", "3")
    assert code == 0, err


@pytest.mark.parametrize(
    "words", [["--target-radius", "0"], ["--encoder", "dense"], ["--target-radius", "1", "--interpolation", "network"]]
)
def test_a_target_radius_that_cannot_be_is_refused(run: Run, tmp_path: Path, words: list[str]) -> None:
    assert "target_radius" in one_line(*run("train", "digits", "--out", tmp_path / "run", *TINY, *words))


def test_report_shows_a_run_again(run: Run, trained: Path, tmp_path: Path) -> None:
    code, out, err = run("report", trained, "--out", tmp_path / "page.html")
    assert code == 0, err
    metrics = json.loads((trained / "metrics.json").read_text())
    assert f"{100 * metrics['clean_accuracy']:.1f} %" in out
    assert "http-equiv" not in (tmp_path / "page.html").read_text("utf-8")
    assert "digits" in (tmp_path / "page.html").read_text("utf-8")
    assert "metrics.json" in one_line(*run("report", tmp_path))
    (tmp_path / "metrics.json").write_text('{"name": "x"}')
    assert "damaged" in one_line(*run("report", tmp_path))
    (tmp_path / "cells").mkdir()
    assert "no finished cells" in one_line(*run("report", tmp_path))


@pytest.mark.parametrize("words", [["--refinement", "potential"], ["--no-deform"]])
def test_options_of_refinement_need_a_radius(run: Run, tmp_path: Path, words: list[str]) -> None:
    code, _, err = run("train", "digits", "--out", tmp_path / "run", *words)
    assert code == 2
    assert "--target-radius" in err


def test_cells_of_a_table_in_principal_components(run: Run, tmp_path: Path) -> None:
    X, y = load_digits(return_X_y=True)
    table = pd.DataFrame(X[:200] / 16).assign(label=y[:200])
    table.columns = [str(name) for name in table.columns]
    table.to_csv(tmp_path / "digits.csv", index=False)
    words = ["--target-radius", "0.5", "--components", "9", "--radii", "0.5", "--attacks", "none", "--quiet"]
    code, _, err = run("train", tmp_path / "digits.csv", "--out", tmp_path / "run", *words)
    assert code == 0, err
    slopes = load_model(tmp_path / "run").interpolation.diagram.slopes  # type: ignore[union-attr]
    assert torch.linalg.matrix_rank(slopes, tol=1e-4) <= 9  # type: ignore[arg-type]
    assert "--components 9" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_cells_with_options_of_their_own(run: Run, tmp_path: Path) -> None:
    words = [*TINY, "--n-train", "100", "--n-test", "20", "--attacks", "none", "--target-radius", "0.5"]
    options = ["--refinement-option", "pieces=3", "--refinement-option", "epochs=4"]
    options += ["--refinement-option", "temperature=0.3", "--refinement-option", "poses=2"]
    code, _, err = run("train", "digits", "--out", tmp_path / "run", *words, *options)
    assert code == 0, err
    assert len(load_model(tmp_path / "run").interpolation.diagram.slopes) == 60  # type: ignore[union-attr, arg-type]
    assert " ".join(options) in (tmp_path / "run" / "report.html").read_text("utf-8")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["extra"]["refinement"]["history"]) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pieces"], "not a name and a number"),
        (["=3"], "not a name and a number"),
        (["pieces=few"], "not a name and a number"),
        (["pieces=3", "pieces=4"], "given twice"),
        (["parts=3"], "known: pieces"),
        (["epochs=2.5"], "epochs must be a whole number"),
        (["noise=nan"], "noise must be a number"),
    ],
)
def test_options_of_refinement_are_checked(run: Run, tmp_path: Path, words: list[str], said: str) -> None:
    options = [word for text in words for word in ("--refinement-option", text)]
    code, _, err = run("train", "digits", "--out", tmp_path / "run", *TINY, "--target-radius", "0.5", *options)
    assert code
    assert said in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("backbone", ["resnet", "transformer"])
def test_another_backbone_is_trained_and_saved(run: Run, tmp_path: Path, backbone: str) -> None:
    few = [*TINY, "--epochs", "4", "--n-train", "100", "--n-test", "20", "--attacks", "none"]
    code, out, _ = run("train", "digits", "--out", tmp_path / "run", *few, "--backbone", backbone)
    assert code == 0
    assert "OTAD" in out
    facts = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert facts["parameters"]["backbone"] == backbone
    code, out, _ = run("predict", tmp_path / "run", "digits", "--quiet")
    rows = list(csv.DictReader(io.StringIO(out)))
    right = np.mean([row["predicted"] == row["label"] for row in rows])
    assert right == pytest.approx(json.loads((tmp_path / "run" / "metrics.json").read_text())["clean_accuracy"])


def test_a_resnet_takes_no_table(run: Run, tmp_path: Path) -> None:
    write_text(tmp_path / "cells.csv", table(60))
    words = [
        "train",
        tmp_path / "cells.csv",
        "--out",
        tmp_path / "run",
        "--label",
        "kind",
        "--backbone",
        "resnet",
        "-q",
    ]
    assert "needs images" in one_line(*run(*words))


def test_certify_writes_csv(run: Run, trained: Path) -> None:
    code, out, err = run("certify", trained, "digits", "--radii", "0.2,0.4")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {row["kind"] for row in rows} == {"global"}
    certified = np.mean([row["predicted"] == row["label"] and float(row["radius"]) >= 0.4 for row in rows])
    assert certified == pytest.approx(json.loads((trained / "metrics.json").read_text())["certified_accuracy"]["0.4"])
    assert f"{100 * certified:.1f} % at L2 0.4" in err


@pytest.mark.parametrize("command", ["predict", "certify"])
def test_a_folder_is_no_csv_file(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(trained)
    assert ". is a folder" in one_line(*run(command, ".", "digits", "--out", ".", "-q"))


def test_the_working_folder_may_hold_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", "digits", "--out", ".", *TINY, "--attacks", "none")[0] == 0
    assert {p.name for p in tmp_path.iterdir()} >= {"metrics.json", "report.html", "model"}
    assert run("predict", ".", "digits", "-q")[0] == 0


@pytest.mark.slow
def test_attack_writes_a_report(run: Run, trained: Path, tmp_path: Path) -> None:
    words = ["--eps", "0.4", "--attacks", "lines", "--n", "8", "--out", tmp_path / "a", "-q"]
    code, out, _ = run("attack", trained, "digits", *words)
    assert code == 0
    assert "attacked, L2 0.4" in out
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert set(found["robust_accuracy"]["0.4"]) == {"lines", "worst_case"}
    assert found["n_test"] == 8
    assert found["certified_accuracy"]["0.4"] <= found["robust_accuracy"]["0.4"]["worst_case"]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"metrics.json", "report.html", "examples.npz"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--eps", "0"], "--eps"),
        (["--eps", "-0.5"], "-0.5"),
        (["--eps", "nan"], "nan"),
        (["--n", "0"], "at least 1"),
        (["--attacks", "magic"], "magic"),
    ],
)
def test_attack_refuses(run: Run, trained: Path, tmp_path: Path, words: list[str], named: str) -> None:
    assert named in one_line(*run("attack", trained, "digits", *words, "--out", tmp_path / "a", "-q"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("option", ["--out", "--results-dir"])
def test_attack_needs_a_folder(run: Run, trained: Path, tmp_path: Path, option: str) -> None:
    write_text(tmp_path / "file", "mine")
    words = ["--attacks", "noise", "--n", "5", option, tmp_path / "file"]
    assert "file is a file" in one_line(*run("attack", trained, "digits", *words))
    assert (tmp_path / "file").read_text() == "mine"


def test_explain_names_training_samples(run: Run, trained: Path) -> None:
    code, out, _ = run("explain", trained, "digits", "--index", "3", "--k", "4")
    assert code == 0
    assert re.search(r"digits sample 3: predicted \d, true class \d; certified L2 radius", out)
    weights = [float(w) for w in re.findall(r"^ *([\d.]+) %", out, flags=re.M)]
    assert 1 <= len(weights) <= 4
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) <= 100.1


@pytest.mark.parametrize("index", [-1, 60])
def test_explain_refuses_what_is_not_there(run: Run, trained: Path, index: int) -> None:
    assert "out of range" in one_line(*run("explain", trained, "digits", f"--index={index}", "-q"))


def test_a_table_keeps_its_scaling_and_columns(run: Run, table_run: Path, tmp_path: Path) -> None:
    # Other rows, no label, columns in another order: scaled and ordered as at training.
    write_text(tmp_path / "new.csv", table(40, label=None, seed=1))
    code, out, err = run("predict", table_run / "run", tmp_path / "new.csv")
    assert code == 0
    assert "correct" not in err
    predicted = [row["predicted"] for row in csv.DictReader(io.StringIO(out))]
    assert np.mean([p == "ab"[i % 2] for i, p in enumerate(predicted)]) >= 0.9
    columns = [line.split(",") for line in (tmp_path / "new.csv").read_text().splitlines()]
    write_text(tmp_path / "turned.csv", "\n".join(",".join(reversed(row)) for row in columns) + "\n")
    turned = run("predict", table_run / "run", tmp_path / "turned.csv")[1]
    assert turned == out
    assert "training standard deviations" in run("certify", table_run / "run", tmp_path / "new.csv")[2]


def test_other_columns_are_one_clear_line(run: Run, table_run: Path, trained: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "few.csv", table(10, columns=("width", "height")))
    assert "depth" in one_line(*run("predict", table_run / "run", tmp_path / "few.csv", "-q"))
    write_text(tmp_path / "other.csv", table(10, columns=("width", "height", "weight")))
    assert "depth" in one_line(*run("predict", table_run / "run", tmp_path / "other.csv", "-q"))
    assert "(3,)" in one_line(*run("predict", trained, tmp_path / "other.csv", "--label", "kind", "-q"))
    assert "shape" in one_line(*run("predict", table_run / "run", "digits", "-q"))
    assert "label" in one_line(*run("attack", table_run / "run", tmp_path / "few.csv", "--label", "nothing", "-q"))


def test_an_attack_needs_labels(run: Run, table_run: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "new.csv", table(10, label=None))
    assert "--label" in one_line(*run("attack", table_run / "run", tmp_path / "new.csv", "-q"))
    write_text(tmp_path / "strange.csv", table(10).replace(",b\n", ",c\n"))
    assert "no class c" in one_line(*run("attack", table_run / "run", tmp_path / "strange.csv", "-q"))


def test_no_model(run: Run, tmp_path: Path) -> None:
    assert "no such folder" in one_line(*run("predict", tmp_path / "nowhere", "digits"))
    assert "no otad model" in one_line(*run("predict", tmp_path, "digits"))


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"format": "another"}'])
def test_a_damaged_card(run: Run, trained: Path, tmp_path: Path, damage: str) -> None:
    copy(trained / "model", tmp_path / "model")
    write_text(tmp_path / "model" / "data.json", damage)
    one_line(*run("predict", tmp_path, "digits"))


def test_a_damaged_model(run: Run, trained: Path, tmp_path: Path) -> None:
    for victim in sorted((trained / "model").iterdir()):
        copy(trained / "model", tmp_path / victim.name / "model")
        damaged = tmp_path / victim.name / "model" / victim.name
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
        one_line(*run("predict", tmp_path / victim.name, "digits"))
        damaged.unlink()
        one_line(*run("predict", tmp_path / victim.name, "digits"))


def copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        main(["predict", str(tmp_path / "nowhere"), "digits", "--debug"])


def environment() -> dict[str, str]:
    source = str(Path(__file__).parents[1] / "src")
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(trained: Path) -> None:
    words = [*OTAD, "predict", str(trained), "digits", "--part", "all", "--quiet"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.slow
def test_interrupted_training_goes_on(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        *OTAD,
        "train",
        "digits",
        "--out",
        str(out),
        "--n-train",
        "300",
        "--n-test",
        "50",
        "--attacks",
        "none",
        "-q",
    ]
    words += ["--device", "cpu"]
    long = [*words, "--epochs", "200"]
    with subprocess.Popen(
        long,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=tmp_path,
        # A shell starts what runs in its background with this signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoint/*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait() == 130, err
    assert err.count("\n") == 1
    assert err.startswith("otad: interrupted; the last checkpoint is kept in")
    assert err.strip().endswith("--epochs 200 --resume")
    assert {p.name for p in out.iterdir()} == {"checkpoint"}, "nothing half-written"
    # The command it names finishes the work without training the first epochs again.
    again = shlex.split(err.partition("continue with: otad ")[2])
    assert run(*again, "--quiet")[0] == 0
    history = json.loads((out / "metrics.json").read_text())["extra"]["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 201))


def test_finished_attacks_outlive_an_interruption(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    words = ["train", "digits", "--out", tmp_path / "run", *TINY, "--attacks", "lines,noise", "--n-attack", "10"]
    words += ["--radii", "0.4"]
    with monkeypatch.context() as patch:
        patch.setitem(ATTACKS, "noise", Attack(interrupted))
        code, _, err = run(*words)
    assert code == 130
    assert "--resume" in err
    (kept,) = (tmp_path / "run" / "checkpoint" / "finished_attacks").glob("*.json")
    seconds = json.loads(kept.read_text())["seconds"]
    assert run(*words, "--resume")[0] == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["attack_cost"]["lines"]["seconds"] == seconds, "not run again"
    assert not kept.parent.exists()


@pytest.mark.slow
def test_an_attack_on_the_retrieval_leaves_out_models_that_retrieve_nothing(run: Run, tmp_path: Path) -> None:
    words = ["train", "digits", "--out", tmp_path / "run", *TINY, "--interpolation", "neighborhood", "--radii", "0.4"]
    assert run(*map(str, words), "--attacks", "retrieval", "--n-attack", "5")[0] == 0
    assert "retrieval" in json.loads((tmp_path / "run" / "metrics.json").read_text())["robust_accuracy"]["0.4"]
