"""The parts of Mamba around a scan: causal convolution, projections, scan, gate (Gu and Dao 2023, figure 3).

`mamba_mixer` is the composition as Mamba defines it, `mamba_mixers` the sum of several over the same tokens. On a
GPU `triton_mixer.py` computes the sum. On the CPU, in float32, the operator `srlib::fused_mixer` computes one in the
scan's own way. It goes along the order of visit in stretches whose inner tensors stay in the cache: tokens are read
and written where they lie, so that no permuted copy is made, and between its input and the states nothing of the
sequence's length is ever stored - a stretch is computed again in the backward pass. Elsewhere the composition as a
whole is computed again, so that there, too, only x is kept.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, triton_mixer
from .definition import token_order
from .inputs import ScanInputs, check_gradient, check_mixer
from .operator import backends, choose, mixer_flops, register, selective_scan
from .recompute import Recompute, recomputed

STRETCH = 2**19  # elements of an inner tensor, 2 MiB; about seven are in use

logger = logging.getLogger("srlib.scan")


class Weights(NamedTuple):
    """The weights of a mixer of inner width E, rank R and N states."""

    conv_weight: Tensor  # (E, taps), the last tap for the token itself
    conv_bias: Tensor  # (E,)
    x_proj: Tensor  # (R + 2 N, E), rows for the step size of rank R, for B and for C
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A: Tensor  # (E, N), negative
    D: Tensor  # (E,)


def mamba_mixer(
    x: Tensor,
    weights: Weights,
    order: str = "forward",
    nslices: int = 1,
    recompute: Recompute = "auto",
    fused: bool | None = None,
) -> Tensor:
    """Mamba's sequence mixing without gate, its sequence visited in `order`.

        u = silu(causal depthwise convolution of x);   dt, B, C = u x_proj
        y = selective_scan(u, dt dt_proj, A, B, C, D, delta_bias=dt_bias)

    Args:
        x: tokens (B, L, E) in memory order.
        weights: of the convolution, the projections and the scan.
        order: `forward`, `reverse` or `inter_slice` (see `token_order`).
        nslices: number of slices of the inter-slice order.
        recompute: of the composition; it keeps x alone then (`recomputed`).
        fused: the fused operator or the composition; `None` takes the former where it can run.

    Returns:
        y (B, L, E) in memory order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit (the message names the argument), an unknown order, or
            `fused` for tensors that the fused operator does not take.
        RuntimeError: `fused` where the fused operator cannot run.
    """
    check_mixer((x, *weights), order, nslices)
    if fused is not False and in_triton(x):
        return mamba_mixers(x, [weights], [order], nslices)
    if fused is None:
        fused = backends()["cpu"].available and not _refuses(x, weights.conv_weight)
    if fused:
        return fused_mixer(x, *weights, order, nslices)
    compose = functools.partial(_composed, weights, order, nslices)
    return recomputed(x, compose, recompute=recompute)


def mamba_mixers(
    x: Tensor,
    weights: Sequence[Weights],
    orders: Sequence[str],
    nslices: int,
    recompute: Recompute = "auto",
    fused: bool | None = None,
) -> Tensor:
    """The sum of `mamba_mixer` over `orders`, each with weights of its own: tokens x (B, L, E) -> (B, L, E)."""
    if fused is not False and in_triton(x):
        by_kind = [t for kind in zip(*weights, strict=True) for t in kind]
        return triton_mixer.mixers(x, by_kind, ",".join(orders), nslices)
    y = mamba_mixer(x, weights[0], orders[0], nslices, recompute, fused)
    for order, own in zip(orders[1:], weights[1:], strict=True):
        y += mamba_mixer(x, own, order, nslices, recompute, fused)
    return y


def in_triton(x: Tensor) -> bool:
    """Tell that Triton's kernels compute mixers, gate, projection, norm and upsampling of x."""
    return x.is_cuda and backends()["triton"].available and not triton_mixer.refuses(x)


def rates(logs: Sequence[Tensor], fused: bool | None = None) -> Tensor:
    """The rates A = -exp(log) of several orders, each (E, N): (orders, E, N)."""
    if fused is not False and in_triton(logs[0]):
        return triton_mixer.rates(logs[0], [*logs[1:]])
    return -torch.exp(torch.stack([*logs]))


def gated(y: Tensor, z: Tensor) -> Tensor:
    """The gate, y silu(z)."""
    return triton_mixer.silu_gate(y, z) if in_triton(y) else y * F.silu(z)


def project(tokens: Tensor, linear: torch.nn.Linear) -> Tensor:
    """Tokens (B, L, E) through a linear map without bias: a map (B, C, L), whatever its memory layout."""
    if in_triton(tokens):
        return triton_mixer.project(tokens, linear.weight)
    return linear(tokens).transpose(1, 2)


def channel_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """Tokens (B, L, C) of a map x (B, C, ...), normalised over their channels."""
    x = x.flatten(2)
    if not in_triton(x):
        return norm(x.transpose(1, 2))
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return triton_mixer.channel_norm(x, norm.weight, norm.bias, norm.eps, dtype)


def doubled(x: Tensor) -> Tensor:
    """A map x (B, C, D, H, W), interpolated trilinearly to (B, C, 2 D, 2 H, 2 W)."""
    return (triton_mixer.double if in_triton(x) else triton_mixer.interpolated)(x)


# --- The composition ------------------------------------------------------------------------------


def _composed(weights: Weights, order: str, nslices: int, x: Tensor) -> Tensor:
    """The mixer step by step, over a copy of x in the order of visit."""
    tokens, u, delta, B, C = scan_arguments(weights, order, nslices, x)
    y = selective_scan(u, delta, weights.A, B, C, weights.D, delta_bias=weights.dt_bias)
    return y.new_empty(x.shape).index_copy(1, tokens, y.transpose(1, 2))


def scan_arguments(
    weights: Weights, order: str, nslices: int, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a mixer calls its scan with, for tokens x (B, L, E) in memory order; arguments as of `mamba_mixer`.

    Returns:
        The tokens (L,) in the order of visit and, in that order, u and delta (B, E, L), B and C (B, N, L). Delta is
        without bias and softplus.
    """
    tokens = token_order(order, x.shape[1], nslices, x.device)
    visited = x[:, tokens].transpose(1, 2)  # (B, L, E) -> (B, E, L)
    u = _causal_conv(visited, weights.conv_weight, weights.conv_bias)
    dt, B, C = F.linear(u.transpose(1, 2), weights.x_proj).split(_sizes(weights), dim=-1)
    delta, B, C = (t.transpose(1, 2) for t in (F.linear(dt, weights.dt_proj), B, C))
    return tokens, u, delta, B, C


def _sizes(weights: Weights) -> list[int]:
    """Widths of what x_proj yields: R for the step size, N for B, N for C."""
    return [weights.dt_proj.shape[1], *[weights.A.shape[1]] * 2]


def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The causal depthwise convolution with SiLU of x (B, E, L): by the kernel of causal-conv1d or by torch."""
    channels, taps = weight.shape
    if x.is_cuda and x.dtype != torch.float64 and 2 <= taps <= 4 and channels % 8 == 0:
        kernel = _causal_conv_kernel()
        if kernel:
            return kernel(x, weight, bias)
    padded = F.pad(x, (taps - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=channels))


@functools.cache
def _causal_conv_kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    try:
        from causal_conv1d import causal_conv1d_fn

        return functools.partial(causal_conv1d_fn, activation="silu")
    except Exception as error:  # a build against another torch fails in many ways
        logger.info("causal convolution by torch: %s", error)
        return None


# --- The fused operator on the CPU ----------------------------------------------------------------


class _Stretches:
    """The fused mixer's way along its order of visit, and the memory it works in.

    Work tensors are kept for the next stretch: fresh memory would cost a third of a stretch's time.
    """

    def __init__(self, x: Tensor, weights: Weights, order: str, nslices: int) -> None:
        from .kernels import CHUNK

        self.x = x.detach().transpose(1, 2)  # (B, E, L), as convolution and scan see a sequence
        self.weights, self.order = weights, cpu.order_table(order, x.shape[1], nslices)
        self.chunks = max(1, STRETCH // (x.shape[0] * x.shape[2] * CHUNK))
        self.step = self.chunks * CHUNK
        self.memory: dict[str, Tensor] = {}
        self.conv = self.convolution()

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """First step, number of steps and first chunk of each stretch."""
        for i, begin in enumerate(range(0, len(self.order), self.step)):
            yield begin, min(self.step, len(self.order) - begin), i * self.chunks

    def convolution(self, backward: bool = False) -> cpu.ConvPass:
        """A pass of the convolution over all stretches."""
        weight, bias = self.weights[:2]
        return cpu.ConvPass(self.x, weight, bias, self.order, backward)

    def scan(self, states: Tensor, backward: bool = False) -> cpu.ScanPass:
        """A pass of the scan over all stretches."""
        w = self.weights
        return cpu.ScanPass(self.x, w.A, w.D, w.dt_bias, states, backward=backward)

    def work(self, name: str, *shape: int) -> Tensor:
        """A tensor of that name and shape, with anything in it."""
        size = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = self.x.new_empty(size)
        return self.memory[name][:size].view(shape)

    def scan_inputs(self, begin: int, count: int) -> tuple[ScanInputs, Tensor]:
        """Inputs of the scan in a stretch, in the order of visit; the step sizes of rank R."""
        batch, width, _ = self.x.shape
        _, _, x_proj, dt_proj, dt_bias, A, D = self.weights
        u, delta = (self.work(name, batch, count, width) for name in ("u", "delta"))
        rows = self.work("rows", batch, count, len(x_proj))
        self.conv.forward(begin, cpu.order_table("forward", count, 1), u.transpose(1, 2))
        torch.mm(u.flatten(0, 1), x_proj.T, out=rows.flatten(0, 1))
        dt, B, C = rows.split(_sizes(self.weights), dim=-1)
        torch.mm(dt.flatten(0, 1), dt_proj.T, out=delta.flatten(0, 1))
        u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
        return ScanInputs(u, delta, A, B, C, D, None, dt_bias), dt


def _refuses(x: Tensor, conv_weight: Tensor) -> str:
    """The reason why the fused operator cannot take such tensors; empty where it can."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"x: expected torch.float32 on the CPU, got {x.dtype} on {x.device.type}"
    if conv_weight.shape[1] > cpu.MOST_TAPS:
        return f"conv_weight: expected at most {cpu.MOST_TAPS} taps, got {conv_weight.shape[1]}"
    return ""


def _check(*given: Any) -> None:
    *tensors, order, nslices = given
    check_mixer(tensors, order, nslices)
    if reason := _refuses(*tensors[:2]):
        raise ValueError(reason)
    choose("cpu", tensors[0].device, tensors[0].dtype)


def _states_shape(x: Tensor, *given: Any) -> tuple[int, ...]:
    return cpu.states_shape(x.transpose(1, 2), Weights(*given[:7]).A)


def _forward(x: Tensor, *given: Any) -> Tensor:
    *weights, order, nslices, states = given
    way, y = _Stretches(x, Weights(*weights), order, nslices), torch.empty_like(x)
    scan = way.scan(states)
    for begin, count, chunk in way:
        inputs, _ = way.scan_inputs(begin, count)
        places = cpu.order_table("forward", count, 1)
        scan.forward(inputs, places, way.order[begin : begin + count], chunk, y.transpose(1, 2))
    return y


def _backward(grad: Tensor, states: Tensor, x: Tensor, *given: Any) -> list[Tensor]:
    check_gradient(grad, states, x, _states_shape(x, *given))
    *tensors, order, nslices = given
    weights = Weights(*tensors)
    way = _Stretches(x, weights, order, nslices)
    grad, x_proj, dt_proj = grad.detach().transpose(1, 2), weights.x_proj, weights.dt_proj
    d_x_proj, d_dt_proj = torch.zeros_like(x_proj), torch.zeros_like(dt_proj)
    conv, scan = way.convolution(backward=True), way.scan(states, backward=True)
    batch, _, width = x.shape
    ranks, nstates = dt_proj.shape[1], weights.A.shape[1]
    after = x.new_zeros(batch, conv.overlap, width)  # du of the steps after a stretch
    for begin, count, chunk in reversed(list(way)):
        inputs, dt = way.scan_inputs(begin, count)
        places = cpu.order_table("forward", count + conv.overlap, 1)
        du = way.work("du", batch, count + conv.overlap, width)
        d_delta = way.work("d_delta", batch, count, width)
        d_rows = way.work("d_rows", batch, len(x_proj), count)
        out = {"u": du[:, :count].transpose(1, 2), "delta": d_delta.transpose(1, 2)}
        out["B"], out["C"] = d_rows[:, ranks:-nstates], d_rows[:, -nstates:]
        out["z"] = x.new_empty(0, 0, 0)
        targets = way.order[begin : begin + count]
        scan.backward(inputs, places[:count], targets, chunk, grad, out)
        # delta = dt_proj dt and (dt, B, C) = x_proj u, by their inputs and weights
        for b in range(batch):
            torch.mm(dt_proj.T, d_delta[b].T, out=d_rows[b, :ranks])
            du[b, :count].addmm_(d_rows[b].T, x_proj)
            d_dt_proj.addmm_(d_delta[b].T, dt[b])
            d_x_proj.addmm_(d_rows[b], inputs.u[b].T)
        du[:, count:] = after
        conv.backward(begin, places, du.transpose(1, 2))
        after = du[:, : conv.overlap].clone()
    sums = scan.sums()
    d_scan = (sums[name] for name in ("delta_bias", "A", "D"))
    return [conv.dx.transpose_(1, 2), *conv.sums(), d_x_proj, d_dt_proj, *d_scan]


fused_mixer = register(
    "fused_mixer",
    "Tensor x, Tensor conv_weight, Tensor conv_bias, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A, "
    "Tensor D, str order, SymInt nslices",
    _forward,
    _backward,
    states_shape=_states_shape,
    check=_check,
    flops=lambda x, weight, _, x_proj, dt_proj, __, A, *___: mixer_flops(
        x, weight, x_proj, dt_proj, A
    ),
)
