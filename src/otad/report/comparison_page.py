"""Comparisons -> one HTML page that loads nothing from elsewhere."""

from collections.abc import Mapping, Sequence

from otad.report import template
from otad.report.comparison import Comparison
from otad.report.comparison_table import grids, notes, subject

__all__ = ["comparison_page"]


def comparison_page(comparisons: Sequence[Comparison], plots: Mapping[str, str], version: str) -> str:
    """Tables, notes and plot of every data set.

    Args:
        comparisons: one a data set.
        plots: data set -> SVG text of its plot.
        version: of otad, for the foot of the page.
    """
    parts = [
        {
            "name": one.data,
            "subject": subject(one),
            "grids": grids(one),
            "notes": notes(one),
            "plot": template.uri(plots[one.data]),
        }
        for one in comparisons
    ]
    return template.render("comparison.html.j2", parts=parts, version=version)
