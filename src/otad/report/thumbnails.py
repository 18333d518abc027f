"""Test samples as small pictures or short texts."""

import base64
import io

import matplotlib.image
import numpy as np

__all__ = ["change_uri", "image_uri", "is_image", "largest_changes", "largest_features", "svg_uri"]


def is_image(sample: np.ndarray) -> bool:
    """Whether a sample is drawn as a picture: (c, h, w) with one or three channels."""
    return sample.ndim == 3 and sample.shape[0] in (1, 3)


def image_uri(sample: np.ndarray) -> str:
    """A (c, h, w) image with values in [0, 1] as a PNG data URI."""
    return _png_uri(_channels_last(np.clip(sample, 0.0, 1.0)))


def change_uri(sample: np.ndarray, changed: np.ndarray) -> str:
    """Where `changed` is darker (blue) or brighter (orange) than `sample`, white where it is the same."""
    change = (changed.astype(np.float64) - sample).mean(axis=0)
    change = change / max(float(np.abs(change).max()), 1e-12)
    orange, blue = np.array([0.84, 0.37, 0.0]), np.array([0.0, 0.32, 0.62])
    strength = np.abs(change)[..., None]
    return _png_uri((1 - strength) + strength * np.where(change[..., None] > 0, orange, blue))


def svg_uri(svg: str) -> str:
    """An SVG text as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def largest_changes(
    sample: np.ndarray, changed: np.ndarray, names: tuple[str, ...] = (), *, count: int = 4
) -> list[tuple[str, float, float]]:
    """(feature, before, after) for the features that changed most."""
    flat, other = sample.reshape(-1), changed.reshape(-1)
    rows = np.argsort(-np.abs(other - flat), kind="stable")[:count].tolist()
    return [(_name(names, i), float(flat[i]), float(other[i])) for i in rows if flat[i] != other[i]]


def largest_features(sample: np.ndarray, names: tuple[str, ...] = (), *, count: int = 4) -> list[tuple[str, float]]:
    """(feature, value) for the features farthest from zero, the mean of a standardised column."""
    flat = sample.reshape(-1)
    return [(_name(names, i), float(flat[i])) for i in np.argsort(-np.abs(flat), kind="stable")[:count].tolist()]


def _name(names: tuple[str, ...], i: int) -> str:
    return names[i] if i < len(names) else f"feature {i}"


def _channels_last(sample: np.ndarray) -> np.ndarray:
    """(c, h, w) -> (h, w, 3)."""
    return np.repeat(sample, 3 // sample.shape[0], axis=0).transpose(1, 2, 0)


def _png_uri(pixels: np.ndarray) -> str:
    """(h, w, 3) in [0, 1] as a PNG data URI, one pixel per value: the page enlarges it without blurring."""
    out = io.BytesIO()
    matplotlib.image.imsave(out, np.ascontiguousarray((255 * pixels).round().astype(np.uint8)), format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
