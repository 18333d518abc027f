"""The transport map read off a backbone, and its health."""

import torch

from otad.nn import residual_mlp
from otad.transport import TransportMap, health, read_transport_map


def test_duplicates_are_merged_and_counted() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3)
    inputs = x[[3, 1, 3, 0, 4, 3, 2]]
    y = torch.tensor([1, 0, 1, 0, 1, 0, 0])
    transport = read_transport_map(residual_mlp(x.mean(0), 2), inputs, y)
    assert transport.samples.tolist() == [0, 1, 3, 4, 6]
    assert transport.counts.tolist() == [3, 1, 1, 1, 1]
    assert transport.y.tolist() == [1, 0, 0, 1, 0]  # two of the three merged samples say 1
    assert transport.conflicts == 1
    torch.testing.assert_close(transport.x, inputs[transport.samples] - x.mean(0))


def planar(z: torch.Tensor, x: torch.Tensor) -> TransportMap:
    n = len(x)
    counts, samples = torch.ones(n, dtype=torch.long), torch.arange(n)
    return TransportMap(x, z, torch.zeros(n, dtype=torch.long), samples, counts, 0)


def test_health_of_a_known_quadratic_and_of_a_rotation() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 2, dtype=torch.float64)
    good = health(planar(1.5 * x, x), k=6)  # the gradient of 0.75 |x|^2
    assert abs(good["median"] - 1.5) < 1e-3
    assert good["feasible"] == 1.0
    # A quarter turn is no gradient of anything: its neighbourhoods are not cyclically monotone.
    turned = health(planar(x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64), x), k=6)
    assert turned["feasible"] < 0.1


def test_health_in_many_dimensions_goes_in_parts() -> None:
    """As many coordinates as the published Transformer has: the neighbourhoods do not fit into one part."""
    torch.manual_seed(0)
    x = torch.randn(80, 24_960)
    found = health(planar(1.5 * x, x))
    assert found["neighborhoods"] == 80
    assert max(abs(found[q] - 1.5) for q in ("quartile_1", "median", "maximum")) < 1e-3
