"""Divide samples by class, with a seed, so that every part keeps the shares of the classes."""

import numpy as np

from otad.data.parts import shown
from otad.errors import DataError

__all__ = ["held_out", "stratified_split", "stratified_subset"]


def stratified_split(y: np.ndarray, test_share: float, seed: int, where: str) -> np.ndarray:
    """Which samples to test on: a share of every class, at least one and never all of them.

    Args:
        y: labels, shape (n,).
        test_share: between 0 and 1.
        seed: of the random choice.
        where: the source, for messages.

    Returns:
        boolean array, shape (n,).

    Raises:
        DataError: test_share out of range, or a class with fewer than 2 samples.
    """
    if not 0 < test_share < 1:
        raise DataError(f"test_share must lie between 0 and 1 (both excluded), got {test_share:g}")
    classes, counts = np.unique(y, return_counts=True)
    single = classes[counts < 2]
    if len(single):
        raise DataError(
            f"{where}: {len(single)} class(es) with one sample only ({shown(single.tolist())}), "
            "and a class must be in both the training and the test part; add samples or drop the class"
        )
    chosen = _choose(y, _allot(counts, round(test_share * len(y)), np.ones_like(counts), counts - 1), seed)
    is_test = np.zeros(len(y), dtype=bool)
    is_test[chosen] = True
    return is_test


def stratified_subset(y: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Positions of n samples that keep the shares of the classes, shuffled; 1 <= n <= len(y).

    Every class keeps at least one sample where n allows it.
    """
    counts = np.unique(y, return_counts=True)[1]
    lower = np.minimum(counts, 1) if n >= len(counts) else np.zeros_like(counts)
    return _choose(y, _allot(counts, n, lower, counts), seed)


def _choose(y: np.ndarray, allotted: np.ndarray, seed: int) -> np.ndarray:
    """Positions of allotted[c] random samples of each class c, shuffled."""
    rng = np.random.default_rng(seed)
    # One random order, whatever is asked: a smaller choice with the same seed lies inside a larger one.
    order = rng.permutation(len(y))
    labels = np.unique(y, return_inverse=True)[1][order]
    rank = np.empty(len(y), dtype=np.int64)
    for label in range(len(allotted)):
        members = labels == label
        rank[members] = np.arange(members.sum())
    return order[rank < allotted[labels]]


def _allot(counts: np.ndarray, n: int, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Share n among classes in proportion to counts, between lower and upper, by largest remainder."""
    ideal = n * counts / counts.sum()
    allotted = np.clip(np.floor(ideal).astype(np.int64), lower, upper)
    n = int(np.clip(n, lower.sum(), upper.sum()))
    while allotted.sum() < n:
        allotted[np.argmax(np.where(allotted < upper, ideal - allotted, -np.inf))] += 1
    while allotted.sum() > n:
        allotted[np.argmin(np.where(allotted > lower, ideal - allotted, np.inf))] -= 1
    return allotted


def held_out(y: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A share of every class of at least two samples, to choose settings on.

    Args:
        y: class indices, shape (n,).
        share: between 0 and 1.
        seed: of the random choice.

    Returns:
        boolean array, shape (n,).
    """
    divisible = np.flatnonzero(np.bincount(y)[y] > 1)
    held = np.zeros(len(y), dtype=bool)
    held[divisible] = stratified_split(y[divisible], share, seed, "training samples")
    return held
