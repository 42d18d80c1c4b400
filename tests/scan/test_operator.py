"""The selective scan: its values and gradients, what it accepts, its back ends, and how torch's tools see it."""

from __future__ import annotations

import logging
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scan_inputs import (
    NAMES,
    assert_close,
    definition,
    detached,
    doubles,
    mixed,
    random_inputs,
    random_mixer,
    relative_error,
    with_gradients,
)  # fmt: skip
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from srlib.files import ROOT
from srlib.scan import ORDERS, backends, mamba_ssm, operator, selective_scan
from srlib.scan.inputs import Options, ScanInputs

# Triton's kernels have tests of their own: without a GPU, its interpreter is too slow for a sweep.
BY_HAND = ["chunked", *(["cpu"] if backends()["cpu"].available else [])]  # gradients are
BACKENDS = ["reference", *BY_HAND]
scan, scan_backward = torch.ops.srlib.selective_scan, torch.ops.srlib.selective_scan_backward


def gradients(inputs: dict, grad: torch.Tensor, **options) -> dict:
    """Output and gradients by name."""
    return with_gradients(partial(selective_scan, **options), inputs, grad)


# --- Values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_the_oracles(backend):
    oracle = {
        k: torch.tensor(v) for k, v in np.load(ROOT / "tests/oracles/selective_scan.npz").items()
    }
    found = gradients({name: oracle[name] for name in NAMES}, oracle["dy"], backend=backend)
    assert_close(found, {"y": oracle["y"], **{n: oracle[f"grad_{n}"] for n in NAMES}}, 1e-9)


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
    sizes = batch, channels, length, states
    inputs = random_inputs(*sizes, without=tuple(without), channels_last=channels_last)
    if not softplus:  # negative steps would make the states grow without bounds
        inputs["delta"] = inputs["delta"].detach().abs().add(3.0)
    options = {"delta_softplus": softplus, "order": order, "nslices": nslices}
    grad = torch.randn(batch, channels, length)
    found = gradients(inputs, grad, **options, backend=backend)
    assert found["y"].stride() == torch.empty_like(inputs["u"]).stride()
    # The gradient of a few numbers is a sum over all tokens that may nearly cancel, but not its rounding.
    bound = 1e-5 if channels * states >= 8 else 1e-4
    assert_close(found, definition(inputs, grad, **options), bound)


@pytest.mark.parametrize("backend", BY_HAND)
def test_strided_and_expanded_inputs(backend):
    torch.manual_seed(0)
    rows = torch.randn(2, 70, 100)  # as a projection's output, of which the scan sees slices
    u, delta, B, C = (t.mT for t in rows.split([33, 33, 17, 17], dim=-1))
    inputs = {"u": u, "delta": delta, "A": -torch.rand(33, 1).expand(33, 17), "B": B, "C": C}
    grad = torch.randn(1, 1, 1).expand(2, 33, 70)
    assert_close(gradients(inputs, grad, backend=backend), definition(inputs, grad), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    torch.manual_seed(0)
    inputs, grad = random_inputs(2, 5, 70, 3, dtype=dtype), torch.randn(2, 5, 70).to(dtype)
    found = gradients(inputs, grad, backend=backend)
    assert {t.dtype for t in found.values()} == {dtype}
    wide = {name: t.float() for name, t in inputs.items()}
    assert_close(found, gradients(wide, grad, backend="reference"), torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_comes_out_where_the_definition_says(backend, value, name):
    torch.manual_seed(0)
    inputs = detached(random_inputs(1, 20, 90, 5))
    inputs[name][tuple(size // 2 for size in inputs[name].shape)] = value
    y = selective_scan(**inputs, backend=backend)
    expected = selective_scan(**inputs, backend="reference")
    assert torch.equal(y.isfinite(), expected.isfinite())
    if math.isnan(value):
        assert y.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_steps_and_very_negative_decay_rates_stay_finite(backend):
    torch.manual_seed(0)
    inputs = detached(random_inputs(1, 20, 90, 5))
    inputs["delta"][:, :, ::3] = 1e4
    inputs["delta"][:, :, 1::3] = -1e4
    inputs["A"][::2] = -1e5
    inputs["z"][:, :, ::4] = -1e4
    grad = torch.randn(1, 20, 90)
    found = gradients(inputs, grad, backend=backend)
    assert all(t.isfinite().all() for t in found.values())
    assert_close(found, definition(inputs, grad), 1e-5)


@pytest.mark.parametrize("backend", BY_HAND)
def test_what_is_beyond_float16_becomes_infinite_and_float32_parameters_keep_it(backend):
    sequences = {"u": 30.0, "delta": -2.0, "B": 30.0, "C": -3.0}
    for dtype, finite in ((torch.float16, False), (torch.float32, True)):
        inputs = {k: torch.full((1, 2, 300), v).half() for k, v in sequences.items()}
        inputs["A"] = torch.full((2, 2), -0.05, dtype=dtype)
        dA = gradients(inputs, torch.ones(1, 2, 300), backend=backend)["A"]
        assert dA.dtype == dtype
        assert dA.isfinite().all() == finite
        assert (dA < -65504).all()


@pytest.mark.parametrize("backend", BY_HAND)
def test_same_threads_same_bits(backend):
    torch.manual_seed(0)
    inputs, grad = random_inputs(3, 48, 300, 16), torch.randn(3, 48, 300)
    first, *others = (gradients(inputs, grad, backend=backend) for _ in range(6))
    assert all(torch.equal(first[name], again[name]) for again in others for name in first)


# --- What it accepts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("delta", torch.zeros(1, 4, 8), r"shape \(B, D, L\) = \(1, 4, 9\), .*got \(1, 4, 8\)"),
        ("A", torch.zeros(3, 2), r"shape \(D, N\) = \(4, 2\), .*got \(3, 2\)"),
        ("B", torch.zeros(1, 4, 9), r"shape \(B, N, L\) = \(1, 2, 9\), .*got \(1, 4, 9\)"),
        ("z", torch.zeros(9), r"shape \(B, D, L\) = \(1, 4, 9\), .*got \(9,\)"),
        ("delta_bias", torch.zeros(5), r"shape \(D\) = \(4\), .*got \(5,\)"),
        ("u", torch.zeros(1, 4, 0), r"shape \(B, D, L\) = \(1, 4, 0\), none of them 0"),
        ("u", torch.zeros(1, 4, 9).long(), "a dense tensor of 16, 32 or 64 bit floats, got torch.int64"),
        ("C", torch.zeros(1, 2, 9).double(), "torch.float32 as u is, got"),
        ("D", torch.zeros(4, device="meta"), "on cpu as u is, got meta"),
        ("order", "sideways", "one of forward, reverse, inter_slice"),
        ("nslices", 0, "at least 1"),
        ("backend", "abacus", "one of auto, reference, chunked"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(name, value, message):
    with pytest.raises(ValueError, match=f"{name}: expected {message}"):
        selective_scan(**{**random_inputs(1, 4, 9, 2), name: value})


@pytest.mark.parametrize("backend", BY_HAND)
def test_the_operators_themselves_take_nothing_that_does_not_fit(backend):
    inputs = detached(random_inputs(1, 4, 9, 2))
    options = (True, "forward", 1, backend)
    y, states = scan(*inputs.values(), *options, True)
    for name in inputs:
        short = {**inputs, name: inputs[name][..., :-1]}
        with pytest.raises(ValueError, match="expected shape"):
            scan(*short.values(), *options, True)
        with pytest.raises(ValueError, match="expected"):
            scan_backward(y, states, *short.values(), *options)
    for grad, kept, name in (
        *((y[..., :-1], states, "grad"), (y.double(), states, "grad")),
        *((y, states[:, :-1], "states"), (y, states.double(), "states"), (y, states[:0], "states")),
        (y, torch.stack([states, states], -1)[..., 0], "states"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            scan_backward(grad, kept, *inputs.values(), *options)


# --- Back ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "error", "message"),
    [
        ("no kernel here", RuntimeError, "'mamba_ssm' cannot run here: no kernel here"),
        ("", ValueError, "mamba_ssm needs CUDA tensors, got cpu"),
    ],
)
def test_a_back_end_that_cannot_run_says_why(monkeypatch, reason, error, message):
    monkeypatch.setattr(mamba_ssm, "unavailable", lambda: reason)
    backends.cache_clear()
    try:
        assert backends()["mamba_ssm"] == (not reason, reason)
        with pytest.raises(error, match=message):
            selective_scan(**random_inputs(1, 4, 9, 2), backend="mamba_ssm")
    finally:
        backends.cache_clear()


def test_the_automatic_choice_is_logged_once(caplog):
    operator._automatic.cache_clear()
    inputs = random_inputs(1, 4, 9, 2)
    with caplog.at_level(logging.INFO, logger="srlib.scan"):
        selective_scan(**inputs)
        selective_scan(**inputs)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[-1] == f"selective scan on cpu, torch.float32: {BY_HAND[-1]}"
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
        *by, dz, dbias = (None if t is None else next(found) for t in tensors)
        return [*by, dbias, *([] if z is None else [dz])]

    return SimpleNamespace(fwd=fwd, bwd=bwd)


@pytest.mark.parametrize("without", [(), ("z", "D"), ("delta_bias",)])
@pytest.mark.parametrize("order", ["forward", "inter_slice"])
def test_adapter_to_mamba_ssm_hands_its_kernel_what_it_wants(monkeypatch, without, order):
    monkeypatch.setattr(mamba_ssm, "_kernel", _kernel_by_definition)
    torch.manual_seed(0)
    inputs, grad = random_inputs(2, 5, 21, 3, without=without), torch.randn(2, 5, 21)
    arguments = ScanInputs(**{name: detached(inputs).get(name) for name in NAMES})
    given = arguments, Options(True, order, 4), torch.empty(0)
    found = {"y": mamba_ssm.forward(*given), **mamba_ssm.backward(*given, grad)}
    assert_close(found, definition(inputs, grad, order=order, nslices=4), 1e-5)


# --- Among torch's tools --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BY_HAND)
def test_operators_keep_torchs_contract(backend):
    torch.manual_seed(0)
    inputs = random_inputs(2, 5, 19, 3, channels_last=False)
    options = (True, "inter_slice", 4, backend)
    torch.library.opcheck(scan, (*inputs.values(), *options, True))
    y, states = scan(*inputs.values(), *options, True)
    given = (torch.randn_like(y), states, *detached(inputs).values(), *options)
    torch.library.opcheck(scan_backward, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_scan_in_float32(backend):
    torch.manual_seed(0)
    inputs = random_inputs(2, 5, 19, 3)
    inputs["delta"] = inputs["delta"].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(**inputs, backend=backend)
        y.sum().backward()
    inputs["delta"] = inputs["delta"].float()
    assert y.dtype == torch.float32
    assert relative_error(y, selective_scan(**inputs, backend="reference")) < 1e-6


def functions_of_one_tensor():
    """Scans and mixers as functions of each of their tensors: (function, tensor), by name."""
    torch.manual_seed(0)
    scans = detached(random_inputs(1, 4, 9, 2))
    mixers = detached(random_mixer(1, 9, 4, 2, 2, 3))
    calls = {
        **{name: (partial(selective_scan, backend=name), scans) for name in BY_HAND},
        "fused mixer": (mixed, mixers),
        "composed mixer": (mixed, doubles(mixers)),
    }
    for label, (call, inputs) in calls.items():
        for name, tensor in inputs.items():
            others = {key: t for key, t in inputs.items() if key != name}
            yield pytest.param(
                lambda t, call=call, name=name, others=others: call(**others, **{name: t}),
                *(tensor,),
                id=f"{label} {name}",
            )


@pytest.mark.parametrize(("function", "tensor"), list(functions_of_one_tensor()))
def test_derivatives_without_a_formula_are_refused(function, tensor):
    with pytest.raises(NotImplementedError, match="no forward mode"):
        torch.func.jvp(function, (tensor,), (tensor,))
    for wants_gradient in (False, True):
        primal = tensor.clone().requires_grad_(wants_gradient)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward mode"):
            function(forward_ad.make_dual(primal, tensor))
    tensor = tensor.clone().requires_grad_()
    (once,) = torch.autograd.grad(function(tensor).square().sum(), tensor, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once only"):
        torch.autograd.grad(once.square().sum(), tensor)


def test_the_reference_is_differentiated_twice_and_forwards():
    inputs = tuple(t.detach().double().requires_grad_() for t in random_inputs(1, 2, 3, 2).values())
    function = partial(selective_scan, backend="reference")
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    inputs, grad = random_inputs(2, 5, 19, 3), torch.ones(())

    def loss(**inputs):
        return selective_scan(**inputs, order="reverse").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(with_gradients(compiled, inputs, grad), with_gradients(loss, inputs, grad), 1e-6)


def test_fake_tensors_have_the_shapes_of_real_ones():
    with torch._subclasses.FakeTensorMode():
        inputs = random_inputs(2, 96, 4096, 16)
        found = gradients(inputs, torch.ones(2, 96, 4096))
    assert found["y"].stride() == inputs["u"].stride()
    assert {name: t.shape for name, t in found.items()} == {
        "y": (2, 96, 4096), **{name: t.shape for name, t in inputs.items()}
    }  # fmt: skip


@pytest.mark.parametrize("without", [(), ("D", "z")])
def test_flops_are_counted_by_the_formula(without):
    inputs = random_inputs(2, 5, 19, 3, without=without)
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**inputs)
        forward = counter.get_total_flops()
        y.sum().backward()
    optional = 0 if without else 1
    tokens = 2 * 5 * 19
    assert forward == tokens * (7 * 3 + 1 + 3 * optional)
    assert counter.get_total_flops() - forward == tokens * (21 * 3 + 4 + 8 * optional)


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    inputs, grad = random_inputs(1, 20, 90, 5), torch.ones(1, 20, 90)
    again = with_gradients(partial(checkpoint, selective_scan, use_reentrant=False), inputs, grad)
    assert all(torch.equal(t, again[name]) for name, t in gradients(inputs, grad).items())


def kept(function, inputs: dict[str, torch.Tensor]) -> int:
    """Elements that autograd keeps of `function(**inputs)` beyond the inputs."""
    elements = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        elements[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(**inputs)
    return sum(elements.values()) - sum(t.numel() for t in inputs.values())


@pytest.mark.parametrize("backend", BY_HAND)
def test_nothing_of_tokens_by_channels_by_states_is_kept(backend):
    inputs = random_inputs(1, 32, 40_000, 16)
    assert kept(partial(selective_scan, backend=backend), inputs) <= 40_000 * 32 * 16 / 16


@pytest.mark.skipif("cpu" not in BY_HAND, reason=backends()["cpu"].reason)
def test_the_fused_mixer_keeps_its_input_and_states_only():
    inputs = random_mixer(1, 20_000, 32)
    assert kept(mixed, inputs) == 16 * 32 * (math.ceil(20_000 / 64) + 1)


def test_states_are_kept_every_64_tokens_or_less_often():
    u, A = torch.empty(2, 96, 1000), torch.empty(96, 16)
    for backend in BY_HAND:
        worker = operator.choose(backend, u.device, u.dtype)
        assert math.prod(worker.states_shape(u, A)) <= u.numel() * 16 / 64 + 2 * 2 * 96 * 16


def test_a_gradient_is_only_prepared_for_when_asked_for():
    inputs = detached(random_inputs(1, 20, 90, 5))
    assert not selective_scan(**inputs).requires_grad
    assert scan(*inputs.values(), True, "forward", 1, "auto", False)[1].numel() == 0
