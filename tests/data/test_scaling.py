import json
import logging

import numpy as np
import pytest

from otad.data import Scaling
from otad.errors import DataError

X = np.array([[1.0, 5.0, 1e9], [3.0, 5.0, 1e9 + 1], [5.0, 5.0, 1e9 + 2]])


def test_columns_get_mean_zero_and_deviation_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="otad"):
        scaling = Scaling.fit(X, ["a", "b", "c"])
    scaled = scaling.apply(X)
    assert scaled.dtype == np.float32
    # The third column would be all alike, had it gone through float32 first.
    np.testing.assert_allclose(scaled[:, [0, 2]].std(axis=0), 1, atol=1e-6)
    np.testing.assert_array_equal(scaled[:, 1], 0)
    assert scaling.scale[1] == 1
    assert "1 constant column(s)" in caplog.text
    assert caplog.text.rstrip().endswith(": b")


def test_constant_that_does_not_round_well() -> None:
    x = np.column_stack([np.full(10, 0.1), np.arange(10.0)])
    scaling = Scaling.fit(x)
    assert scaling.scale[0] == 1
    assert (scaling.apply(x)[:, 0] == 0).all()


def test_json_and_back() -> None:
    scaling = Scaling.fit(X)
    again = Scaling.from_dict(json.loads(json.dumps(scaling.to_dict())))
    np.testing.assert_array_equal(again.apply(X), scaling.apply(X))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mean": [1.0]},
        {"mean": [1.0], "scale": [1.0, 2.0]},
        {"mean": [1.0], "scale": [0.0]},
        {"mean": [float("nan")], "scale": [1.0]},
        {"mean": ["a"], "scale": [1.0]},
    ],
)
def test_damaged_dict(values: dict) -> None:
    with pytest.raises(DataError, match="not a scaling"):
        Scaling.from_dict(values)


def test_all_constant() -> None:
    with pytest.raises(DataError, match="every column is constant"):
        Scaling.fit(np.ones((4, 2)))


def test_other_number_of_columns() -> None:
    with pytest.raises(DataError, match="2 feature columns and the scaling was made for 3"):
        Scaling.fit(X).apply(X[:, :2])


def test_value_that_leaves_float32() -> None:
    scaling = Scaling.fit(np.array([[0.0], [1e-30]]))
    with pytest.raises(DataError, match="feature column 1, data row 2"):
        scaling.apply(np.array([[0.0], [1e30]]))
