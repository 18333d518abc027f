"""Reports: JSON that others rely on, a page that needs nothing else, a table for the terminal."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from otad.report import Contribution, GallerySample, Report, TransportPicture
from otad.report.planes import plane
from otad.report.wording import number, percent, radius_key, radius_words, sorted_radii
from otad.results import AuditCheck, ExampleResults

CONTRACT = {
    *("data", "n_train", "n_test", "seed", "seconds", "versions"),
    *("clean_accuracy", "certified_accuracy", "robust_accuracy", "audit", "smoothness", "lipschitz"),
}


class Page(HTMLParser):
    """Collects what a page would load, which tags stay open, and its text."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [v for k in ("src", "srcset", "data", "poster") if (v := values.get(k))]
        if tag == "link" and (href := values.get("href")):
            self.loads.append(href)
        elif href := values.get("href"):
            self.links.append(href)
        if name := values.get("id"):
            self.ids.append(name)
        if tag == "img":
            self.images.append(values)
        assert tag not in ("script", "iframe", "object", "embed", "base")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def report() -> Report:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 4)
    predicted = y.copy()
    predicted[0] = 1
    examples = ExampleResults(
        y=y,
        predicted=predicted,
        certified_radius=rng.uniform(0, 2, 12),
        adversarial={"0.5": rng.uniform(size=(12, 1, 4, 4)).astype(np.float32)},
        survived={"0.5": {"lines": predicted == y}},
    )
    rival = Report("1-NN", "toy", 30, 12, 0, 0.9, {"0.5": 0.7}, {"0.5": {"lines": 0.8, "worst_case": 0.75}})
    return Report(
        name="OTAD",
        data="toy & <others>",
        n_train=30,
        n_test=12,
        seed=3,
        clean_accuracy=11 / 12,
        certified_accuracy={"0.5": 0.75},
        robust_accuracy={
            "0.5": {"lines": 0.9, "worst_case": 0.8},
            "linf:0.03": {"lines": 0.85, "worst_case": 0.85},
        },
        audit={
            "finite_differences": AuditCheck(True, 1e-7, "Gradients agree."),
            "zero_gradients": AuditCheck(None, "none", "For information."),
            "never_rises": AuditCheck(False, 0.1, "Accuracy rose with the budget."),
        },
        smoothness=1.5,
        lipschitz=1.5,
        seconds={"train": 1.0},
        versions={"otad": "0.1.0"},
        attack_cost={"lines": {"seconds": 0.5, "queries": 60.0}},
        extra={"units": "pixel values in [0, 1]", "health": {"median": 1.04}, "settings": {"alpha": 1e-3}},
        rivals={"1-NN": rival},
        examples=examples,
    )


@pytest.fixture
def pictures() -> dict[str, object]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 5))
    images = rng.uniform(size=(3, 1, 4, 4)).astype(np.float32)
    why = (Contribution(4, "1", 0.7, images[2]), Contribution(9, "2", 0.3, images[1]))
    return {
        "history": [
            {"epoch": e, "loss": 1.0 / e, "transport_cost": 0.1 * e, "accuracy": 0.9, "seconds": float(e)}
            for e in (1, 2, 3)
        ],
        "transport": TransportPicture(x, x + 1, np.repeat([0, 1, 2], 10), ["a", "b", "c"]),
        "gallery": [
            GallerySample(0, images[0], "0", "0", 0.4, "0.5", images[1], "0.5", 0.49, "1", why),
            GallerySample(1, images[1], "0", "1", 0.0, "0.5", explanation=why),
        ],
        "reproduce": ["otad demo --out runs/demo"],
    }


def test_json_has_the_keys_others_rely_on(report: Report) -> None:
    found = json.loads(report.to_json())
    assert set(found) >= CONTRACT
    assert found["robust_accuracy"]["0.5"]["worst_case"] == 0.8
    assert found["audit"]["finite_differences"] == {
        "passed": True,
        "value": 1e-7,
        "meaning": "Gradients agree.",
    }
    assert found["rivals"]["1-NN"]["certified_accuracy"] == {"0.5": 0.7}
    assert "examples" not in found
    assert found["clean_accuracy"] == 11 / 12, "not rounded"


def test_json_is_strict(report: Report) -> None:
    odd = replace(
        report,
        smoothness=float("nan"),
        lipschitz=float("inf"),
        extra={
            "health": {"median": np.float32(math.inf)},
            "radii": np.array([0.5]),
            "n": np.int64(3),
            "t": (1, 2),
        },
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(odd.to_json(), parse_constant=refuse)
    assert found["smoothness"] is None
    assert found["lipschitz"] is None
    assert found["extra"] == {"health": {"median": None}, "radii": [0.5], "n": 3, "t": [1, 2]}


def test_json_refuses_what_it_cannot_hold(report: Report) -> None:
    with pytest.raises(TypeError, match="JSON cannot hold object"):
        replace(report, extra={"x": object()}).to_json()


def test_a_report_can_be_read_back(report: Report) -> None:
    assert Report.from_json(report.to_json()) == replace(report, examples=None)


@pytest.mark.parametrize("text", ["{}", "[]", '{"name": "x"}', "not JSON"])
def test_other_json_is_no_report(text: str) -> None:
    with pytest.raises(ValueError):
        Report.from_json(text)


def test_the_page_is_complete_in_itself(report: Report, pictures: dict) -> None:
    page = Page(report.to_html(**pictures))
    assert page.open == []
    assert page.loads, "figures are embedded"
    assert all(address.startswith("data:") for address in page.loads)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(image.get("alt") for image in page.images)
    style = re.findall(r"<style>(.*?)</style>", report.to_html(**pictures), flags=re.S)[0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_says_what_was_found(report: Report, pictures: dict) -> None:
    page = Page(report.to_html(**pictures))
    for words in (
        "91.7 %",
        "75.0 %",
        "1-NN",
        "never rises",
        "otad demo --out runs/demo",
        "toy & <others>",
        "n = 12",
    ):
        assert words in page.text, words
    assert "Audit failed" in page.text
    assert not re.search(r"\b(nan|None|NaN|inf)\b", page.text)


def test_the_page_needs_no_pictures(report: Report) -> None:
    bare = Report("model", "", None, 1, 0, 1.0)
    for html in (report.to_html(), bare.to_html()):
        assert Page(html).open == []


def test_the_page_shows_tables(report: Report) -> None:
    sample = np.array([0.1, -2.0, 0.0], dtype=np.float32)
    changed = np.array([0.1, -1.0, 0.5], dtype=np.float32)
    why = (Contribution(4, "bump", 1.0, changed),)
    shown = GallerySample(0, sample, "bump", "bump", 0.4, "0.5", changed, "0.5", 1.1, "stain", why)
    named = replace(report, extra={"feature_names": ["width", "height", "depth"]})
    text = Page(named.to_html(gallery=[shown])).text
    assert "height: -2 → -1" in text
    assert "100.0 % training sample 4, class bump" in text


def test_the_same_report_gives_the_same_page(report: Report, pictures: dict) -> None:
    assert report.to_html(**pictures) == report.to_html(**pictures)


def test_the_terminal_table(report: Report) -> None:
    table = report.table()
    assert re.search(r"certified, L2 0\.5 +75\.0 % +70\.0 %", table)
    assert re.search(r"attacked, L∞ 0\.03 +85\.0 % +–", table)
    assert "FAILED: never_rises" in table
    widths = {len(line) for line in table.splitlines() if "%" in line and line.startswith(("c", "attacked, L"))}
    assert len(widths) == 1, "columns line up"


def test_a_refined_model_is_told_before_and_after(report: Report, pictures: dict) -> None:
    facts = {"accuracy": 0.25, "certified": 0.125}, {"accuracy": 0.96, "certified": 0.81}
    extra = {
        "training_fit": {"agreement": 0.93, "train_accuracy": 0.96, "backbone_train_accuracy": 0.95},
        "refinement": {"target_radius": 0.5, "before": facts[0], "after": facts[1], "history": []},
    }
    refined = replace(report, extra=report.extra | extra)
    table, text = refined.table(), Page(refined.to_html(**pictures)).text
    for words in (table, text):
        assert "features reproduced" not in words
        assert "largest error of a training feature" not in words
        for share in ("25.0 %", "12.5 %", "96.0 %", "81.0 %", "93.0 %"):
            assert share in words
    assert "before and after training for L2 0.5" in table
    assert "Before and after training the pieces" in text
    assert "after training" not in report.table() + Page(report.to_html(**pictures)).text


def test_a_certificate_above_the_attack_is_called_a_contradiction(report: Report) -> None:
    assert report.contradictions() == []
    wrong = replace(report, certified_accuracy={"0.5": 0.85})
    assert "certified 85.0 % at L2 0.5" in wrong.contradictions()[0]
    assert "Contradiction" in Page(wrong.to_html()).text
    assert "CONTRADICTION" in wrong.table()
    # Where only a part was attacked, that part's own certified share counts.
    subset = {"clean_accuracy": 1.0, "certified_accuracy": {"0.5": 0.8}}
    assert replace(wrong, extra={"attacked_subset": subset}).contradictions() == []


def test_the_plane_keeps_the_largest_variances() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 4)) * np.array([5.0, 0.1, 3.0, 0.2])
    flat, directions = plane(points)
    np.testing.assert_allclose(np.abs(directions[[0, 2], [0, 1]]), 1, atol=1e-2)
    np.testing.assert_allclose(flat.var(axis=0), points.var(axis=0)[[0, 2]], rtol=1e-2)
    line, _ = plane(points[:, :1])
    assert line.shape == (500, 2)
    assert not line[:, 1].any()


def test_words_for_numbers() -> None:
    assert percent(0.9481) == "94.8 %"
    assert percent(None) == percent(float("nan")) == "–"
    values = (0.0, 1.0, 12.3456, 1e-7, 123456.0, float("inf"), None, True, "x", 20_000)
    words = ["0", "1", "12.3", "1.00e-07", "1.23e+05", "∞", "–", "yes", "x", "20,000"]
    assert [number(value) for value in values] == words
    assert radius_key("l2", 1.0) == "1"
    assert radius_key("linf", 0.03) == "linf:0.03"
    assert radius_words("linf:0.03") == "L∞ 0.03"
    assert sorted_radii(["linf:0.03", "10", "2", "0.5", "2"]) == ["0.5", "2", "10", "linf:0.03"]
