"""What surrounds a scan in Mamba: causal convolution, projections, scan (Gu and Dao 2023, figure 3).

`mamba_mixer` is the composition as Mamba defines it. On the CPU, in float32, the operator
`srlib::fused_mixer` computes the same in the scan's own way: tokens are read and written where they lie
instead of in a permuted copy (measured: a permuted copy of input and output costs as much as the
convolution itself), and all between the input and the scan's states is computed again in the backward
pass instead of stored.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .choice import backends
from .inputs import Options, ScanInputs
from .operator import define, scan_backward_flops, scan_flops, selective_scan
from .orders import token_order

logger = logging.getLogger("srlib.scan")


def mamba_mixer(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: str = "forward",
    nslices: int = 1,
) -> Tensor:
    """Mamba's sequence mixing without gate, its sequence visited in `order`.

        u = silu(causal depthwise convolution of x);   dt, B, C = u x_proj
        y = selective_scan(u, dt dt_proj, A, B, C, D, delta_bias=dt_bias)

    Args:
        x: tokens (B, L, E) in memory order.
        conv_weight: (E, taps), the last tap for the token itself.
        conv_bias: (E,).
        x_proj: (R + 2 N, E), rows for the step size of rank R, for B and for C.
        dt_proj: (E, R).
        dt_bias: (E,).
        A: (E, N), negative.
        D: (E,).
        order: `forward`, `reverse` or `inter_slice` (see `token_order`).
        nslices: number of slices of the inter-slice order.

    Returns:
        y (B, L, E) in memory order.
    """
    weights = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    if x.device.type == "cpu" and x.dtype == torch.float32 and backends()["cpu"].available:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
        return fused_mixer(x, *weights, order, nslices, keep)[0]
    tokens = token_order(order, x.shape[1], nslices).to(x.device)
    visited = x[:, tokens].transpose(1, 2)  # (B, L, E) -> (B, E, L) in the order of visit
    u = _causal_conv()(visited, conv_weight, conv_bias)
    dt, B, C = F.linear(u.transpose(1, 2), x_proj).split(_sizes(dt_proj, A), dim=-1)
    delta = F.linear(dt, dt_proj)
    delta, B, C = (t.transpose(1, 2) for t in (delta, B, C))
    y = selective_scan(u, delta, A, B, C, D, delta_bias=dt_bias)
    return y.new_empty(x.shape).index_copy(1, tokens, y.transpose(1, 2))


def _sizes(dt_proj: Tensor, A: Tensor) -> list[int]:
    """Widths of what x_proj yields: R for the step size, N for B, N for C."""
    return [dt_proj.shape[1], A.shape[1], A.shape[1]]


@functools.cache
def _causal_conv() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Silu of the causal depthwise convolution: causal-conv1d's kernel, on CUDA where it is installed."""
    if torch.cuda.is_available():
        try:
            from causal_conv1d import causal_conv1d_fn

            return functools.partial(causal_conv1d_fn, activation="silu")
        except Exception as error:  # a build against another torch fails in many ways
            logger.info("causal convolution by torch: %s", error)
    return _torch_conv


def _torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, taps = weight.shape
    padded = F.pad(x, (taps - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=channels))


class _Parts:
    """What the fused mixer computes between its input and the scan; the scan's view is (B, E, L)."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], order: str, nslices: int) -> None:
        self.conv_weight, self.conv_bias, self.x_proj, self.dt_proj, dt_bias, A, D = weights
        self.options = Options(True, order, nslices)
        self.x = x.transpose(1, 2)
        self.u = cpu.causal_conv(self.x, self.conv_weight, self.conv_bias, self.options)
        rows = F.linear(self.u.transpose(1, 2), self.x_proj)  # (B, L, R + 2 N)
        self.dt, B, C = rows.split(_sizes(self.dt_proj, A), dim=-1)
        delta = F.linear(self.dt, self.dt_proj)
        delta, B, C = (t.transpose(1, 2) for t in (delta, B, C))
        self.inputs = ScanInputs(self.u, delta, A, B, C, D, None, dt_bias)


@define("fused_mixer")
def fused_mixer(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: str,
    nslices: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """`mamba_mixer` on the CPU in float32, and the states that its backward pass starts from."""
    weights = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    parts = _Parts(x, weights, order, nslices)
    states = x.new_empty(cpu.states_shape(parts.u, A) if keep_states else (0,))
    y = cpu.forward(parts.inputs, parts.options, states)
    return y.transpose_(1, 2), states  # in place: a view could not be added to


@define("fused_mixer_backward")
def fused_mixer_backward(
    grad: Tensor,
    states: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: str,
    nslices: int,
) -> list[Tensor]:
    """Gradients of the eight tensor arguments of `fused_mixer`, in their order."""
    weights = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    parts = _Parts(x, weights, order, nslices)
    scan = cpu.backward(parts.inputs, parts.options, states, grad.transpose(1, 2))
    d_delta, dB, dC = (scan[name].transpose(1, 2) for name in ("delta", "B", "C"))
    d_rows = torch.cat([d_delta @ dt_proj, dB, dC], dim=-1).flatten(0, 1)  # (B L, R + 2 N)
    d_dt_proj = d_delta.flatten(0, 1).T @ parts.dt.flatten(0, 1)
    d_x_proj = d_rows.T @ parts.u.transpose(1, 2).flatten(0, 1)
    d_u = scan["u"].transpose(1, 2)
    d_u.flatten(0, 1).addmm_(d_rows, x_proj)
    dx, d_weight, d_bias = cpu.causal_conv_backward(
        d_u.transpose(1, 2), parts.x, conv_weight, conv_bias, parts.options
    )
    projections = (d_x_proj, d_dt_proj, scan["delta_bias"])
    return [dx.transpose(1, 2), d_weight, d_bias, *projections, scan["A"], scan["D"]]


@torch.library.register_fake("srlib::fused_mixer")
def _fake(x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, order, nslices, keep_states):  # type: ignore[no-untyped-def]
    shape = cpu.states_shape(x.transpose(1, 2), A) if keep_states else (0,)
    return x.new_empty(x.shape), x.new_empty(shape)


@torch.library.register_fake("srlib::fused_mixer_backward")
def _backward_fake(grad, states, x, *rest):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in (x, *rest[:-2])]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, order, nslices, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.options = (order, nslices)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad, _):  # type: ignore[no-untyped-def]
    return *fused_mixer_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


torch.library.register_autograd("srlib::fused_mixer", _gradient, setup_context=_setup_context)


@register_flop_formula(fused_mixer)
def _flops(x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, *_, **__) -> int:  # type: ignore[no-untyped-def]
    """The scan's, and a product and a sum for each weight that a token's channel meets before it."""
    batch, length, width = x
    weights = conv_weight[1] + x_proj[0] + dt_proj[1]
    return 2 * batch * length * width * weights + scan_flops((batch, width, length), A, D=True)


@register_flop_formula(fused_mixer_backward)
def _backward_flops(
    grad, states, x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, *_, **__
) -> int:  # type: ignore[no-untyped-def]
    """The scan's, and three times the rest: computed again, then by its inputs and by its weights."""
    batch, length, width = x
    weights = conv_weight[1] + x_proj[0] + dt_proj[1]
    scan = scan_backward_flops((batch, width, length), A, D=True)
    return 6 * batch * length * width * weights + scan
