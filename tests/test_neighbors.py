"""Neighbours against a k-d tree."""

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from otad.neighbors import indexed, nearest_neighbors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_equals_a_kd_tree(dtype: torch.dtype, offset: float) -> None:
    rng = np.random.default_rng(0)
    points, x = rng.normal(size=(300, 5)) + offset, rng.normal(size=(40, 5)) + offset
    points, x = (torch.tensor(a, dtype=dtype) for a in (points, x))
    distances, indices = nearest_neighbors(x, points, 7)
    expected, order = KDTree(points.double().numpy()).query(x.double().numpy(), 7)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-9)
    np.testing.assert_array_equal(indices.numpy(), order)


def test_ties_go_to_the_smaller_index_and_zero_is_exact() -> None:
    points = torch.tensor([[1.0], [-1.0], [0.25], [1.0]])
    distances, indices = nearest_neighbors(torch.zeros(1, 1), points, 4)
    assert indices.tolist() == [[2, 0, 1, 3]]
    assert nearest_neighbors(points, points, 1)[0].amax() == 0
    assert distances.tolist() == [[0.25, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        nearest_neighbors(torch.zeros(1, 2), torch.zeros(4, 2), k)


def test_one_point_far_out_does_not_blind_the_search() -> None:
    """A value such as 1e12 for "missing" moves the centre and drowns all products."""
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.normal(size=(300, 2)), [[1e12, 1e12]]])
    x = rng.normal(size=(50, 2))
    distances, indices = nearest_neighbors(torch.from_numpy(x), torch.from_numpy(points), 7)
    expected, order = KDTree(points).query(x, 7)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-9)
    np.testing.assert_array_equal(indices.numpy(), order)


def test_of_many_ties_the_smallest_indices_are_found() -> None:
    points = torch.eye(60, dtype=torch.float64).flip(0)
    assert nearest_neighbors(torch.zeros(2, 60, dtype=torch.float64), points, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_an_index_is_of_its_points_alone_and_only_while_they_stay(offset: float) -> None:
    """Whether the offset is taken off a copy or off the queries, the neighbours are those of fresh differences."""
    rng = np.random.default_rng(2)
    points, x = (torch.from_numpy(rng.normal(size=(n, 6)) + offset) for n in (200, 30))
    index = indexed(points, None)
    assert indexed(points, index) is index
    assert indexed(points.clone(), index) is not index
    points[0] = x[0]
    fresh = indexed(points, index)
    assert fresh is not index
    assert fresh.nearest(x, 1)[1][0] == 0
    order = torch.cdist(x, points, compute_mode="donot_use_mm_for_euclid_dist").argsort(dim=1)[:, :5]
    assert torch.equal(fresh.nearest(x, 5)[1], order)
