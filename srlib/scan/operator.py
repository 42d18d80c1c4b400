"""The operator `srlib::selective_scan` as torch sees it: schema, gradient, shapes, flops.

A scan is opaque to torch's tools, so they are told what they need: a fake kernel gives the shapes
(torch.compile, FakeTensorMode), an autograd formula calls the backward operator, a formula counts
flops. Which back end does the work is looked up inside the operator, where nothing is traced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .choice import choose
from .definition import compute_dtype, reference
from .inputs import Options, ScanInputs, check_gradient


def _room_for_states(worker: ModuleType, u: Tensor, A: Tensor, keep: bool) -> Tensor:
    """What `worker` keeps for the backward pass, not yet filled; empty unless `keep`."""
    shape = worker.states_shape(u, A) if keep else (0,)
    return u.new_empty(shape, dtype=compute_dtype(u.dtype))


def define(name: str) -> Callable[[Callable], Any]:
    """Make a function the operator `srlib::<name>`, which runs it on every device.

    What `torch.library.custom_op` does, without its import of torch's compiler at the first call.
    """

    def operator(function: Callable) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"srlib::{name}", schema)
        torch.library.impl(f"srlib::{name}", "default")(function)
        return getattr(torch.ops.srlib, name)

    return operator


class _Library(torch.library.Library):
    """Where gradients are registered: with each goes the refusal of forward mode, which has no formula.

    Unless an input wants a gradient torch calls no formula at all, and would lose the tangents without a word.
    """

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options: Any) -> None:
        def without_tangents(keyset: Any, *arguments: Any, **keywords: Any) -> Any:
            given = (*arguments, *keywords.values())
            listed = [t for each in given if isinstance(each, (list, tuple)) for t in each]
            tensors = [t for t in (*given, *listed) if isinstance(t, Tensor)]
            if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
                raise NotImplementedError(
                    f"srlib::{op_name} has no forward mode: differentiate it backwards, "
                    "or the scan by backend='reference'"
                )
            return fn(keyset, *arguments, **keywords)

        super().impl(op_name, without_tangents, dispatch_key, **options)


_LIBRARY = _Library("srlib", "FRAGMENT")


def register_gradient(name: str, gradient: Callable, setup_context: Callable | None = None) -> None:
    """Make `gradient` the formula of the operator `srlib::<name>`, and forbid the formula's own gradient."""

    def twice(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"srlib::{name} can be differentiated once only; the scan by backend='reference' more often"
        )

    register = functools.partial(torch.library.register_autograd, lib=_LIBRARY)
    register(f"srlib::{name}", gradient, setup_context=setup_context)
    register(f"srlib::{name}_backward", twice)


@define("selective_scan")
def scan(
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
    inputs, options = (
        ScanInputs(u, delta, A, B, C, D, z, delta_bias),
        Options(delta_softplus, order, nslices),
    )
    inputs.check()
    options.check()
    worker = choose(backend, u.device, u.dtype)
    states = _room_for_states(worker, u, A, keep_states)
    with torch.autocast(u.device.type, enabled=False):  # decay and state stay in float32
        return worker.forward(inputs, options, states), states


@torch.library.register_fake("srlib::selective_scan")
def _scan_fake(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, nslices, backend, keep_states
):
    worker = choose(backend, u.device, u.dtype)
    return torch.empty_like(u), _room_for_states(worker, u, A, keep_states)


@define("selective_scan_backward")
def scan_backward(
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
    inputs, options = (
        ScanInputs(u, delta, A, B, C, D, z, delta_bias),
        Options(delta_softplus, order, nslices),
    )
    inputs.check()
    options.check()
    worker = choose(backend, u.device, u.dtype)
    check_gradient(grad, states, u, worker.states_shape(u, A))
    with torch.autocast(u.device.type, enabled=False):
        gradients = worker.backward(inputs, options, states, grad)
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
    gradients = iter(scan_backward(grad, states, *tensors, *ctx.options))
    per_tensor = [None if t is None else next(gradients) for t in tensors]
    return (*per_tensor, *[None] * 5)


register_gradient("selective_scan", _gradient, _setup_context)


def scan_flops(u: Sequence[int], A: Sequence[int], D: bool, z: bool = False) -> int:
    """Per token, channel and state 7: dt A, its exp, three for h and two for y.

    Per token and channel: dt u, D u (2) and the gate (1). softplus and silu are not counted.
    """
    return math.prod(u) * (7 * A[1] + 1 + 2 * D + z)


def scan_backward_flops(u: Sequence[int], A: Sequence[int], D: bool, z: bool = False) -> int:
    """Per token, channel and state 21: the forward pass again (7), the adjoint recurrence (14)."""
    return math.prod(u) * (21 * A[1] + 4 + 4 * D + 4 * z)


@register_flop_formula(scan)
def _flops(u, delta, A, B, C, D, z, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return scan_flops(u, A, D is not None, z is not None)


@register_flop_formula(scan_backward)
def _backward_flops(grad, states, u, delta, A, B, C, D, z, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return scan_backward_flops(u, A, D is not None, z is not None)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    backend: str = "auto",
    *,
    order: str = "forward",
    nslices: int = 1,
) -> Tensor:
    """Selective scan of batch B, channels D, tokens L, states N, with shapes as in mamba-ssm.

    With `dt = softplus(delta + delta_bias)`, per channel d and state n, from h = 0:

        h[t, d, n] = exp(dt[t, d] A[d, n]) h[t-1, d, n] + dt[t, d] B[t, n] u[t, d]
        y[t, d]    = (sum_n C[t, n] h[t, d, n] + D[d] u[t, d]) silu(z[t, d])

    float32 and float64 are computed as they are, float16 and bfloat16 in float32. Tensors may be
    strided; transposed views of (B, L, D) memory are the fast layout on the CPU. Under autocast,
    sequences of different types are raised to the widest of them. Only `reference` can be
    differentiated twice or in forward mode; the others raise NotImplementedError.

    Gradients have their tensor's dtype. What is beyond float16 becomes infinite there, as in all of
    torch, and as a gradient scaler expects; sums over many tokens (those of A, D and delta_bias) are
    kept when these tensors are float32, which float16 sequences allow.

    Args:
        u: input (B, D, L), real floating point.
        delta: step sizes (B, D, L), before the bias and softplus.
        A: decay rates (D, N), negative for a stable scan.
        B: input weights (B, N, L).
        C: output weights (B, N, L).
        D: weight (D,) of a direct path from input to output; none when None.
        z: gate (B, D, L); none when None.
        delta_bias: added to delta (D,) before softplus; none when None.
        delta_softplus: pass the step sizes through softplus.
        backend: `auto` for the fastest that can run here, or a name of `backends()`.
        order: in which the tokens are visited: `forward`, `reverse` or `inter_slice` (see
            `token_order`).
        nslices: number of slices of the inter-slice order.

    Returns:
        y (B, D, L) of u's dtype and memory layout.

    Raises:
        ValueError: shapes, dtypes or devices do not fit (the message names the argument), an
            unknown back end or order, or a back end that cannot take such tensors.
        RuntimeError: a back end that cannot run on this machine, with the reason.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    if torch.is_autocast_enabled(u.device.type):
        inputs = inputs.widened()
    options = Options(delta_softplus, order, nslices)
    inputs.check()
    options.check()
    if backend == "reference":
        return reference(*inputs, *options)
    keep_states = torch.is_grad_enabled() and any(t.requires_grad for t in inputs.given().values())
    return scan(*inputs, *options, backend, keep_states)[0]
