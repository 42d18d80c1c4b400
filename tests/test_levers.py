"""Each lever keeps function and gradients; the loss in slabs is the loss."""

import pytest
import torch
from torch import nn

from srlib.levers import LEVERS, OURS, Arrangement, arranged, deviation, gradients, slab_loss
from srlib.profiling import count
from srlib.workload import loss_function


@pytest.mark.parametrize("pulled", range(1, len(LEVERS) + 1), ids=list(LEVERS))
def test_gradients_are_those_of_the_straightforward_implementation(pulled):
    levers = tuple(LEVERS)[:pulled]
    assert deviation(levers) < 1e-5
    assert gradients(levers)["loss"] == pytest.approx(float(gradients(())["loss"]), rel=1e-6)


def test_a_deviation_is_seen(monkeypatch):
    sound = nn.functional.silu
    monkeypatch.setattr("srlib.tom.F.silu", lambda x: sound(x) * 1.001)
    # the straightforward arrangement gates inside the scan
    assert deviation(("tom",)) > 1e-5


@pytest.mark.parametrize("size", [(32, 24, 16), (31, 24, 15)])
@pytest.mark.parametrize("planes", [3, 8, 99])
def test_slabs_give_the_loss(size, planes):
    torch.manual_seed(0)
    head = nn.ConvTranspose3d(3, 5, kernel_size=2, stride=2).double()
    halved = [-(-n // 2) for n in size]
    features = torch.randn(2, 3, *halved, dtype=torch.float64, requires_grad=True)
    label = torch.randint(5, (2, 1, *size))
    depth, height, width = size
    whole = loss_function(head(features)[..., :depth, :height, :width], label)
    inputs = (features, *head.parameters())
    slabs = slab_loss(head, features, label, planes)
    torch.testing.assert_close(slabs, whole, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(whole, inputs)
    torch.testing.assert_close(torch.autograd.grad(slabs, inputs), expected)


def test_levers_keep_less():
    kept = []
    for levers in ((), ("tom",), OURS, (*OURS, "loss"), tuple(LEVERS)):
        totals = count(Arrangement(size=64, levers=levers)).totals
        kept.append(totals["kept"] + totals["kept_by_loss"])
    assert kept == sorted(set(kept), reverse=True)
    assert kept[2] < 0.5 * kept[0]


def test_our_levers_are_what_the_model_does():
    """Nothing is replaced that is not an undone lever."""
    from srlib import model, tom
    from srlib.scan import mixer

    def state():
        return (model.recomputed, mixer._can_fuse, tom.TriOrientedMamba.forward)

    before = state()
    with arranged(OURS):
        assert state() == before
    with arranged(()):
        assert not {*state()} & {*before}
    assert state() == before


def test_an_unknown_lever_is_refused():
    with pytest.raises(ValueError, match=r"levers must be among tom, .*got \['none'\]"):
        Arrangement(levers=("none",))
