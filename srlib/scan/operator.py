"""The scan's back ends and the operator `srlib::selective_scan`; how an operator is made known to torch.

A scan is opaque to torch's tools, so they are told what they need: a fake kernel gives the shapes
(torch.compile, FakeTensorMode), an autograd formula calls the backward operator, a formula counts
flops. Which back end does the work is looked up inside the operator, where nothing is traced.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import chunked, cpu, mamba_ssm, triton
from .definition import compute_dtype, reference
from .inputs import Gradients, Options, ScanInputs, check_gradient, check_scan

logger = logging.getLogger("srlib.scan")

# --- Back ends ------------------------------------------------------------------------------------


class Backend(Protocol):
    """A back end: a module with these functions."""

    def unavailable(self) -> str:
        """The reason why it cannot run on this machine; empty where it can."""

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str:
        """The reason why it cannot take such tensors; empty where it can."""

    def states_shape(self, u: Tensor, A: Tensor) -> tuple[int, ...]:
        """Shape of what the forward pass keeps for the backward pass, for `u` (B, D, L) and `A` (D, N)."""

    def forward(self, inputs: ScanInputs, options: Options, states: Tensor) -> Tensor:
        """The scan's output (B, D, L); fills `states` unless it is empty."""

    def backward(
        self, inputs: ScanInputs, options: Options, states: Tensor, grad: Tensor
    ) -> Gradients:
        """Gradients of all inputs by name, from `grad` (B, D, L) and the states of the forward pass."""


WORKERS: dict[str, Backend] = {
    "chunked": chunked,
    "cpu": cpu,
    "mamba_ssm": mamba_ssm,
    "triton": triton,
}
# `auto` takes the first of a device's list that can run.
PREFERRED = {"cpu": ("cpu", "chunked"), "cuda": ("triton", "mamba_ssm", "chunked")}
PREFERRED_ELSEWHERE = ("chunked",)


class BackendState(NamedTuple):
    """State of a back end on this machine: it can run or, with a reason, it cannot."""

    available: bool
    reason: str


@functools.cache
def backends() -> dict[str, BackendState]:
    """The back ends by name with their state, found once: `reference`, then the operator's."""
    reasons = {name: worker.unavailable() for name, worker in WORKERS.items()}
    states = {name: BackendState(not reason, reason) for name, reason in reasons.items()}
    return {"reference": BackendState(True, ""), **states}


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The back end that does the work of `backend`, its name or `auto`, for tensors on `device`.

    Raises:
        ValueError: `backend` is no back end's name, or it cannot take such tensors.
        RuntimeError: it cannot run on this machine.
    """
    if backend == "auto":
        return WORKERS[_automatic(device.type, dtype)]
    if backend not in WORKERS:
        names = ", ".join(["auto", *backends()])
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    if not backends()[backend].available:
        raise RuntimeError(f"backend {backend!r} cannot run here: {backends()[backend].reason}")
    if reason := WORKERS[backend].refuses(device, dtype):
        raise ValueError(f"backend {backend!r}: {reason}")
    return WORKERS[backend]


@functools.cache
def _automatic(device: str, dtype: torch.dtype) -> str:
    for name in PREFERRED.get(device, PREFERRED_ELSEWHERE):
        reason = backends()[name].reason or WORKERS[name].refuses(torch.device(device), dtype)
        if not reason:
            logger.info("selective scan on %s, %s: %s", device, dtype, name)
            return name
        logger.info("selective scan on %s, %s: not %s (%s)", device, dtype, name, reason)
    raise AssertionError("chunked takes any tensor")


# --- Operators ------------------------------------------------------------------------------------


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


def _define(name: str, schema: str, function: Callable, fake: Callable) -> Any:
    """An operator that runs `function` on every device, and `fake` where there are shapes only.

    `torch.library.custom_op` does the same, but imports torch's compiler at the first call.
    """
    torch.library.define(name, schema)
    torch.library.impl(name, "default")(function)
    torch.library.register_fake(name)(fake)
    return functools.reduce(getattr, name.split("::"), torch.ops)


def register(
    name: str,
    schema: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., Sequence[Tensor]],
    *,
    like: Callable[[Tensor], Tensor] = torch.empty_like,
    output: Callable[..., Tensor] | None = None,
    states_shape: Callable[..., Sequence[int]] = lambda *_: (0,),
    check: Callable[..., None] = lambda *_: None,
    flops: Callable[..., tuple[int, int]] | None = None,
) -> Callable[..., Tensor]:
    """Make two functions the operator `srlib::<name>`, which can be differentiated once, and backwards.

    The operator takes one more argument, `keep_states`, and returns its output and the states that the backward pass
    starts from, empty unless they are to be kept. Its gradient is the operator `srlib::<name>_backward`.

    Args:
        name: of the operator.
        schema: its arguments, tensors first, of which the last may be a list.
        forward: takes the arguments and the room for states, which it fills unless it is empty; returns the output.
        backward: takes the output's gradient, the states and the arguments; returns the gradients of those tensors
            that are given, in their order.
        like: an empty tensor as another one's gradient comes out.
        output: an empty output, of the arguments; by default one `like` the first tensor.
        states_shape: of what is kept, of the arguments.
        check: raises an error for arguments that do not fit; called before the others.
        flops: those of both passes, of the arguments with shapes in place of tensors.

    Returns:
        A function of the arguments that calls the operator, keeps states where a gradient may be asked for, and
        returns the output.
    """
    operator, count = f"srlib::{name}", schema.count("Tensor")
    single = count - schema.count("Tensor[]")

    def flat(given: Sequence[Any]) -> list[Tensor | None]:
        return [*given[:single], *(t for listed in given[single:count] for t in listed)]

    def listed(tensors: list[Any]) -> list[Any]:
        return tensors if single == count else [*tensors[:single], tensors[single:]]

    def room(given: Sequence[Any], keep: bool) -> Tensor:
        shape = states_shape(*given) if keep else (0,)
        return given[0].new_empty(shape, dtype=compute_dtype(given[0].dtype))

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        *given, keep = arguments
        check(*given)
        states = room(given, keep)
        return forward(*given, states), states

    def fake(*arguments: Any) -> tuple[Tensor, Tensor]:
        *given, keep = arguments
        return output(*given) if output else like(given[0]), room(given, keep)

    def run_backward(grad: Tensor, states: Tensor, *given: Any) -> Sequence[Tensor]:
        check(*given)
        return backward(grad, states, *given)

    def fake_backward(grad: Tensor, states: Tensor, *given: Any) -> list[Tensor]:
        return [like(t) for t in flat(given) if t is not None]

    call = _define(operator, f"({schema}, bool keep_states) -> (Tensor, Tensor)", run, fake)
    call_backward = _define(
        f"{operator}_backward",
        f"(Tensor grad, Tensor states, {schema}) -> Tensor[]",
        run_backward,
        fake_backward,
    )

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        if not inputs[-1]:
            raise RuntimeError(f"{operator}: a gradient needs keep_states=True")
        ctx.save_for_backward(output[1], *flat(inputs))
        ctx.options = inputs[count:-1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # zeros as large as the states

    def gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        states, *tensors = ctx.saved_tensors
        found: Iterator[Tensor | None] = repeat(None)
        if grad is not None:
            found = iter(call_backward(grad, states, *listed(tensors), *ctx.options))
        gradients = [None if t is None else next(found) for t in tensors]
        return *listed(gradients), *[None for _ in ctx.options], None

    def twice(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"{operator} can be differentiated once only; the scan by backend='reference' more often"
        )

    differentiate = functools.partial(torch.library.register_autograd, lib=_LIBRARY)
    differentiate(operator, gradient, setup_context=setup_context)
    differentiate(f"{operator}_backward", twice)
    if flops:
        register_flop_formula(call)(lambda *shapes, **_: flops(*shapes)[0])
        register_flop_formula(call_backward)(lambda _, __, *shapes, **___: flops(*shapes)[1])

    def function(*given: Any) -> Tensor:
        wanted = any(t is not None and t.requires_grad for t in flat(given))
        return call(*given, torch.is_grad_enabled() and wanted)[0]

    return function


# --- The scan -------------------------------------------------------------------------------------


def _packed(*given: Any) -> tuple[Backend, ScanInputs, Options]:
    """The operator's arguments, with the back end itself for its name."""
    inputs, options = ScanInputs(*given[:8]), Options(*given[8:11])
    return choose(given[11], inputs.u.device, inputs.u.dtype), inputs, options


def _check(*given: Any) -> None:
    check_scan(ScanInputs(*given[:8]), Options(*given[8:11]))


def _states_shape(*given: Any) -> tuple[int, ...]:
    worker, inputs, _ = _packed(*given)
    return worker.states_shape(inputs.u, inputs.A)


def _forward(*given: Any) -> Tensor:
    worker, inputs, options = _packed(*given[:-1])
    with torch.autocast(inputs.u.device.type, enabled=False):  # decay and state stay in float32
        return worker.forward(inputs, options, given[-1])


def _backward(grad: Tensor, states: Tensor, *given: Any) -> list[Tensor]:
    worker, inputs, options = _packed(*given)
    check_gradient(grad, states, inputs.u, worker.states_shape(inputs.u, inputs.A))
    with torch.autocast(grad.device.type, enabled=False):
        gradients = worker.backward(inputs, options, states, grad)
    return [gradients[name] for name in inputs.given()]


def scan_flops(
    u: Sequence[int], A: Sequence[int], D: object = True, z: object = None
) -> tuple[int, int]:
    """Flops of a scan's forward and backward pass, softplus and silu not counted, from shapes.

    Per token, channel and state 7: dt A, its exp, three for h and two for y; backwards 21: these again and 14 for the
    adjoint recurrence. Per token and channel 1 for dt u, 2 for D u and 1 for the gate; backwards 4 for each.
    """
    pairs, direct, gate = math.prod(u), D is not None, z is not None
    return pairs * (7 * A[1] + 1 + 2 * direct + gate), pairs * (
        21 * A[1] + 4 + 4 * direct + 4 * gate
    )


def mixer_flops(
    x: Sequence[int],
    conv_weight: Sequence[int],
    x_proj: Sequence[int],
    dt_proj: Sequence[int],
    A: Sequence[int],
) -> tuple[int, int]:
    """Flops of a mixer's forward and backward pass, from shapes.

    To the scan's come a product and a sum for each token's channel and weight before it; backwards three times these:
    computed again, then by its inputs and by its weights.
    """
    products = math.prod(x) * (conv_weight[1] + x_proj[0] + dt_proj[1])
    forward, backward = scan_flops(x, A)
    return 2 * products + forward, 6 * products + backward


scan = register(
    "selective_scan",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, str order, SymInt nslices, str backend",
    _forward,
    _backward,
    states_shape=_states_shape,
    check=_check,
    flops=lambda u, _, A, B, C, D, z, *__: scan_flops(u, A, D, z),
)


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
    check_scan(inputs, options)
    if backend == "reference":
        return reference(*inputs, *options)
    return scan(*inputs, *options, backend)
