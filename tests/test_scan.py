"""The selective scan's values and gradients, and what its back ends accept."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scan_inputs import NAMES, random_inputs, relative_error

from srlib.scan import ORDERS, backends, mamba_ssm, operator, selective_scan, token_order
from srlib.scan.inputs import Options, ScanInputs

ORACLE = np.load(Path(__file__).parent / "oracles" / "selective_scan.npz")
# Triton's kernels have tests of their own: without a GPU, its interpreter is too slow for a sweep.
ON_CPU = [
    name
    for name in ("reference", "chunked", "cpu")
    if name not in backends() or backends()[name][0]
]
BY_HAND = [name for name in ON_CPU if name != "reference"]  # with gradients written by hand


def gradients(inputs: dict[str, torch.Tensor], grad: torch.Tensor, **options) -> dict:
    """Output and gradients by name; float64 inputs by the reference."""
    y = selective_scan(**inputs, **options)
    found = torch.autograd.grad(y, list(inputs.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}


def definition(inputs: dict[str, torch.Tensor], grad: torch.Tensor, **options) -> dict:
    """Output and gradients by the sequential reference and autograd in float64."""
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    return gradients(wide, grad, **options, backend="reference")


@pytest.mark.parametrize("backend", ON_CPU)
def test_values_and_gradients_are_the_oracles(backend):
    inputs = {name: torch.tensor(ORACLE[name], requires_grad=True) for name in NAMES}
    found = gradients(inputs, torch.tensor(ORACLE["dy"]), backend=backend)
    for name, value in found.items():
        expected = ORACLE["y" if name == "y" else f"grad_{name}"]
        assert relative_error(value, torch.tensor(expected)) < 1e-9, name


@pytest.mark.parametrize("backend", BY_HAND)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    length=st.integers(1, 150),
    states=st.integers(1, 20),
    without=st.sets(st.sampled_from(["D", "z", "delta_bias"])),
    channels_last=st.booleans(),
    softplus=st.booleans(),
    order=st.sampled_from(ORDERS),
    nslices=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_output_and_all_gradients_follow_the_definition(
    backend, batch, channels, length, states, without, channels_last, softplus, order, nslices, seed
):
    assume(batch * channels * length >= 32)  # the sum of a few numbers may cancel to nearly nothing
    torch.manual_seed(seed)
    inputs = random_inputs(
        batch, channels, length, states, without=tuple(without), channels_last=channels_last
    )
    if not softplus:  # negative steps would make the states grow without bounds
        inputs["delta"] = inputs["delta"].detach().abs().add(3.0).requires_grad_()
    options = {"delta_softplus": softplus, "order": order, "nslices": nslices}
    grad = torch.randn(batch, channels, length)
    found = gradients(inputs, grad, **options, backend=backend)
    expected = definition(inputs, grad, **options)
    assert found["y"].stride() == torch.empty_like(inputs["u"]).stride()
    # The gradient of a few numbers is a sum over all tokens that may nearly cancel, but not its rounding.
    bound = 1e-5 if channels * states >= 8 else 1e-4
    for name, value in expected.items():
        assert relative_error(found[name], value) < bound, name


@pytest.mark.parametrize("backend", BY_HAND)
def test_strided_and_expanded_inputs(backend):
    torch.manual_seed(0)
    rows = torch.randn(2, 70, 100)  # as a projection's output, of which the scan sees slices
    u, delta, B, C = (t.mT for t in rows.split([33, 33, 17, 17], dim=-1))
    inputs = {"u": u, "delta": delta, "A": -torch.rand(33, 1).expand(33, 17), "B": B, "C": C}
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    grad = torch.randn(1, 1, 1).expand(2, 33, 70)
    found = gradients(inputs, grad, backend=backend)
    for name, value in definition(inputs, grad).items():
        assert relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    torch.manual_seed(0)
    inputs = random_inputs(2, 5, 70, 3, dtype)
    grad = torch.randn(2, 5, 70).to(dtype)
    found = gradients(inputs, grad, backend=backend)
    wide = {name: t.detach().float().requires_grad_() for name, t in inputs.items()}
    for name, value in gradients(wide, grad.float(), backend="reference").items():
        assert found[name].dtype == dtype, name
        assert relative_error(found[name], value) < torch.finfo(dtype).eps, name


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_comes_out_where_the_definition_says(backend, value, name):
    torch.manual_seed(0)
    inputs = {k: t.detach().clone() for k, t in random_inputs(1, 20, 90, 5).items()}
    inputs[name][tuple(size // 2 for size in inputs[name].shape)] = value
    y = selective_scan(**inputs, backend=backend)
    expected = selective_scan(**inputs, backend="reference")
    assert torch.equal(y.isfinite(), expected.isfinite())
    if math.isnan(value):
        assert y.isnan().any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_large_steps_and_very_negative_decay_rates_stay_finite(backend):
    torch.manual_seed(0)
    inputs = random_inputs(1, 20, 90, 5)
    with torch.no_grad():
        inputs["delta"][:, :, ::3] = 1e4
        inputs["delta"][:, :, 1::3] = -1e4
        inputs["A"][::2] = -1e5
        inputs["z"][:, :, ::4] = -1e4
    grad = torch.randn(1, 20, 90)
    found = gradients(inputs, grad, backend=backend)
    for name, value in definition(inputs, grad).items():
        assert found[name].isfinite().all(), name
        assert relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("backend", BY_HAND)
def test_same_threads_same_bits(backend):
    torch.manual_seed(0)
    inputs = random_inputs(3, 48, 300, 16)
    grad = torch.randn(3, 48, 300)
    first = gradients(inputs, grad, backend=backend)
    for _ in range(5):
        again = gradients(inputs, grad, backend=backend)
        for name in first:
            assert torch.equal(first[name], again[name]), name


@given(length=st.integers(1, 60), nslices=st.integers(1, 70))
def test_inter_slice_order_is_slice_minor_and_skips_what_is_not_there(length, nslices):
    visited = token_order("inter_slice", length, nslices).tolist()
    per_slice = math.ceil(length / nslices)
    pairs = [(i, s) for i in range(per_slice) for s in range(nslices)]
    assert visited == [s * per_slice + i for i, s in pairs if s * per_slice + i < length]
    assert sorted(visited) == list(range(length))


def test_orders_of_six_tokens_in_two_slices():
    assert token_order("forward", 6, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert token_order("reverse", 6, 2).tolist() == [5, 4, 3, 2, 1, 0]
    assert token_order("inter_slice", 6, 2).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"delta": torch.zeros(1, 4, 8)},
            r"delta: expected shape \(B, D, L\) = \(1, 4, 9\), .*got \(1, 4, 8\)",
        ),
        ({"A": torch.zeros(3, 2)}, r"A: expected shape \(D, N\) = \(4, 2\), .*got \(3, 2\)"),
        (
            {"B": torch.zeros(1, 4, 9)},
            r"B: expected shape \(B, N, L\) = \(1, 2, 9\), .*got \(1, 4, 9\)",
        ),
        ({"z": torch.zeros(9)}, r"z: expected shape \(B, D, L\) = \(1, 4, 9\), .*got \(9,\)"),
        ({"delta_bias": torch.zeros(5)}, r"delta_bias: expected shape \(D\) = \(4\), .*got \(5,\)"),
        (
            {"u": torch.zeros(1, 4, 0)},
            r"u: expected shape \(B, D, L\) = \(1, 4, 0\), none of them 0",
        ),
        (
            {"u": torch.zeros(1, 4, 9, dtype=torch.long)},
            "u: expected a dense tensor of 16, 32 or 64 bit floats, got torch.int64",
        ),
        ({"C": torch.zeros(1, 2, 9).double()}, "C: expected torch.float32 as u is, got"),
        ({"D": torch.zeros(4, device="meta")}, "D: expected on cpu as u is, got meta"),
        ({"order": "sideways"}, "order: expected one of forward, reverse, inter_slice"),
        ({"nslices": 0}, "nslices: expected at least 1"),
        ({"backend": "abacus"}, "backend: expected one of auto, reference, chunked"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**random_inputs(1, 4, 9, 2), **change})


@pytest.mark.parametrize("backend", BY_HAND)
def test_the_operators_themselves_take_nothing_that_does_not_fit(backend):
    inputs = {name: t.detach() for name, t in random_inputs(1, 4, 9, 2).items()}
    options = (True, "forward", 1, backend)
    y, states = torch.ops.srlib.selective_scan(*inputs.values(), *options, True)
    for name in inputs:
        short = {**inputs, name: inputs[name][..., :-1]}
        with pytest.raises(ValueError, match="expected shape"):
            torch.ops.srlib.selective_scan(*short.values(), *options, True)
        with pytest.raises(ValueError, match="expected"):
            torch.ops.srlib.selective_scan_backward(y, states, *short.values(), *options)
    for grad, kept, name in (
        *((y[..., :-1], states, "grad"), (y.double(), states, "grad")),
        *((y, states[:, :-1], "states"), (y, states.double(), "states"), (y, states[:0], "states")),
        (y, torch.stack([states, states], -1)[..., 0], "states"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            torch.ops.srlib.selective_scan_backward(grad, kept, *inputs.values(), *options)


@pytest.mark.parametrize("backend", BY_HAND)
def test_what_is_beyond_float16_becomes_infinite_and_float32_parameters_keep_it(backend):
    inputs = {
        "u": torch.full((1, 2, 300), 30.0),
        "delta": torch.full((1, 2, 300), -2.0),
        "A": torch.full((2, 3), -0.05),
        "B": torch.full((1, 3, 300), 30.0),
        "C": torch.full((1, 3, 300), -3.0),
    }
    for dtype, finite in ((torch.float16, False), (torch.float32, True)):
        half = {name: t.half().requires_grad_() for name, t in inputs.items()}
        half["A"] = inputs["A"].to(dtype).requires_grad_()
        dA = torch.autograd.grad(selective_scan(**half, backend=backend).sum(), half["A"])[0]
        assert dA.dtype == dtype
        assert dA.isfinite().all() == finite
        assert (dA < -65504).all()


def test_a_back_end_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "unavailable", lambda: "no such kernel here")
    operator.backends.cache_clear()
    try:
        assert operator.backends()["mamba_ssm"] == (False, "no such kernel here")
        with pytest.raises(RuntimeError, match="'mamba_ssm' cannot run here: no such kernel here"):
            selective_scan(**random_inputs(1, 4, 9, 2), backend="mamba_ssm")
    finally:
        operator.backends.cache_clear()


def test_a_back_end_for_another_device_says_so(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "unavailable", lambda: "")
    operator.backends.cache_clear()
    try:
        with pytest.raises(ValueError, match="mamba_ssm needs CUDA tensors, got cpu"):
            selective_scan(**random_inputs(1, 4, 9, 2), backend="mamba_ssm")
    finally:
        operator.backends.cache_clear()


def test_the_automatic_choice_is_logged_once(caplog):
    operator._automatic.cache_clear()
    inputs = random_inputs(1, 4, 9, 2)
    with caplog.at_level(logging.INFO, logger="srlib.scan"):
        selective_scan(**inputs)
        selective_scan(**inputs)
    chosen = "cpu" if backends()["cpu"].available else "chunked"
    messages = [record.getMessage() for record in caplog.records]
    assert messages[-1] == f"selective scan on cpu, torch.float32: {chosen}"
    assert len(messages) == len(set(messages))


def _kernel_by_definition() -> SimpleNamespace:
    """What `selective_scan_cuda` computes, with its signature, by the definition."""

    def scan(tensors, softplus):
        u, delta, A, B, C, D, z, bias = tensors
        return selective_scan(
            *(u, delta, A, B.squeeze(1), C.squeeze(1), D, z, bias, softplus), backend="reference"
        )

    def fwd(*arguments):
        *tensors, softplus = arguments
        without_gate = [None if i == 6 else t for i, t in enumerate(tensors)]
        out, states = scan(without_gate, softplus), torch.zeros(1)
        return [out, states] if tensors[6] is None else [out, states, scan(tensors, softplus)]

    def bwd(u, delta, A, B, C, D, z, bias, grad, states, out, dz, softplus, recompute):
        assert dz is None
        assert (out is None) == (z is None)
        tensors = [None if t is None else t.detach() for t in (u, delta, A, B, C, D, z, bias)]
        wanted = [t.requires_grad_() for t in tensors if t is not None]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(scan(tensors, softplus), wanted, grad))
        du, ddelta, dA, dB, dC, dD, dz, dbias = (
            None if t is None else next(found) for t in tensors
        )
        return [du, ddelta, dA, dB, dC, dD, dbias, *([] if z is None else [dz])]

    return SimpleNamespace(fwd=fwd, bwd=bwd)


@pytest.mark.parametrize("without", [(), ("z", "D"), ("delta_bias",)])
@pytest.mark.parametrize("order", ["forward", "inter_slice"])
def test_adapter_to_mamba_ssm_hands_its_kernel_what_it_wants(monkeypatch, without, order):
    monkeypatch.setattr(mamba_ssm, "_kernel", _kernel_by_definition)
    torch.manual_seed(0)
    inputs = random_inputs(2, 5, 21, 3, without=without)
    grad = torch.randn(2, 5, 21)
    options = Options(True, order, 4)
    detached = {name: t.detach() for name, t in inputs.items()}
    arguments = ScanInputs(**{name: detached.get(name) for name in NAMES})
    y = mamba_ssm.forward(arguments, options, torch.empty(0))
    found = {"y": y, **mamba_ssm.backward(arguments, options, torch.empty(0), grad)}
    expected = definition(inputs, grad, order=order, nslices=4)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name
