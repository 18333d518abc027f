import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otad.data.splits import stratified_split, stratified_subset
from otad.errors import DataError

COUNTS = st.lists(st.integers(2, 40), min_size=2, max_size=8)


def labels(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


@given(COUNTS, st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_split_has_every_class_on_both_sides(counts: list[int], share: float, seed: int) -> None:
    y = labels(counts)
    is_test = stratified_split(y, share, seed, "here")
    tested = np.bincount(y[is_test], minlength=len(counts))
    assert (tested >= 1).all()
    assert (tested < counts).all()
    # No class is off its share by more than one sample, unless the two rules above ask for it.
    off = np.abs(tested - share * np.array(counts))
    assert ((off <= 1 + 0.5 * len(counts)) | (tested == 1) | (tested == np.array(counts) - 1)).all()


def test_split_sizes_are_exact_where_classes_divide_evenly() -> None:
    y = labels([500] * 10)
    is_test = stratified_split(y, 0.2, 0, "here")
    assert np.bincount(y[is_test]).tolist() == [100] * 10


@given(COUNTS, st.data())
def test_subset_has_the_asked_size_and_keeps_shares(counts: list[int], data: st.DataObject) -> None:
    y = labels(counts)
    n = data.draw(st.integers(1, len(y)))
    seed = data.draw(st.integers(0, 2**31))
    chosen = stratified_subset(y, n, seed)
    assert len(chosen) == len(set(chosen.tolist())) == n
    if n >= len(counts):
        assert set(y[chosen]) == set(y)


def test_same_seed_same_choice_and_smaller_inside_larger() -> None:
    y = labels([30, 50, 20])
    assert (stratified_subset(y, 40, 3) == stratified_subset(y, 40, 3)).all()
    assert (stratified_subset(y, 40, 3) != stratified_subset(y, 40, 4)).any()
    assert set(stratified_subset(y, 20, 3)) <= set(stratified_subset(y, 40, 3))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_share_out_of_range(share: float) -> None:
    with pytest.raises(DataError, match="test_share must lie between 0 and 1"):
        stratified_split(labels([4, 4]), share, 0, "here")


def test_class_with_one_sample() -> None:
    with pytest.raises(DataError, match=r"one sample only .'2'"):
        stratified_split(labels([4, 4, 1]), 0.5, 0, "here")
