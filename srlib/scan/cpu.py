"""The fused selective scan on the CPU: numba kernels on a pool of threads, in float32.

The work is split by sequence and, when there are more threads than sequences, by groups of channels.
Who sums what is fixed by the number of threads, so that with the same number the same bits come out.
float64, which only checks need, goes to the chunked back end.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked
from .inputs import Gradients, Options, ScanInputs
from .orders import token_order


def unavailable() -> str:
    """Why this back end cannot run here: numba cannot be used."""
    try:
        from . import kernels  # noqa: F401
    except Exception as error:  # a numba built against another numpy fails in many ways
        return f"numba cannot be used ({type(error).__name__}: {error})"
    return ""


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why this back end cannot take such tensors."""
    return "" if device.type == "cpu" else f"cpu needs tensors on the CPU, got {device.type}"


def states_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of what the forward pass keeps: states before each chunk and after the last."""
    if u.dtype == torch.float64:
        return chunked.states_shape(u, A)
    from .kernels import CHUNK, LANES

    chunks = -(-u.shape[2] // CHUNK)
    return u.shape[0], (chunks + 1) * A.shape[1], -(-A.shape[0] // LANES) * LANES


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of one process: what a fork leaves of its parent's pool is not used."""
    return ThreadPoolExecutor(threads, thread_name_prefix="selective-scan")


def run(task: Callable[..., None], shares: Sequence[tuple[int, ...]]) -> None:
    """`task(*share)` for all shares on torch's number of threads; the caller's takes the last."""
    if torch.get_num_threads() == 1 or len(shares) == 1:
        for share in shares:
            task(*share)
        return
    pool = _pool(os.getpid(), torch.get_num_threads())
    pending = [pool.submit(task, *share) for share in shares[:-1]]
    task(*shares[-1])
    for result in pending:
        result.result()


def split_channels(batch: int, channels: int, lanes: int) -> list[tuple[int, int, int, int]]:
    """What the workers do: group of channels, sequence, first channel, last channel (exclusive)."""
    blocks = -(-channels // lanes)
    groups = min(blocks, -(-torch.get_num_threads() // batch))
    bounds = [g * blocks // groups * lanes for g in range(groups + 1)]
    return [(g, b, bounds[g], bounds[g + 1]) for b in range(batch) for g in range(groups)]


@functools.lru_cache(maxsize=16)
def order_table(order: str, length: int, nslices: int) -> np.ndarray:
    """`token_order` as the kernels take it, kept for the next calls."""
    return token_order(order, length, nslices).numpy()


def work_tiles(layout: list[tuple[int, int]], lanes: int) -> tuple[np.ndarray, ...]:
    """Zeroed tiles of (rows, 16 lanes), each at its place, in cache lines, after a multiple of 4 KiB.

    A processor takes a load to depend on a recent store when their addresses agree modulo 4 KiB. The
    places keep what a kernel reads next away from what it has just written: half the time of a scan.
    """
    page = 4096 // (4 * lanes)  # in rows, which are cache lines
    starts, end = [], 0
    for rows, place in layout:
        starts.append(-(-end // page) * page + place)
        end = starts[-1] + rows
    scratch = torch.zeros(end + page, lanes).numpy()
    scratch = scratch[-scratch.ctypes.data % 4096 // (4 * lanes) :]  # torch aligns to 64 bytes
    return tuple(
        scratch[start : start + rows] for start, (rows, _) in zip(starts, layout, strict=True)
    )


def padded(t: Tensor, lanes: int) -> Tensor:
    """`t` (..., D) with zeros up to whole vectors (..., P)."""
    return F.pad(t, (0, -t.shape[-1] % lanes)).contiguous()


def _common(inputs: ScanInputs, options: Options, lanes: int) -> list:
    """The arguments that both kernels begin with: the inputs as float32 arrays, then the options."""
    given = {name: t.detach().float() for name, t in inputs.given().items()}
    _, channels, length = inputs.u.shape

    given["A"] = padded(given["A"].T / math.log(2), lanes)
    given["D"] = padded(given.get("D", torch.zeros(channels)), lanes)
    given["delta_bias"] = padded(given.get("delta_bias", torch.zeros(channels)), lanes)
    given.setdefault("z", torch.empty(0, 0, 0))
    arrays = [given[name].numpy() for name in inputs._fields]
    order = order_table(options.order, length, options.nslices)
    return [*arrays, options.delta_softplus, inputs.z is not None, order]


def forward(inputs: ScanInputs, options: Options, states: Tensor) -> Tensor:
    """The scan's output (B, D, L); fills `states` unless it is empty."""
    if inputs.u.dtype == torch.float64:
        return chunked.forward(inputs, options, states)
    from .kernels import LANES, forward, forward_tiles

    batch, channels, _ = inputs.u.shape
    nstates = inputs.A.shape[1]
    y = torch.empty_like(inputs.u, dtype=torch.float32)
    if not states.numel():
        states = torch.empty(batch, nstates, -(-channels // LANES) * LANES)
    states[:, :nstates] = 0
    common = _common(inputs, options, LANES)

    def task(group: int, *share: int) -> None:
        tiles = work_tiles(forward_tiles(nstates), LANES)
        kernel(*common, tiles, y.numpy(), states.numpy(), *share)

    kernel = forward.compiled
    run(task, split_channels(batch, channels, LANES))
    return y.to(inputs.u.dtype)


def backward(inputs: ScanInputs, options: Options, states: Tensor, grad: Tensor) -> Gradients:
    """Gradients of all inputs, from `grad` (B, D, L) and the states of the forward pass."""
    if inputs.u.dtype == torch.float64:
        return chunked.backward(inputs, options, states, grad)
    from .kernels import LANES, backward, backward_tiles

    batch, channels, _ = inputs.u.shape
    nstates = inputs.A.shape[1]
    given = inputs.given()
    shares = split_channels(batch, channels, LANES)
    like = functools.partial(torch.empty_like, dtype=torch.float32)
    du, ddelta = like(inputs.u), like(inputs.delta)
    dz = torch.empty(0, 0, 0) if inputs.z is None else like(inputs.z)
    groups = range(len(shares) // batch)
    dB, dC = [like(inputs.B) for _ in groups], [like(inputs.C) for _ in groups]
    per_state = (batch, nstates, states.shape[-1])
    carries, dA = torch.zeros(per_state), torch.zeros(per_state)
    dD, dbias = (torch.zeros(batch, states.shape[-1]) for _ in range(2))
    common = _common(inputs, options, LANES)
    grad = grad.float()

    def task(group: int, *share: int) -> None:
        tiles = work_tiles(backward_tiles(nstates), LANES)
        results = (du, ddelta, dA, dB[group], dC[group], dz, dD, dbias)
        tensors = (states, grad, carries, *results)
        kernel(*common, tiles, *(t.numpy() for t in tensors), *share)

    kernel = backward.compiled
    run(task, shares)
    results = {"u": du, "delta": ddelta, "z": dz}
    results["A"] = like(inputs.A).copy_(dA.sum(0).T[:channels])
    results |= {"B": functools.reduce(Tensor.add_, dB), "C": functools.reduce(Tensor.add_, dC)}
    results |= {"D": dD.sum(0)[:channels], "delta_bias": dbias.sum(0)[:channels]}
    return {name: results[name].to(t.dtype) for name, t in given.items()}


def _conv_arrays(x: Tensor, weight: Tensor, bias: Tensor, options: Options, lanes: int) -> tuple:
    """The arguments that both kernels of the convolution begin with."""
    weights, biases = (padded(t.detach(), lanes).numpy() for t in (weight.T, bias))
    return (
        x.detach().numpy(),
        weights,
        biases,
        order_table(options.order, x.shape[2], options.nslices),
    )


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, options: Options) -> Tensor:
    """silu(causal depthwise convolution) of x (B, D, L) in the order of visit; weight (D, taps)."""
    from .kernels import LANES, conv_forward, conv_tiles

    y = torch.empty_like(x)
    arrays = _conv_arrays(x, weight, bias, options, LANES)

    def task(group: int, *share: int) -> None:
        tiles = work_tiles(conv_tiles(weight.shape[1]), LANES)
        kernel(*arrays, tiles, y.numpy(), *share)

    kernel = conv_forward.compiled
    run(task, split_channels(*x.shape[:2], LANES))
    return y


def causal_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `causal_conv` by x, weight and bias."""
    from .kernels import LANES, conv_backward, conv_tiles

    dx = torch.empty_like(x)
    arrays = _conv_arrays(x, weight, bias, options, LANES)
    dweight, dbias = (torch.zeros(len(x), *weights.shape) for weights in arrays[1:3])

    def task(group: int, *share: int) -> None:
        tiles = work_tiles(conv_tiles(weight.shape[1]), LANES)
        kernel(*arrays, tiles, *(t.numpy() for t in (grad, dx, dweight, dbias)), *share)

    kernel = conv_backward.compiled
    run(task, split_channels(*x.shape[:2], LANES))
    channels = len(bias)
    return dx, dweight.sum(0).T[:channels].contiguous(), dbias.sum(0)[:channels]
