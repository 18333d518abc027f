"""The headline numbers as plain text."""

from otad.report.summary import Report
from otad.report.wording import number, percent, radius_words, sorted_radii

__all__ = ["headline_rows", "table"]


def table(report: Report) -> str:
    """Clean, certified and attacked accuracy of the model beside its rivals, then what to know about them."""
    models = [report, *report.rivals.values()]
    header = ["", *(f"{m.name} (AUDIT FAILED)" if m.audit_passed is False else m.name for m in models)]
    body = [[words, *(percent(share) for share in shares)] for words, shares in headline_rows(report)]
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )

    rule = "-" * len(line(header))
    lines = [
        _subject(report),
        "",
        line(header).rstrip(),
        rule,
        *(line(row) for row in body),
        rule,
        *_notes(report),
    ]
    return "\n".join(lines)


def headline_rows(report: Report) -> list[tuple[str, list[float | None]]]:
    """Rows of the headline table: words, then one share per model (the report first, then its rivals)."""
    models = [report, *report.rivals.values()]
    rows: list[tuple[str, list[float | None]]] = [("clean", [m.clean_accuracy for m in models])]
    rows.extend(
        (f"certified, {radius_words(key)}", [m.certified_accuracy.get(key) for m in models])
        for key in sorted_radii(k for m in models for k in m.certified_accuracy)
    )
    rows.extend(
        (f"attacked, {radius_words(key)}", [m.robust_accuracy.get(key, {}).get("worst_case") for m in models])
        for key in sorted_radii(k for m in models for k in m.robust_accuracy)
    )
    return rows


def _subject(report: Report) -> str:
    trained = f"{report.n_train} training, " if report.n_train is not None else ""
    units = report.extra.get("units")
    return f"{report.data}: {trained}{report.n_test} test samples, seed {report.seed}" + (
        f"; radii in {units}" if units else ""
    )


def _map_notes(report: Report) -> list[str]:
    """How near the map is to an optimal-transport map, and how exactly it is reproduced."""
    notes = []
    medians = {k: v.get("median") for k, v in report.extra.get("health", {}).items() if isinstance(v, dict)}
    if medians:
        notes.append("median smallest L: " + ", ".join(f"{number(v)} {k}" for k, v in medians.items()))
    fit = report.extra.get("training_fit")
    if fit:
        error = fit.get("feature_error")
        exact = "" if error is None else f"features reproduced to {number(error, 2)}, "
        notes.append(f"training set: {exact}{percent(fit.get('agreement'))} classified as the backbone does")
    left = report.extra.get("map_fit")
    if left:
        notes.append(
            f"interpolated map on the training set: features reproduced to {number(left.get('feature_error'), 2)}, "
            f"{percent(left.get('agreement'))} classified as the backbone does"
        )
    refined = report.extra.get("refinement")
    if refined:
        before, after = refined["before"], refined["after"]
        notes.append(
            f"training set, pieces before and after training for L2 {number(refined['target_radius'])}: accuracy "
            f"{percent(before['accuracy'])} and {percent(after['accuracy'])}, beyond it by training's estimate "
            f"{percent(before['certified'])} and {percent(after['certified'])}"
        )
    notes.extend(
        f"CIP-net beside the exact solution, {queries}: feature error {percent(figures.get('feature_error'))} "
        f"(95th percentile {percent(figures.get('feature_error_95'))}), same label "
        f"{percent(figures.get('label_agreement'))}"
        for queries, figures in report.extra.get("network", {}).items()
    )
    return notes


def _notes(report: Report) -> list[str]:
    notes = []
    attacked = report.extra.get("n_attacked")
    bounded = [model for model in (report, *report.rivals.values()) if model.extra.get("within")]
    if bounded:
        names = ", ".join(model.name for model in bounded)
        notes.append(f"certified, {names}: for {bounded[0].extra['within']}; attacks keep to them too")
    if report.robust_accuracy:
        which = f"{attacked} of these test samples" if attacked and attacked < report.n_test else "all test samples"
        names = sorted({a for by in report.robust_accuracy.values() for a in by} - {"worst_case"})
        notes.append(f"attacked: worst case per sample over {', '.join(names) or 'no attack'}, on {which}")
    subset = report.extra.get("attacked_subset")
    if subset:
        shares = ", ".join(f"{percent(v)} at {k}" for k, v in subset.get("certified_accuracy", {}).items())
        notes.append(
            f"on those: clean {percent(subset.get('clean_accuracy'))}" + (f", certified {shares}" if shares else "")
        )
    facts = [
        f"{words} {number(value)}"
        for words, value in (("smoothness L", report.smoothness), ("Lipschitz constant", report.lipschitz))
        if value is not None
    ]
    if facts:
        notes.append(f"{report.name}: " + ", ".join(facts))
    notes.extend(_map_notes(report))
    failed = [name for name, check in report.audit.items() if check.passed is False]
    passed = sum(check.passed is True for check in report.audit.values())
    if report.audit:
        notes.append(
            f"audit: {passed} checks passed" + (f", FAILED: {', '.join(failed)}" if failed else ", none failed")
        )
    if failed:
        notes.append(
            "the attacked numbers of this model are no claim: what failed may make it look more robust than it is"
        )
    return notes + [f"CONTRADICTION: {line}" for line in report.contradictions()]
