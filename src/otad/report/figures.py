"""The page's plots, each a self-contained SVG text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from otad.report.drawing import MARKERS, MODEL_COLORS, svg_text
from otad.report.summary import Report
from otad.report.wording import radius_of, sorted_radii, split_key

__all__ = ["accuracy_against_radius", "training_curves"]


def accuracy_against_radius(report: Report, norm: str = "l2") -> str | None:
    """Clean, certified and attacked accuracy of the report and its rivals against the radius.

    Solid lines are certified shares, from every sample's own radius where known; dashed lines join the
    measured worst cases. None where there is nothing to draw.
    """
    models = [report, *report.rivals.values()]
    if not any(_attacked(m, norm)[0].size or (norm == "l2" and m.certified_accuracy) for m in models):
        return None
    end = max([r for m in models for r in [*_attacked(m, norm)[0], *_certified_keys(m, norm)]], default=1.0) * 1.12

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, model in enumerate(models):
            _draw_model(axes, model, norm, end, color=MODEL_COLORS[i % 6], marker=MARKERS[i % 6], first=i == 0)
        axes.set(
            xlim=(0, end),
            ylim=(0, 1.02),
            xlabel=f"{'L2' if norm == 'l2' else 'L∞'} radius",
            ylabel="test samples correct",
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        handles, labels = axes.get_legend_handles_labels()
        # Below the plot, where it covers no curve and survives a narrow screen.
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=2,
            fontsize=8.5,
            handlelength=2.6,
            columnspacing=1.2,
        )

    return svg_text(draw, 4.8, 3.9 + 0.16 * len(models))


def training_curves(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss, transport cost and training accuracy per epoch; None where there is no history."""
    shown = [(key, words) for key, words in _CURVES if sum(_finite(row.get(key)) for row in history) > 0]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        for i, (key, words) in enumerate(shown):
            axes = figure.add_subplot(len(shown), 1, i + 1)
            points = [(row.get("epoch", n + 1), row[key]) for n, row in enumerate(history) if _finite(row.get(key))]
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, color=MODEL_COLORS[i], linewidth=1.8, marker="o" if len(points) < 4 else None)
            axes.set_title(words)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.margins(x=0.02)
            if key == "accuracy":
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            elif min(values) > 0 and max(values) > 30 * min(values):
                axes.set_yscale("log")
            axes.annotate(
                f"{100 * values[-1]:.1f} %" if key == "accuracy" else f"{values[-1]:.3g}",
                (epochs[-1], values[-1]),
                xytext=(0, 5),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
                fontweight="bold",
            )
            if i + 1 == len(shown):
                axes.set_xlabel("epoch")

    return svg_text(draw, 4.8, 0.5 + 1.35 * len(shown))


_CURVES = (("loss", "loss"), ("transport_cost", "transport cost"), ("accuracy", "training accuracy"))


def _draw_model(axes: Axes, model: Report, norm: str, end: float, *, color: str, marker: str, first: bool) -> None:
    curve = _certified_curve(model, norm, end)
    radii, shares = _attacked(model, norm)
    width = 2.2 if first else 1.4
    if curve is not None:
        axes.step(*curve, where="post", color=color, linewidth=width, label=f"{model.name}, certified", zorder=3)
        keys = _certified_keys(model, norm)
        axes.plot(
            keys,
            [model.certified_accuracy[k] for k in sorted_radii(model.certified_accuracy)],
            marker,
            color=color,
            markersize=4,
            zorder=4,
        )
    if radii.size:
        clean = (model.extra.get("attacked_subset") or {}).get("clean_accuracy", model.clean_accuracy)
        line = (np.concatenate([[0.0], radii]), np.concatenate([[clean], shares]))
        axes.plot(*line, "--", color=color, linewidth=width, label=f"{model.name}, attacked", zorder=3)
        axes.plot(
            radii,
            shares,
            marker,
            markerfacecolor="white",
            markeredgecolor=color,
            markeredgewidth=1.5,
            markersize=6,
            zorder=5,
        )
    axes.plot([0], [model.clean_accuracy], marker, color=color, markersize=7, clip_on=False, zorder=6)


def _certified_keys(model: Report, norm: str) -> list[float]:
    return [radius_of(key) for key in sorted_radii(model.certified_accuracy)] if norm == "l2" else []


def _certified_curve(model: Report, norm: str, end: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Radii and certified shares: every sample's radius where known, else the few radii of the report."""
    if norm != "l2" or not model.certified_accuracy:
        return None
    examples = model.examples
    if examples is not None and examples.certified_radius is not None and len(examples.y) == model.n_test:
        radii = np.linspace(0.0, end, 401)
        own = np.where(examples.predicted == examples.y, examples.certified_radius, -1.0)
        return radii, (own[None, :] >= radii[:, None]).mean(axis=1)
    keys = sorted_radii(model.certified_accuracy)
    return np.array([0.0, *map(radius_of, keys)]), np.array(
        [model.clean_accuracy, *(model.certified_accuracy[k] for k in keys)]
    )


def _attacked(model: Report, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Radii and worst-case shares under one norm."""
    keys = [
        k
        for k in sorted_radii(model.robust_accuracy)
        if split_key(k)[0] == norm and "worst_case" in model.robust_accuracy[k]
    ]
    return np.array([radius_of(k) for k in keys]), np.array([model.robust_accuracy[k]["worst_case"] for k in keys])


def _finite(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))
