"""The effective receptive field against convolutions whose field is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from srlib.net.model import SegResMamba
from srlib.study import receptive

SPACING = (1.0, 1.0, 1.0)


def box(kernel, classes=1):
    """A convolution of equal positive weights: its field is a uniform box."""
    conv = nn.Conv3d(1, classes, kernel, padding=[n // 2 for n in kernel])
    nn.init.constant_(conv.weight, 0.3)
    return conv


def image(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def test_the_field_of_a_convolution_is_its_kernel():
    field = receptive.effective_field(box((3, 5, 1), classes=2), [image(8, 9, 7)] * 2)
    expected = np.zeros((8, 9, 7))
    expected[3:6, 2:7, 3] = 1 / 15
    np.testing.assert_allclose(field, expected, atol=1e-12)


def test_each_image_and_class_has_equal_weight():
    conv = nn.Conv3d(1, 2, 3, padding=1)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[0, 0, 1, 1, 0], conv.weight[1, 0, 1, 1, 2] = 100.0, -1.0
    field = receptive.effective_field(conv, [image(5, 5, 5)])
    assert field[2, 2, 1] == field[2, 2, 3] == 0.5


def test_radius_and_shares_of_a_uniform_box():
    field = receptive.effective_field(box((3, 3, 3)), [image(9, 9, 9)])
    assert receptive.radius(field, SPACING) == pytest.approx(np.sqrt(3))
    assert receptive.radius(field, SPACING, share=7 / 27 - 1e-9) == 1
    assert receptive.radius(field, (1.0, 1.0, 4.0), share=0.3) == pytest.approx(np.sqrt(2))
    shares = receptive.share_by_radius(field, SPACING)
    np.testing.assert_allclose(shares["share"][:3], [1 / 27, 7 / 27, 1])
    assert shares["radius_mm"].tolist() == list(range(8))  # the corner is 6.9 mm away


def test_the_radius_holds_the_share_that_it_says():
    field = np.random.default_rng(0).random((6, 7, 8))
    spacing = (1.0, 2.0, 1.5)
    for share in (0.1, 0.5, 0.95):
        r = receptive.radius(field, spacing, share)
        inside = receptive.distances(field.shape, spacing) <= r
        assert field[inside].sum() / field.sum() >= share


def test_a_network_that_computes_again_gives_the_same_gradients_for_each_class():
    torch.manual_seed(0)
    network = SegResMamba(1, 3, (8, 16, 32, 64)).eval()
    field = receptive.effective_field(network, [image(20, 20, 36)])
    assert field.shape == (20, 20, 36)
    assert field.sum() == pytest.approx(1)
    one = image(20, 20, 36)[None].requires_grad_()
    (gradient,) = torch.autograd.grad(network(one)[0, 2, 10, 10, 18], one)
    last = receptive._fields(network, image(20, 20, 36))[2]
    expected = gradient[0, 0].abs().double().numpy()
    np.testing.assert_allclose(last, expected / expected.sum(), atol=1e-7)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        receptive.effective_field(box((3, 3, 3)), [])
    blind = nn.Conv3d(1, 1, 1)
    nn.init.zeros_(blind.weight)
    with pytest.raises(ValueError, match="no voxel"):
        receptive.effective_field(blind, [image(4, 4, 4)])


def test_images_lie_in_the_middle_of_one_size():
    dataset = SimpleNamespace(load=lambda _: {"image": torch.ones(1, 5, 12, 7)})
    (fitted,) = receptive.centred_images(dataset, ["007"], (9, 8, 7))
    assert fitted.shape == (1, 9, 8, 7)
    assert fitted.sum() == 5 * 8 * 7
    assert fitted[0, 2:7].min() == 1
