"""Labels and samples that a job selects."""

import numpy as np
import pytest

from otad.errors import DataError
from otad.runs.selection import attacked_rows, class_indices, known_labels


def test_labels_that_read_as_numbers_find_their_classes_in_text() -> None:
    classes = np.array(["1", "2", "none"])
    found = known_labels(classes, np.array([2, 1, 2]))
    assert class_indices(classes, found, "file").tolist() == [1, 0, 1]


def test_labels_that_read_as_text_find_their_classes_in_numbers() -> None:
    classes = np.array([3, 5])
    found = known_labels(classes, np.array(["5", "3"]))
    assert class_indices(classes, found, "file").tolist() == [1, 0]


def test_a_label_the_model_does_not_know_is_named() -> None:
    classes = np.array(["a", "b"])
    with pytest.raises(DataError, match="knows no class 7"):
        class_indices(classes, known_labels(classes, np.array([7])), "file")


def test_rows_to_attack_are_distinct_and_in_order() -> None:
    rows = attacked_rows(50, 20, seed=3)
    assert len(np.unique(rows)) == 20
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() == attacked_rows(50, 20, seed=3).tolist()
    assert attacked_rows(5, 20, seed=0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError):
        attacked_rows(5, 0, seed=0)
