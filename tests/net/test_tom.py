"""Tri-oriented Mamba against its published definition."""

from pathlib import Path

import numpy as np
import pytest
import torch

from srlib.net.tom import ToMLayer, TriOrientedMamba
from srlib.scan import token_order

ORACLE = Path(__file__).parents[1] / "oracles" / "tri_oriented_mamba.npz"


def relative_error(ours: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(ours.detach().numpy() - expected).max() / np.abs(expected).max())


@pytest.fixture
def oracle():
    with np.load(ORACLE) as arrays:
        return dict(arrays)


@pytest.fixture
def published(oracle):
    layer = TriOrientedMamba(8, d_state=4).double()
    weights = {k.split(":")[1]: torch.from_numpy(v) for k, v in oracle.items() if "weight:" in k}
    layer.load_state_dict(weights)  # strict: names and shapes are the published ones
    return layer


def test_output_and_every_gradient_equal_the_oracle(oracle, published):
    tokens = torch.from_numpy(oracle["x"]).requires_grad_()
    y = published(tokens, depth=int(oracle["nslices"]))
    y.backward(torch.from_numpy(oracle["dy"]))

    assert relative_error(y, oracle["y"]) < 1e-9
    assert relative_error(tokens.grad, oracle["grad_x"]) < 1e-9
    for name, parameter in published.named_parameters():
        assert relative_error(parameter.grad, oracle[f"grad:{name}"]) < 1e-9, name


def test_slices_follow_the_depth_or_are_fixed(oracle, published):
    tokens = torch.from_numpy(oracle["x"])
    follows = published(tokens, depth=4)
    assert not torch.allclose(published(tokens, depth=2), follows)
    published.nslices = 4
    assert torch.equal(published(tokens, depth=2), follows)


@pytest.mark.parametrize("order", ["forward", "reverse", "inter_slice"])
def test_one_order_is_a_causal_scan_in_that_order(order):
    torch.manual_seed(0)
    layer = TriOrientedMamba(8, scan_orders=(order,)).double()
    tokens = torch.randn(1, 24, 8, dtype=torch.float64)
    changed = tokens.clone()
    visit = token_order(order, 24, 4)
    changed[:, visit[10]] += 1.0
    moved = (layer(changed, depth=4) - layer(tokens, depth=4)).abs().amax(dim=(0, 2)) > 0
    assert not moved[visit[:10]].any()
    assert moved[visit[10:]].all()


def test_scan_orders_decide_the_parameters():
    names = {n for n, _ in TriOrientedMamba(8, scan_orders=("reverse",)).named_parameters()}
    assert names == {
        *("in_proj.weight", "out_proj.weight", "conv1d_b.weight", "conv1d_b.bias"),
        *("x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias", "A_b_log", "D_b"),
    }


def test_without_recurrence_a_token_reaches_no_further_than_the_convolution():
    """Four taps in each direction; with recurrence the same token reaches everything after it."""
    for recurrence, expected in ((False, [17, 18, 19, 20]), (True, list(range(17, 40)))):
        torch.manual_seed(0)
        mamba = TriOrientedMamba(8, scan_orders=("forward",), recurrence=recurrence)
        x = torch.randn(1, 40, 8, requires_grad=True)
        y = mamba(x, depth=4)
        reached = [
            t
            for t in range(40)
            if torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0, 17].abs().max() > 0
        ]
        assert reached == expected
    control = TriOrientedMamba(8, recurrence=False).double()
    assert not [name for name, _ in control.named_parameters() if "A" in name]
    assert control(torch.randn(1, 8, 8, dtype=torch.float64), depth=2).dtype == torch.float64


@pytest.mark.parametrize("orders", [(), ("forward", "forward"), ("sideways",)])
def test_bad_scan_orders_are_refused(orders):
    with pytest.raises(ValueError, match="scan_orders must be a non-empty subset"):
        TriOrientedMamba(8, scan_orders=orders)


def test_layer_maps_volumes_with_and_without_residual():
    torch.manual_seed(0)
    layer = ToMLayer(8, residual=False)
    x = torch.randn(2, 8, 3, 4, 5)
    plain = layer(x)
    layer.residual = True
    assert plain.shape == x.shape
    torch.testing.assert_close(layer(x), plain + x)


def test_autocast_keeps_the_scan_finite_and_close():
    torch.manual_seed(0)
    layer = ToMLayer(16)
    x = torch.randn(1, 16, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    half.float().mean().backward()
    assert torch.isfinite(half).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    torch.testing.assert_close(half.float(), layer(x), rtol=0.1, atol=0.05)
