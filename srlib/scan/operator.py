"""The operator `srlib::selective_scan` as torch sees it: schema, gradient, shapes, flops.

A scan is opaque to torch's tools, so they are told what they need: a fake kernel gives the shapes
(torch.compile, FakeTensorMode), an autograd formula calls the backward operator, a formula counts
flops. Which back end does the work is looked up inside the operator, where nothing is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .choice import choose
from .inputs import Options, ScanInputs
from .reference import compute_dtype


def _room_for_states(worker: ModuleType, u: Tensor, A: Tensor, keep: bool) -> Tensor:
    """What `worker` keeps for the backward pass, not yet filled; empty unless `keep`."""
    shape = worker.states_shape(u, A) if keep else (0,)
    return u.new_empty(shape, dtype=compute_dtype(u.dtype))


def _define(function: Callable) -> Any:
    """Define and return `srlib::<function>`, which runs `function` on every device.

    What `torch.library.custom_op` does, without its import of torch's compiler at the first call.
    """
    name = f"srlib::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "default")(function)
    return getattr(torch.ops.srlib, function.__name__)


@_define
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    nslices: int,
    backend: str,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """The output (B, D, L) and, with `keep_states`, the states the backward pass starts from."""
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    worker = choose(backend, u.device, u.dtype)
    states = _room_for_states(worker, u, A, keep_states)
    with torch.autocast(u.device.type, enabled=False):  # decay and state stay in float32
        return worker.forward(inputs, Options(delta_softplus, order, nslices), states), states


@torch.library.register_fake("srlib::selective_scan")
def _scan_fake(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, nslices, backend, keep_states
):
    worker = choose(backend, u.device, u.dtype)
    return torch.empty_like(u), _room_for_states(worker, u, A, keep_states)


@_define
def selective_scan_backward(
    grad: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    nslices: int,
    backend: str,
) -> list[Tensor]:
    """Gradients of those of the eight tensor arguments that are given, in their order."""
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    worker = choose(backend, u.device, u.dtype)
    with torch.autocast(u.device.type, enabled=False):
        gradients = worker.backward(inputs, Options(delta_softplus, order, nslices), states, grad)
    return [gradients[name] for name in inputs.given()]


@torch.library.register_fake("srlib::selective_scan_backward")
def _scan_backward_fake(  # type: ignore[no-untyped-def]
    grad, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, nslices, backend
):
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    return [torch.empty_like(t) for t in inputs.given().values()]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, delta_softplus, order, nslices, backend, keep_states = inputs
    if not keep_states:
        raise RuntimeError("srlib::selective_scan: a gradient needs keep_states=True")
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (delta_softplus, order, nslices, backend)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad, _states_grad):  # type: ignore[no-untyped-def]
    *tensors, states = ctx.saved_tensors
    gradients = iter(selective_scan_backward(grad, states, *tensors, *ctx.options))
    per_tensor = [None if t is None else next(gradients) for t in tensors]
    return (*per_tensor, *[None] * 5)


torch.library.register_autograd("srlib::selective_scan", _gradient, setup_context=_setup_context)


def _flops(u: list[int], states: int, per_state: int, given: int) -> int:
    batch, channels, length = u
    return batch * channels * length * (per_state * states + given)


@register_flop_formula(selective_scan)
def _scan_flops(u, delta, A, B, C, D, z, *_, **__) -> int:  # type: ignore[no-untyped-def]
    """Per token, channel and state 7: dt A, its exp, three for h and two for y.

    Per token and channel: dt u, D u (2) and the gate (1). softplus and silu are not counted.
    """
    return _flops(u, A[1], 7, 1 + 2 * (D is not None) + (z is not None))


@register_flop_formula(selective_scan_backward)
def _scan_backward_flops(  # type: ignore[no-untyped-def]
    grad, states, u, delta, A, B, C, D, z, *_, **__
) -> int:
    """Per token, channel and state 21: the forward pass again (7), the adjoint recurrence (14)."""
    return _flops(u, A[1], 21, 4 + 4 * (D is not None) + 4 * (z is not None))
