"""CIP-net: what its weights do not depend on, degenerate neighbourhoods, bad sizes."""

import pytest
import torch
from torch import Tensor

from otad.cip.gram import inner_products
from otad.nn.cip_net import CIPNet


def neighborhoods(batch: int = 20, k: int = 7, d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, neighbours, and the gradients of a 1.5-smooth function at them."""
    torch.manual_seed(0)
    x_i = torch.randn(batch, k, d, dtype=torch.float64)
    return torch.randn(batch, d, dtype=torch.float64), x_i, 0.5 * x_i + torch.tanh(x_i)


def weights(net: CIPNet, x: Tensor, x_i: Tensor, z_i: Tensor, smoothness: float | None) -> Tensor:
    products = inner_products(x, x_i, z_i)
    assert products.dd is not None
    return net(products.zz, products.zd, products.dd, products.tilt, smoothness).softmax(1)


@pytest.fixture
def net() -> CIPNet:
    torch.manual_seed(1)
    return CIPNet(width=16, layers=2, heads=4).double()


@pytest.mark.parametrize("smoothness", [None, 2.0, 0.6])
class TestSymmetries:
    """For searched bounds, for bounds that hold, and for bounds that the neighbours break."""

    def test_weights_follow_a_permutation_of_the_neighbors(self, net: CIPNet, smoothness: float | None) -> None:
        x, x_i, z_i = neighborhoods()
        order = torch.randperm(7)
        found = weights(net, x, x_i[:, order], z_i[:, order], smoothness)
        expected = weights(net, x, x_i, z_i, smoothness)
        assert expected.std(1).mean() > 1e-3  # the untrained network, too, tells neighbours apart
        torch.testing.assert_close(found, expected[:, order], atol=1e-9, rtol=0)

    def test_translation_and_rotation_change_nothing(self, net: CIPNet, smoothness: float | None) -> None:
        x, x_i, z_i = neighborhoods()
        rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
        shift = torch.randn(5, dtype=torch.float64)
        found = weights(net, (x + shift) @ rotation, (x_i + shift) @ rotation, z_i @ rotation, smoothness)
        torch.testing.assert_close(found, weights(net, x, x_i, z_i, smoothness), atol=1e-9, rtol=0)

    @pytest.mark.parametrize(("of_x", "of_z"), [(10.0, 1.0), (1.0, 0.01), (3.0, 3.0)])
    def test_units_of_points_and_features_change_nothing(
        self, net: CIPNet, smoothness: float | None, of_x: float, of_z: float
    ) -> None:
        x, x_i, z_i = neighborhoods()
        scaled = None if smoothness is None else smoothness * of_z / of_x
        found = weights(net, of_x * x, of_x * x_i, of_z * z_i, scaled)
        torch.testing.assert_close(found, weights(net, x, x_i, z_i, smoothness), atol=1e-9, rtol=0)

    def test_dimensions_that_say_nothing_change_nothing(self, net: CIPNet, smoothness: float | None) -> None:
        x, x_i, z_i = neighborhoods()
        padded = [torch.nn.functional.pad(part, (0, 3)) for part in (x, x_i, z_i)]
        found = weights(net, padded[0], padded[1], padded[2], smoothness)
        torch.testing.assert_close(found, weights(net, x, x_i, z_i, smoothness), atol=1e-9, rtol=0)

    def test_degenerate_neighborhoods_have_finite_weights_and_gradients(
        self, net: CIPNet, smoothness: float | None
    ) -> None:
        x, x_i, z_i = neighborhoods()
        same_z, same_x = z_i[:, :1].expand_as(z_i), x_i.clone()
        same_x[:, 1] = same_x[:, 0]  # two equal points, features apart
        for points, features in ((x_i, same_z), (same_x, z_i), (x_i[:, :1], z_i[:, :1]), (x_i, -z_i)):
            query = x.clone().requires_grad_()
            found = weights(net, query, points, features, smoothness)
            torch.testing.assert_close(found.sum(1), torch.ones_like(x[:, 0]))
            (gradient,) = torch.autograd.grad(found[:, 0].sum(), query)
            assert gradient.isfinite().all()

    def test_a_query_at_a_training_point_has_a_finite_gradient(self, net: CIPNet, smoothness: float | None) -> None:
        _, x_i, z_i = neighborhoods()
        query = x_i[:, 0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(weights(net, query, x_i, z_i, smoothness)[:, 0].sum(), query)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("width", "layers", "heads"), [(0, 1, 1), (8, 0, 2), (8, 1, 3)])
def test_sizes_that_do_not_fit_are_refused(width: int, layers: int, heads: int) -> None:
    with pytest.raises(ValueError, match="divisor of width"):
        CIPNet(width, layers, heads)


def test_no_queries_have_no_weights(net: CIPNet) -> None:
    x, x_i, z_i = neighborhoods()
    assert weights(net, x[:0], x_i[:0], z_i[:0], None).shape == (0, 7)
