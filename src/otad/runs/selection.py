"""Labels as class indices, and the samples to attack."""

from collections.abc import Sequence

import numpy as np

from otad.attacks.sets import ATTACKS, SETS
from otad.errors import DataError

__all__ = ["attacked_rows", "check_attacks", "class_indices", "known_labels"]


def check_attacks(attacks: str | Sequence[str]) -> None:
    """Refuse names that no attack has.

    Raises:
        ValueError: with the names that there are.
    """
    names = [] if isinstance(attacks, str) and attacks in SETS else attacks
    unknown = [name for name in ([names] if isinstance(names, str) else names) if name not in ATTACKS]
    if unknown:
        raise ValueError(f"unknown attack {', '.join(unknown)}; sets: {', '.join(SETS)}; attacks: {', '.join(ATTACKS)}")


def attacked_rows(n: int, n_attack: int | None, seed: int) -> np.ndarray:
    """The samples to attack, in growing order: all, or `n_attack` of n drawn with the seed.

    Raises:
        DataError: n_attack is below 1.
    """
    if n_attack is not None and n_attack < 1:
        raise DataError(f"the number of samples to attack must be at least 1, not {n_attack}")
    if n_attack is None or n_attack >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, n_attack, replace=False))


def known_labels(classes: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Labels in the type of the model's classes.

    A file that holds only some classes may read as numbers where the training file read as text.
    """
    if classes.dtype.kind == y.dtype.kind:
        return y
    by_name = {str(label): label for label in classes.tolist()}
    return np.array([by_name.get(str(label), str(label)) for label in y.tolist()])


def class_indices(classes: np.ndarray, y: np.ndarray, name: str) -> np.ndarray:
    """Labels as positions in `classes`, int64.

    Args:
        classes: the labels a model knows.
        y: labels.
        name: where y comes from, for the message.

    Raises:
        DataError: a label that is not among them.
    """
    known = {value: i for i, value in enumerate(classes.tolist())}
    unknown = sorted({str(value) for value in y.tolist() if value not in known})
    if unknown:
        raise DataError(
            f"{name}: the model knows no class {', '.join(unknown[:5])}; "
            f"its classes are {', '.join(map(str, classes[:20]))}"
        )
    return np.array([known[value] for value in y.tolist()], dtype=np.int64)
