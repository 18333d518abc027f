"""Accuracy against radius of all methods on one data set."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from otad.report.comparison import Comparison, Row
from otad.report.drawing import MARKERS, MODEL_COLORS, svg_text

__all__ = ["comparison_plot"]


def comparison_plot(comparison: Comparison, order: tuple[str, ...]) -> str:
    """SVG text: worst case solid, certified dashed (randomised: dotted), both over the attacked samples.

    Args:
        comparison: the numbers; with several seeds, their means.
        order: names of methods; the place in it gives a method its colour in the plots of all data sets.
    """
    radii = [float(radius) for radius in comparison.radii]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row in comparison.rows:
            place = order.index(row.method) if row.method in order else len(order)
            _draw_row(axes, row, comparison.radii, place)
        axes.set(
            title=comparison.data,
            xlim=(0, 1.06 * max(radii)),
            ylim=(0, 1.02),
            xlabel=f"L2 radius ({comparison.units})",
            ylabel="test samples correct",
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2, fontsize=8.5, handlelength=2.6, columnspacing=1.2
        )

    return svg_text(draw, 4.8, 3.9 + 0.16 * len(comparison.rows))


def _draw_row(axes: Axes, row: Row, radii: tuple[str, ...], place: int) -> None:
    color, marker = MODEL_COLORS[place % len(MODEL_COLORS)], MARKERS[place % len(MARKERS)]
    at = [0.0, *map(float, radii)]
    clean = float(np.mean(row.clean))
    worst = [clean, *(float(np.mean(row.worst_case[r])) for r in radii)]
    width = 2.2 if row.method.startswith("otad") else 1.4
    axes.plot(
        at, worst, "-", color=color, marker=marker, markersize=5, linewidth=width, label=f"{row.method}, worst case",
        zorder=4,
    )  # fmt: skip
    if row.certified:
        shares = [float(np.mean(row.certified[r])) for r in radii]
        axes.plot(
            at[1:], shares, ":" if row.randomised else "--", color=color, marker=marker, markersize=5,
            markerfacecolor="white", linewidth=width, label=f"{row.method}, certified", zorder=3,
        )  # fmt: skip
