"""Report -> one HTML page that loads nothing from elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

from otad.report import figures, template, thumbnails
from otad.report.pictures import GallerySample, TransportPicture
from otad.report.planes import transport_plane
from otad.report.summary import Report
from otad.report.template import radius, uri
from otad.report.terminal import headline_rows
from otad.report.wording import number, percent, radius_words, sorted_radii

__all__ = ["page"]


def page(
    report: Report,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    transport: TransportPicture | None = None,
    gallery: Sequence[GallerySample] = (),
    gallery_note: str = "",
    reproduce: Sequence[str] = (),
) -> str:
    """The page of a report; see `Report.to_html` for the arguments."""
    names = tuple(report.extra.get("feature_names", ()))
    models = [report, *report.rivals.values()]
    return template.render(
        "page.html.j2",
        report=report,
        models=models,
        units=report.extra.get("units", "units of the model's input"),
        tiles=_tiles(report),
        rows=headline_rows(report),
        contradictions=report.contradictions(),
        failed=[name for name, check in report.audit.items() if check.passed is False],
        curves={norm: uri(figures.accuracy_against_radius(report, norm)) for norm in ("l2", "linf")},
        training=uri(figures.training_curves(history)),
        n_epochs=len(history),
        transport=uri(transport_plane(transport)) if transport is not None and len(transport.x) else None,
        n_transport=len(transport.x) if transport is not None else 0,
        cards=[_card(sample, names) for sample in gallery],
        gallery_note=gallery_note,
        health=_health(report.extra.get("health", {})),
        fit=report.extra.get("training_fit", {}),
        refinement=report.extra.get("refinement"),
        network=report.extra.get("network", {}),
        attacks=[_attack_table(model) for model in models if model.robust_accuracy],
        attacked=_attacked_words(report),
        notes=_notes(models),
        rival_audits=[_audit_words(model) for model in report.rivals.values() if model.audit],
        n_attacked=report.extra.get("n_attacked") or report.n_test,
        facts=_facts(report),
        reproduce=reproduce,
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(figure, name, meaning) of the numbers to see first."""
    tiles = [(percent(report.clean_accuracy), "clean accuracy", f"{report.n_test} unchanged test samples")]
    for key in sorted_radii(report.certified_accuracy)[:2]:
        share = percent(report.certified_accuracy[key])
        tiles.append((share, f"certified at {radius(key)}", "proved: no attack can do worse"))
    for key in sorted_radii(report.robust_accuracy)[:2]:
        share = report.robust_accuracy[key].get("worst_case")
        tiles.append((percent(share), f"attacked at {radius(key)}", "measured: worst case over all attacks"))
    if report.lipschitz is not None:
        tiles.append((number(report.lipschitz), "Lipschitz constant", "of the interpolated feature map"))
    return tiles


def _attacked_words(report: Report) -> str:
    """On which samples the attacks ran, and what holds on these."""
    attacked, subset = report.extra.get("n_attacked"), report.extra.get("attacked_subset")
    if not attacked or attacked >= report.n_test:
        return f"All {report.n_test} test samples were attacked."
    words = f"{attacked} of {report.n_test} test samples were attacked."
    if subset:
        shares = ", ".join(
            f"{percent(v)} certified at {radius_words(k)}" for k, v in subset.get("certified_accuracy", {}).items()
        )
        words += f" On these, {report.name} has {percent(subset.get('clean_accuracy'))} clean" + (
            f", {shares}." if shares else "."
        )
    return words


def _card(sample: GallerySample, names: tuple[str, ...]) -> dict[str, Any]:
    """One gallery card in the template's words."""
    image = thumbnails.is_image(sample.sample)
    found = sample.adversarial
    card: dict[str, Any] = {
        "sample": sample,
        "image": image,
        "right": sample.label == sample.predicted,
        "found": found is not None,
    }
    if image:
        card["pictures"] = [(thumbnails.image_uri(sample.sample), f"test {sample.index}")]
        if found is not None:
            card["pictures"] += [
                (thumbnails.image_uri(found), "attacked"),
                (thumbnails.change_uri(sample.sample, found), "what changed"),
            ]
    else:
        card["features"] = thumbnails.largest_features(sample.sample, names)
        card["changes"] = [] if found is None else thumbnails.largest_changes(sample.sample, found, names)
    card["explanation"] = [
        {
            "index": c.index,
            "label": c.label,
            "weight": c.weight,
            "uri": thumbnails.image_uri(c.sample) if image and thumbnails.is_image(c.sample) else None,
            "features": [] if image else thumbnails.largest_features(c.sample, names, count=3),
        }
        for c in sample.explanation
    ]
    return card


def _attack_table(model: Report) -> dict[str, Any]:
    """Accuracy under every attack at every radius, and what the attack cost."""
    radii = sorted_radii(model.robust_accuracy)
    names = list(dict.fromkeys(a for key in radii for a in model.robust_accuracy[key] if a != "worst_case"))
    rows = []
    for name in [*names, "worst_case"]:
        cost = model.attack_cost.get(name, {})
        shares = [percent(model.robust_accuracy[key].get(name)) for key in radii]
        rows.append((name.replace("_", " "), shares, number(cost.get("seconds")), number(cost.get("queries"))))
    return {"name": model.name, "radii": radii, "rows": rows}


def _notes(models: Sequence[Report]) -> list[str]:
    """What the evaluation wants said about its attacks."""
    notes = dict.fromkeys(
        f"{attack.replace('_', ' ')}: {words}."
        for model in models
        for kind in ("attack_notes", "attacks_left_out")
        for attack, words in model.extra.get(kind, {}).items()
    )
    return list(notes)


def _audit_words(model: Report) -> str:
    """The outcome of a rival's audit in one sentence."""
    failed = [name.replace("_", " ") for name, check in model.audit.items() if check.passed is False]
    passed = sum(check.passed is True for check in model.audit.values())
    words = f"The same audit of {model.name}: {passed} checks passed"
    return f"{words}, failed: {', '.join(failed)}." if failed else f"{words}, none failed."


def _health(health: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"with": {fact: value}, "without": {...}} as a table; a flat mapping is one column.

    What was looked at is the same in every column and goes into a sentence.
    """
    if not health:
        return None
    columns = health if all(isinstance(v, Mapping) for v in health.values()) else {"value": health}
    first = next(iter(columns.values()))
    words = {"neighborhoods": "{} neighbourhoods", "k": "of {} points", "ratio": "l/L = {}"}
    facts = list(dict.fromkeys(fact for column in columns.values() for fact in column if fact not in words))
    return {
        "names": list(columns),
        "rows": [(_FACTS.get(f, f.replace("_", " ")), [_words(c.get(f)) for c in columns.values()]) for f in facts],
        "note": " ".join(text.format(number(first[fact])) for fact, text in words.items() if fact in first),
    }


_FACTS = {
    "quartile_1": "lower quartile",
    "quartile_3": "upper quartile",
    "maximum": "largest",
    "feasible": "share with a finite L",
}


def _facts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled lists for the end of the page: seconds, settings, versions."""
    seconds = [(stage.replace("_", " "), f"{number(s)} s") for stage, s in report.seconds.items()]
    settings = [(k.replace("_", " "), _words(v)) for k, v in report.extra.get("settings", {}).items()]
    versions = list(report.versions.items())
    named = [
        ("Seconds", seconds),
        ("Settings", [*settings, ("seed", str(report.seed))]),
        ("Versions", versions),
    ]
    return [(title, rows) for title, rows in named if rows]


def _words(value: Any) -> str:
    """A value of `extra` as text."""
    if isinstance(value, list | tuple):
        return ", ".join(_words(v) for v in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_words(v)}" for k, v in value.items())
    return number(value)
