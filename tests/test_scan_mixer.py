"""Convolution, projections and scan in one operator, and the kernels' vectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scan_inputs import relative_error
from torch.utils.flop_counter import FlopCounterMode

from srlib.scan import ORDERS, backends, mamba_mixer, mixer

if not backends()["cpu"].available:
    pytest.skip(f"the cpu back end: {backends()['cpu'].reason}", allow_module_level=True)

import numba
from numba import njit

from srlib.scan import kernels

NAMES = ("x", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")


def random_mixer(batch=2, length=200, width=40, rank=3, states=16, taps=4) -> dict:
    shapes = {
        "x": (batch, length, width),
        "conv_weight": (width, taps),
        "conv_bias": (width,),
        "x_proj": (rank + 2 * states, width),
        "dt_proj": (width, rank),
        "dt_bias": (width,),
        "A": (width, states),
        "D": (width,),
    }
    scales = {"x_proj": width**-0.5, "dt_proj": rank**-0.5}
    inputs = {name: scales.get(name, 1.0) * torch.randn(shape) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].abs()
    return {name: t.requires_grad_() for name, t in inputs.items()}


def gradients(inputs: dict, grad: torch.Tensor, **options) -> dict:
    y = mamba_mixer(**inputs, **options)
    found = torch.autograd.grad(y, list(inputs.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}


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
    found = gradients(inputs, grad, order=order, nslices=6)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    for name, value in gradients(wide, grad, order=order, nslices=6).items():
        assert relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # fused, and composed
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_named(name, axis, dtype):
    """Cut by one, each tensor contradicts another: which of the two is told, with both shapes."""
    inputs = {k: t.detach().to(dtype) for k, t in random_mixer(2, 9, 5, 2, 3).items()}
    if (name, axis) in (
        ("x", 0),
        ("conv_weight", -1),
    ):  # any batch and any number of taps are right
        axis, inputs[name] = 1, inputs[name].unsqueeze(-1)
    inputs[name] = inputs[name].narrow(axis, 0, inputs[name].shape[axis] - 1)
    with pytest.raises(ValueError, match=r"^[a-zA-Z_]+: expected shape \(.*\) = \(.*\), .*got \("):
        mamba_mixer(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_bias": torch.zeros(5).double()}, "conv_bias: expected torch.float32 as x is, got"),
        ({"x_proj": torch.zeros(8, 5, device="meta")}, "x_proj: expected on cpu as x is, got meta"),
        (
            {"D": torch.zeros(5).to_sparse()},
            "D: expected a dense tensor .* got torch.float32, torch.sparse",
        ),
        (
            {"x": torch.zeros(2, 0, 5)},
            r"x: expected shape \(B, L, E\) = \(2, 0, 5\), none of them 0",
        ),
        ({"order": "sideways"}, "order: expected one of forward, reverse, inter_slice"),
        ({"nslices": 0}, "nslices: expected at least 1"),
    ],
)
def test_other_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        mamba_mixer(**{**random_mixer(2, 9, 5, 2, 3), **change})


def test_the_fused_operators_themselves_take_nothing_that_does_not_fit():
    inputs = {name: t.detach() for name, t in random_mixer(2, 9, 5, 2, 3).items()}
    options = ("reverse", 1)
    y, states = torch.ops.srlib.fused_mixer(*inputs.values(), *options, True)
    wide, many = {**inputs, "x": inputs["x"].double()}, {**inputs, "conv_weight": torch.ones(5, 5)}
    short = {**inputs, "dt_bias": inputs["dt_bias"][:2]}
    doubles = {name: t.double() for name, t in inputs.items()}
    for bad in (wide, many, short, doubles):
        with pytest.raises(ValueError, match="expected"):
            torch.ops.srlib.fused_mixer(*bad.values(), *options, True)
        with pytest.raises(ValueError, match="expected"):
            torch.ops.srlib.fused_mixer_backward(y, states, *bad.values(), *options)
    for grad, kept, name in ((y[:1], states, "grad"), (y, states[:, 1:], "states")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            torch.ops.srlib.fused_mixer_backward(grad, kept, *inputs.values(), *options)


def test_more_taps_than_the_kernels_have_take_the_composition():
    torch.manual_seed(0)
    inputs = random_mixer(taps=7)
    y = mamba_mixer(**inputs, order="reverse")
    wide = mamba_mixer(**{name: t.double() for name, t in inputs.items()}, order="reverse")
    assert relative_error(y, wide) < 1e-5


def test_the_tensor_decides_on_the_kernel_of_the_convolution(monkeypatch):
    """Not whether the machine has a GPU; the kernel takes 2 to 4 taps, no float64, channels by the eight."""
    taken = []
    monkeypatch.setattr(
        mixer, "_causal_conv_kernel", lambda: lambda *tensors: taken.append(tensors)
    )
    monkeypatch.setattr(mixer, "torch_conv", lambda *tensors: "torch")

    class Cuda(NamedTuple):
        dtype: torch.dtype = torch.float32
        is_cuda: bool = True

    for taps, width, x in (
        *((1, 8, Cuda()), (5, 8, Cuda()), (4, 10, Cuda()), (4, 8, Cuda(torch.float64))),
        (4, 8, torch.ones(1, 8, 3)),
    ):
        assert mixer._causal_conv(x, torch.ones(width, taps), None) == "torch"
    assert mixer._causal_conv(Cuda(), torch.ones(8, 4), None) is None
    assert len(taken) == 1


def test_the_fused_mixer_keeps_torchs_contract():
    inputs = tuple(random_mixer(batch=1, length=70, width=5, rank=1, states=2).values())
    options = ("inter_slice", 4)
    torch.library.opcheck(torch.ops.srlib.fused_mixer, (*inputs, *options, True))
    y, states = torch.ops.srlib.fused_mixer(*inputs, *options, True)
    arguments = (torch.randn_like(y), states, *(t.detach() for t in inputs), *options)
    torch.library.opcheck(torch.ops.srlib.fused_mixer_backward, arguments)


def test_the_fused_mixer_keeps_its_input_and_states_only():
    inputs = random_mixer(batch=1, length=20_000, width=32)
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mamba_mixer(**inputs)
    states = 16 * 32 * (math.ceil(20_000 / 64) + 1)
    assert sum(kept.values()) == sum(t.numel() for t in inputs.values()) + states


def test_flops_are_those_of_the_composition():
    fused, composed = random_mixer(), random_mixer()
    counts = []
    for inputs, dtype in ((fused, torch.float32), (composed, torch.float64)):
        with FlopCounterMode(display=False) as counter:
            mamba_mixer(**{name: t.to(dtype) for name, t in inputs.items()})
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def _apply(function, values: np.ndarray) -> np.ndarray:
    @njit
    def run(tile, out):
        for row in range(len(tile)):
            kernels.store(out, row, function(kernels.load(tile, row)))

    tile = np.zeros((math.ceil(len(values) / 16), 16), np.float32)
    tile.flat[: len(values)] = values
    out = np.empty_like(tile)
    run(tile, out)
    return out.flat[: len(values)]


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (kernels.exp2, np.exp2),
        (kernels.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
        (kernels.softplus, lambda x: np.logaddexp(x, 0)),
    ],
)
def test_vector_functions_are_exact_to_float32(function, exact):
    x = np.linspace(-10, 10, 10_001, dtype=np.float32)
    found, expected = _apply(function, x), exact(x.astype(np.float64))
    assert np.max(np.abs(found / expected - 1)) < 1e-6
    assert np.isnan(_apply(function, np.array([np.nan], np.float32)))[0]


def test_exp2_ends_in_zero_and_infinity():
    x = np.array([-np.inf, -1e30, -127, 128, 1e30, np.inf, 0, 1], np.float32)
    assert _apply(kernels.exp2, x).tolist() == [0, 0, 0, np.inf, np.inf, np.inf, 1, 2]


def test_dots_are_dot_products_of_rows():
    @njit
    def run(a, b, out):
        kernels.store(out, 0, kernels.dots(a, 0, b, 2))

    generator = np.random.default_rng(0)
    a, b = generator.random((2, 20, 16), np.float32)
    out = np.empty((1, 16), np.float32)
    run(a, b, out)
    np.testing.assert_allclose(out[0], (a[:16] * b[2:18]).sum(1), rtol=1e-6)


def test_bounds_of_vectors_are_checked_when_asked_for(monkeypatch):
    monkeypatch.setattr(numba.config, "BOUNDSCHECK", 1)

    @njit
    def copy_row(tile, row):
        kernels.store(tile, row, kernels.load(tile, 0))

    @njit
    def copy_lanes(array, row, channel):
        kernels.store(array, (row, channel), kernels.load(array, (0, 0)))

    tile, array = np.zeros((4, 16), np.float32), np.zeros((4, 40), np.float32)
    copy_row(tile, 3)
    copy_lanes(array, 3, 24)
    for row in (-1, 4):
        with pytest.raises(IndexError):
            copy_row(tile, row)
    for row, channel in ((4, 0), (0, 25), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            copy_lanes(array, row, channel)
    with pytest.raises(IndexError, match="lanes"):
        copy_lanes(array[:, ::2], 0, 0)  # what lies between is another array's


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch):
    def without_cache(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(kernels, "njit", without_cache)

    def double(values):
        values[:] *= 2

    values = np.ones(3, np.float32)
    kernels._Kernel(double, kernels.void(kernels.float32[:])).compiled(values)
    assert values.tolist() == [2, 2, 2]
