"""The transport map in the plane, as a self-contained SVG text."""

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from otad.report.drawing import CLASS_COLORS, svg_text
from otad.report.pictures import TransportPicture

__all__ = ["plane", "transport_plane"]


def transport_plane(picture: TransportPicture, *, shown: int = 240) -> str:
    """Where the map takes the training points, in the plane of the two largest variances of x and z.

    Args:
        picture: the points.
        shown: how many of them are drawn, spread evenly over the classes.
    """
    rows = _spread(picture.y, shown)
    paths = picture.paths[rows] if picture.paths is not None else np.stack([picture.x[rows], picture.z[rows]], axis=1)
    flat, _ = plane(np.concatenate([picture.x, picture.z]), paths.reshape(-1, paths.shape[-1]))
    flat = flat.reshape(*paths.shape[:2], 2)
    y = picture.y[rows]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        many = len(picture.class_names) > len(CLASS_COLORS)
        # Named where the class ends, so that no reader must match colours with a legend.
        ends = {c: np.median(flat[y == c][:, -1], axis=0) for c in np.unique(y).tolist()}
        spots = _apart(ends, gap=0.065 * float(np.ptp(flat.reshape(-1, 2), axis=0).max()))
        for c, name in enumerate(picture.class_names):
            own, color = flat[y == c], CLASS_COLORS[c % len(CLASS_COLORS)]
            if not len(own):
                continue
            axes.add_collection(LineCollection(list(own), colors=color, linewidths=0.8, alpha=0.45))
            axes.scatter(*own[:, 0].T, s=7, facecolor="white", edgecolor=color, linewidth=0.8, zorder=2)
            axes.scatter(*own[:, -1].T, s=14, color=color, zorder=3, linewidth=0)
            if not many:
                spot = spots[c]
                box = {
                    "boxstyle": "round,pad=0.25",
                    "facecolor": "white",
                    "edgecolor": color,
                    "linewidth": 1.2,
                    "alpha": 0.92,
                }
                axes.annotate(
                    str(name),
                    tuple(spot),
                    color=color,
                    ha="center",
                    va="center",
                    fontweight="bold",
                    bbox=box,
                    zorder=4,
                )
        axes.autoscale_view()
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xlabel="first principal direction of x and z", ylabel="second")

    return svg_text(draw, 4.8, 4.5)


def plane(points: np.ndarray, shown: np.ndarray | None = None, *, fit_on: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """`shown` (m, d) in the two directions of largest variance of `points` (n, d).

    The directions are found on at most `fit_on` evenly picked rows.

    Returns:
        coordinates, shape (m, 2), and the directions, shape (d, 2); the second is zero where d is 1.
    """
    shown = points if shown is None else shown
    sample = points[np.linspace(0, len(points) - 1, min(fit_on, len(points))).astype(int)].astype(np.float64)
    center = sample.mean(axis=0)
    directions = np.zeros((points.shape[1], 2))
    found = np.linalg.svd(sample - center, full_matrices=False)[2][:2].T
    # A fixed sign, so that two runs give the same picture.
    found = found * np.sign(found[np.abs(found).argmax(axis=0), range(found.shape[1])])
    directions[:, : found.shape[1]] = found
    return (shown - center) @ directions, directions


def _spread(y: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows, the same number from every class where it has them."""
    classes = np.unique(y)
    each = max(1, count // max(1, len(classes)))
    return np.sort(np.concatenate([np.flatnonzero(y == c)[:each] for c in classes]))[:count]


def _apart(spots: dict[int, np.ndarray], *, gap: float, rounds: int = 50) -> dict[int, np.ndarray]:
    """The spots, those nearer than `gap` to each other pushed apart, so that no label covers another."""
    names, places = list(spots), np.array(list(spots.values()))
    for _ in range(rounds):
        away = places[:, None] - places[None]
        distance = np.linalg.norm(away, axis=2)
        # Two equal spots have no direction of their own: part them by their order.
        away[distance == 0] = (1e-9, 0.0)
        push = np.clip(gap - distance, 0.0, None) * (1 - np.eye(len(places)))
        places = places + 0.25 * (push[..., None] * away / np.maximum(distance, 1e-9)[..., None]).sum(axis=1)
    return dict(zip(names, places, strict=True))
