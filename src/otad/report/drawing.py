"""The look that all plots share, and their SVG text."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["CLASS_COLORS", "MARKERS", "MODEL_COLORS", "svg_text"]

# Okabe and Ito's palette, which colour-blind readers can tell apart, darkened for contrast on white.
MODEL_COLORS = ("#0072b2", "#c04a00", "#007a5a", "#a03c78", "#6b6b00", "#3a3a3a", "#7a5195", "#8c564b")
CLASS_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#a8467e",
    "#a67c00",
    "#2f9fd8",
    "#3a3a3a",
    "#7a5195",
    "#8c564b",
    "#5c8a00",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, FAINT = "#1c2430", "#d9dee5"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": "#8a94a3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "otad",
}


def svg_text(draw: Callable[[Figure], None], width: float, height: float) -> str:
    """The SVG text of a figure of `width` times `height` inches that `draw` fills."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.BytesIO()
        # No date: the same numbers give the same bytes.
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": "otad"})
    return out.getvalue().decode()
