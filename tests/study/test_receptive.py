"""The effective receptive field against convolutions whose field is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from srlib.net.model import FEATURES, SegResMamba
from srlib.net.tom import TriOrientedMamba
from srlib.scan import ORDERS, selective_scan
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


# --- One voxel, with and without parts -------------------------------------------------------------


def tiny(**options):
    torch.manual_seed(0)
    return SegResMamba(1, 3, FEATURES["tiny"], **options).eval()


def test_influence_is_the_gradient_of_the_largest_logit_for_every_voxel_asked_for():
    conv = nn.Conv3d(1, 2, 3, padding=1)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.bias[:] = torch.tensor([0.0, 9.0])
        conv.weight[0, 0, 1, 1, 0], conv.weight[1, 0, 1, 1, 2] = 1.0, -0.1
    of_voxel = receptive.influence(conv, image(5, 6, 7))
    for voxel in ((1, 2, 3), (4, 0, 0)):
        expected = np.zeros((5, 6, 7))
        expected[voxel[0], voxel[1], voxel[2] + 1] = 1
        np.testing.assert_array_equal(of_voxel(voxel), expected)


def test_a_network_without_a_part_computes_what_one_built_without_it_computes():
    network, x = tiny(), image(48, 32, 32)[None]
    built = tiny(recurrence=False)
    built.load_state_dict(network.state_dict(), strict=False)
    bare = tiny(tom="none")
    bare.load_state_dict(network.state_dict(), strict=False)
    with torch.no_grad():
        whole = network(x)
        torch.testing.assert_close(receptive.without_recurrence(network)(x), built(x))
        torch.testing.assert_close(receptive.without_tom(network)(x), bare(x))
        torch.testing.assert_close(network(x), whole)  # copies were changed


# --- What a scan remembers -------------------------------------------------------------------------


def test_a_layer_s_scans_are_called_with_the_inputs_that_are_told():
    torch.manual_seed(0)
    layer, tokens = TriOrientedMamba(16), torch.randn(24, 16)
    _, gate = layer.in_proj(tokens).chunk(2, dim=-1)
    total = 0
    for order, suffix in zip(ORDERS, ("", "_b", "_s"), strict=True):
        visits, u, delta, A, B, C = receptive.scan_inputs(layer, tokens, order, 4)
        D = layer.get_parameter(f"D{suffix}")
        y = selective_scan(u[None], delta[None], A, B[None], C[None], D, delta_softplus=False)
        total = total + y[0].T[torch.argsort(visits)]
    by_hand = layer.out_proj(total * torch.nn.functional.silu(gate))
    torch.testing.assert_close(by_hand, layer(tokens[None], depth=4)[0])


@pytest.mark.parametrize("order", ORDERS)
def test_a_scan_remembers_what_the_recurrence_leaves_of_a_token(order):
    network, x = tiny(), image(48, 32, 32)
    memory = receptive.scan_memory(network, x, order)
    assert memory.shape == (24, 16, 16)
    step, j = 300, 291
    h = memory.written[j].clone()
    for t in range(j + 1, step + 1):  # no later token is added: what is left is the token's own
        h = h * torch.exp((memory.time[t] - memory.time[t - 1])[:, None] * memory.A)
    share = float(h.sum() / memory.written[j].sum())
    remembered = memory.remembered(step)
    assert remembered[j] == pytest.approx(share, rel=1e-4)
    assert remembered[-1] == pytest.approx(1)
    assert 0 < share < 1
    volume = memory.as_map(step)
    assert np.isfinite(volume).sum() == step + 1
    place = np.unravel_index(int(memory.visits[j]), memory.shape)
    assert volume[place] == remembered[j]


@pytest.mark.parametrize("axis", [1, 2])
def test_memory_lies_in_the_image_s_axes(axis):
    networks = [tiny(slice_axis=a) for a in (0, axis)]
    networks[1].load_state_dict(networks[0].state_dict())
    x = image(48, 40, 34)
    expected = receptive.scan_memory(networks[0], x.movedim(1 + axis, 1), "inter_slice").as_map(99)
    found = receptive.scan_memory(networks[1], x, "inter_slice").as_map(99)
    np.testing.assert_allclose(found, np.moveaxis(expected, 0, axis), rtol=1e-4)


def test_a_network_without_a_scan_has_no_memory():
    with pytest.raises(ValueError, match="order: expected one of the layer's"):
        receptive.scan_memory(tiny(scan_orders=("forward",)), image(48, 32, 32), "reverse")
    with pytest.raises(ValueError, match="first stage has no outer ToM layer with a recurrence"):
        receptive.scan_memory(tiny(tom="inner"), image(32, 32, 32))
