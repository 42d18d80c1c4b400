"""Convolution, projections and scan in one operator."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from scan_inputs import (
    assert_close,
    detached,
    doubles,
    mixed,
    random_mixer,
    relative_error,
    with_gradients,
)  # fmt: skip
from torch.utils.flop_counter import FlopCounterMode

from srlib.scan import ORDERS, Weights, backends, mamba_mixer, mixer

if not backends()["cpu"].available:
    pytest.skip(f"the cpu back end: {backends()['cpu'].reason}", allow_module_level=True)

fused_mixer, fused_backward = torch.ops.srlib.fused_mixer, torch.ops.srlib.fused_mixer_backward


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stretch", [mixer.STRETCH, 1])  # in one stretch, and chunk by chunk
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"batch": 1, "length": 65, "width": 16, "rank": 1},
        {"batch": 3, "length": 7, "width": 5, "states": 2},
        {"length": 130, "width": 24, "taps": 1},
        {"length": 1, "width": 1, "states": 1, "rank": 1},
    ],
)
def test_the_fused_mixer_is_the_composition(monkeypatch, order, stretch, shape):
    monkeypatch.setattr(mixer, "STRETCH", stretch)
    torch.manual_seed(0)
    inputs = random_mixer(**shape)
    grad = torch.randn(inputs["x"].shape)
    mix = partial(mixed, order=order, nslices=6)
    expected = with_gradients(mix, doubles(inputs), grad)
    assert_close(with_gradients(mix, inputs, grad), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # fused, and composed
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("name", ["x", *Weights._fields])
def test_what_does_not_fit_is_named(name, axis, dtype):
    """Cut by one, each tensor contradicts another: which of the two is told, with both shapes."""
    inputs = {k: t.detach().to(dtype) for k, t in random_mixer(2, 9, 5, 2, 3).items()}
    if (name, axis) in (("x", 0), ("conv_weight", -1)):  # any batch, any number of taps are right
        axis, inputs[name] = 1, inputs[name].unsqueeze(-1)
    inputs[name] = inputs[name].narrow(axis, 0, inputs[name].shape[axis] - 1)
    with pytest.raises(ValueError, match=r"^[a-zA-Z_]+: expected shape \(.*\) = \(.*\), .*got \("):
        mixed(**inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv_bias", torch.zeros(5).double(), "torch.float32 as x is, got"),
        ("x_proj", torch.zeros(8, 5, device="meta"), "on cpu as x is, got meta"),
        ("D", torch.zeros(5).to_sparse(), "a dense tensor .* got torch.float32, torch.sparse"),
        ("x", torch.zeros(2, 0, 5), r"shape \(B, L, E\) = \(2, 0, 5\), none of them 0"),
        ("order", "sideways", "one of forward, reverse, inter_slice"),
        ("nslices", 0, "at least 1"),
    ],
)
def test_other_arguments_that_do_not_fit_are_named(name, value, message):
    with pytest.raises(ValueError, match=f"{name}: expected {message}"):
        mixed(**{**random_mixer(2, 9, 5, 2, 3), name: value})


def test_the_fused_operators_themselves_take_nothing_that_does_not_fit():
    inputs = detached(random_mixer(2, 9, 5, 2, 3))
    options = ("reverse", 1)
    y, states = fused_mixer(*inputs.values(), *options, True)
    wide, many = {**inputs, "x": inputs["x"].double()}, {**inputs, "conv_weight": torch.ones(5, 5)}
    short = {**inputs, "dt_bias": inputs["dt_bias"][:2]}
    for bad in (wide, many, short, doubles(inputs)):
        with pytest.raises(ValueError, match="expected"):
            fused_mixer(*bad.values(), *options, True)
        with pytest.raises(ValueError, match="expected"):
            fused_backward(y, states, *bad.values(), *options)
    for grad, kept, name in ((y[:1], states, "grad"), (y, states[:, 1:], "states")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            fused_backward(grad, kept, *inputs.values(), *options)


def test_more_taps_than_the_kernels_have_take_the_composition():
    torch.manual_seed(0)
    inputs = random_mixer(taps=7)
    y = mixed(**inputs, order="reverse")
    assert relative_error(y, mixed(**doubles(inputs), order="reverse")) < 1e-5
    x, *weights = inputs.values()
    with pytest.raises(ValueError, match="conv_weight: expected at most 4 taps, got 7"):
        mamba_mixer(x, Weights(*weights), fused=True)


def test_the_tensor_decides_on_the_kernel_of_the_convolution(monkeypatch):
    """Not whether the machine has a GPU; the kernel takes 2 to 4 taps, no float64, channels by the eight."""
    monkeypatch.setattr(mixer, "_causal_conv_kernel", lambda: lambda *_: "kernel")
    by_torch = {"pad": lambda *_: None, "conv1d": lambda *_, **__: None, "silu": lambda _: "torch"}
    monkeypatch.setattr(mixer, "F", SimpleNamespace(**by_torch))

    class Cuda(NamedTuple):
        dtype: torch.dtype = torch.float32
        is_cuda: bool = True

    for taps, width, x, by in (
        *((4, 8, Cuda(), "kernel"), (2, 16, Cuda(), "kernel")),
        *((1, 8, Cuda(), "torch"), (5, 8, Cuda(), "torch"), (4, 10, Cuda(), "torch")),
        *((4, 8, Cuda(torch.float64), "torch"), (4, 8, torch.ones(1, 8, 3), "torch")),
    ):
        assert mixer._causal_conv(x, torch.ones(width, taps), None) == by


def test_the_fused_mixer_keeps_torchs_contract():
    inputs = random_mixer(batch=1, length=70, width=5, rank=1, states=2)
    options = ("inter_slice", 4)
    torch.library.opcheck(fused_mixer, (*inputs.values(), *options, True))
    y, states = fused_mixer(*inputs.values(), *options, True)
    given = (torch.randn_like(y), states, *detached(inputs).values(), *options)
    torch.library.opcheck(fused_backward, given)


def test_flops_are_those_of_the_composition():
    counts = []
    for inputs in (random_mixer(), doubles(random_mixer())):
        with FlopCounterMode(display=False) as counter:
            mixed(**inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
