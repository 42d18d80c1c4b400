"""The scan among torch's tools, and in threads and processes."""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
from functools import partial

import pytest
import torch
from scan_inputs import random_inputs, relative_error
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from srlib.scan import backends, cpu, mamba_mixer, operator, selective_scan

BACKENDS = ["chunked", *(["cpu"] if backends()["cpu"].available else [])]
NEEDS_NUMBA = pytest.mark.skipif(
    not backends()["cpu"].available, reason=f"the cpu back end: {backends()['cpu'].reason}"
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_torchs_contract(backend):
    torch.manual_seed(0)
    inputs = random_inputs(2, 5, 19, 3, channels_last=False)
    options = (True, "inter_slice", 4, backend)
    torch.library.opcheck(torch.ops.srlib.selective_scan, (*inputs.values(), *options, True))
    y, states = torch.ops.srlib.selective_scan(*inputs.values(), *options, True)
    tensors = [t.detach() for t in inputs.values()]
    torch.library.opcheck(
        torch.ops.srlib.selective_scan_backward, (torch.randn_like(y), states, *tensors, *options)
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_leaves_the_scan_in_float32(backend):
    torch.manual_seed(0)
    inputs = random_inputs(2, 5, 19, 3)
    inputs["delta"] = inputs["delta"].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(**inputs, backend=backend)
        y.sum().backward()
    inputs["delta"] = inputs["delta"].float()
    expected = selective_scan(**inputs, backend="reference")
    assert y.dtype == torch.float32
    assert relative_error(y, expected) < 1e-6


def functions_of_one_tensor():
    """Scans and mixers as functions of each of their tensors: (function, tensor), by name."""
    torch.manual_seed(0)
    scan_inputs = {name: t.detach() for name, t in random_inputs(1, 4, 9, 2).items()}
    shapes = [(1, 9, 4), (4, 3), (4,), (6, 4), (4, 2), (4,), (4, 2), (4,)]
    weights = ["x", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D"]
    mixer_inputs = {name: -torch.rand(shape) for name, shape in zip(weights, shapes, strict=True)}
    doubles = {name: t.double() for name, t in mixer_inputs.items()}
    calls = {
        **{name: (partial(selective_scan, backend=name), scan_inputs) for name in BACKENDS},
        "fused mixer": (mamba_mixer, mixer_inputs),
        "composed mixer": (mamba_mixer, doubles),
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
    inputs = random_inputs(2, 5, 19, 3)

    def loss(inputs):
        return selective_scan(**inputs, order="reverse").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(inputs), list(inputs.values()))
    expected = torch.autograd.grad(loss(inputs), list(inputs.values()))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-6


def test_fake_tensors_have_the_shapes_of_real_ones():
    with torch._subclasses.FakeTensorMode():
        inputs = random_inputs(2, 96, 4096, 16)
        y = selective_scan(**inputs)
        found = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert y.shape == (2, 96, 4096)
    assert y.stride() == inputs["u"].stride()
    assert [t.shape for t in found] == [t.shape for t in inputs.values()]


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
    inputs = random_inputs(1, 20, 90, 5)
    plain = torch.autograd.grad(selective_scan(**inputs).sum(), list(inputs.values()))
    y = checkpoint(lambda given: selective_scan(**given), inputs, use_reentrant=False)
    again = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_tokens_by_channels_by_states_is_kept(backend):
    channels, length, states = 32, 40_000, 16
    inputs = random_inputs(1, channels, length, states)
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(**inputs, backend=backend)
    extra = sum(kept.values()) - sum(t.numel() for t in inputs.values())
    assert extra <= channels * length * states / 16


def test_a_gradient_is_only_prepared_for_when_asked_for():
    inputs = {name: t.detach() for name, t in random_inputs(1, 20, 90, 5).items()}
    assert not selective_scan(**inputs).requires_grad
    options = (True, "forward", 1, "auto")
    assert torch.ops.srlib.selective_scan(*inputs.values(), *options, False)[1].numel() == 0


@pytest.fixture(params=["torch's threads", "a pool"])
def team(request, monkeypatch):
    """Both places where tasks can run; a torch without GNU's OpenMP has only the second."""
    if request.param == "a pool":
        monkeypatch.setattr(cpu, "_gnu_openmp", lambda: None)
    elif cpu._gnu_openmp() is None:
        pytest.skip("this torch comes without GNU's OpenMP")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@NEEDS_NUMBA
def test_torchs_number_of_threads_is_kept_to(monkeypatch, team):
    used, run = set(), cpu.on_threads

    def watched(task, shares):
        def work(*share):
            used.add(threading.get_ident())
            time.sleep(0.01)  # time for others to take a share
            task(*share)

        run(work, shares)

    monkeypatch.setattr(cpu, "on_threads", watched)
    inputs = random_inputs(1, 64, 90, 5)
    results = {}
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        used.clear()
        y = selective_scan(**inputs, backend="cpu")
        results[number] = torch.autograd.grad(y.sum(), list(inputs.values()))
        assert len(used) == number
    for number in (2, 3):
        for a, b in zip(results[number], results[1], strict=True):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_thread_raises_reaches_the_caller(error, team):
    torch.set_num_threads(2)
    done = []

    def task(share):
        if share == 1:
            raise error("in a thread")
        done.append(share)

    with pytest.raises(error, match="in a thread"):
        cpu.on_threads(task, [(share,) for share in range(3)])
    assert done == [0, 2]


class ScannedSamples(Dataset):
    """Samples that are scanned where they are made, on two threads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> torch.Tensor:
        torch.set_num_threads(2)
        torch.manual_seed(item)
        inputs = random_inputs(1, 48, 70, 4)
        return torch.autograd.grad(selective_scan(**inputs).sum(), inputs["u"])[0]


@NEEDS_NUMBA
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_scan_after_their_parent_has_scanned(start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start} processes")
    if start == "fork" and torch.version.cuda:
        pytest.skip("PyTorch built for CUDA refuses gradients in a forked process")
    before = torch.get_num_threads()
    samples = ScannedSamples()
    try:
        expected = [samples[0], samples[1]]
    finally:
        torch.set_num_threads(before)
    loader = DataLoader(samples, batch_size=None, num_workers=1, multiprocessing_context=start)
    for found, value in zip(loader, expected, strict=True):
        assert torch.equal(found, value)


def test_states_are_kept_every_64_tokens_or_less_often():
    u, A = torch.empty(2, 96, 1000), torch.empty(96, 16)
    for backend in BACKENDS:
        worker = operator.choose(backend, u.device, u.dtype)
        assert math.prod(worker.states_shape(u, A)) <= u.numel() * 16 / 64 + 2 * 2 * 96 * 16
