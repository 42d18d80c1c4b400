"""The fused selective scan on the CPU: numba kernels on a pool of threads, in float32.

The work is split by sequence and, when there are more threads than sequences, by groups of channels.
Who sums what is fixed by the number of threads, so that with the same number the same bits come out.
float64, which only checks need, goes to the chunked back end.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
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


def chunk_length() -> int:
    """Tokens in a chunk."""
    from .kernels import CHUNK

    return CHUNK


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


@functools.lru_cache(maxsize=16)
def order_table(order: str, length: int, nslices: int) -> np.ndarray:
    """`token_order` as the kernels take it, kept for the next calls."""
    return token_order(order, length, nslices).numpy()


def _work_tiles(layout: list[tuple[int, int]], lanes: int) -> tuple[np.ndarray, ...]:
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


class _Threads:
    """Who does what in a scan: each worker a sequence and a group of its channels, with tiles of its own."""

    def __init__(
        self, batch: int, channels: int, layout: list[tuple[int, int]], lanes: int
    ) -> None:
        blocks = -(-channels // lanes)
        self.groups = min(blocks, -(-torch.get_num_threads() // batch))
        bounds = [g * blocks // self.groups * lanes for g in range(self.groups + 1)]
        self.shares = [
            (_work_tiles(layout, lanes), group, b, bounds[group], bounds[group + 1])
            for b in range(batch)
            for group in range(self.groups)
        ]

    def run(self, task: Callable[..., None]) -> None:
        """`task(tiles, group, sequence, first channel, last channel)` for all; the caller's thread helps."""
        if torch.get_num_threads() == 1 or len(self.shares) == 1:
            for share in self.shares:
                task(*share)
            return
        pool = _pool(os.getpid(), torch.get_num_threads())
        pending = [pool.submit(task, *share) for share in self.shares[:-1]]
        task(*self.shares[-1])
        for result in pending:
            result.result()


def _padded(t: Tensor, lanes: int) -> Tensor:
    """`t` (..., D) with zeros up to whole vectors (..., P)."""
    return F.pad(t.detach().float(), (0, -t.shape[-1] % lanes)).contiguous()


class ScanPass:
    """One pass, forward or backward, over the steps of a scan, in one or several stretches.

    Holds what does not depend on the step: padded parameters, states, and in the backward pass the sums
    over steps, dA (B, N, P), dD and dbias (B, P).
    """

    def __init__(
        self,
        u: Tensor,
        A: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        states: Tensor,
        softplus: bool = True,
        backward: bool = False,
    ) -> None:
        from . import kernels

        lanes = kernels.LANES
        batch, self.channels, _ = u.shape
        self.nstates, self.states, self.softplus = A.shape[1], states, softplus
        zeros = torch.zeros(self.channels)
        self.rates = _padded(A.T / math.log(2), lanes)
        self.skip = _padded(zeros if D is None else D, lanes)
        self.bias = _padded(zeros if delta_bias is None else delta_bias, lanes)
        per_state = (batch, self.nstates, len(self.skip))
        if backward:
            self.kernel, layout = kernels.backward.compiled, kernels.backward_tiles(self.nstates)
            self.carries, self.dA = torch.zeros(per_state), torch.zeros(per_state)
            self.dD, self.dbias = (torch.zeros(batch, len(self.skip)) for _ in range(2))
        else:
            self.kernel, layout = kernels.forward.compiled, kernels.forward_tiles(self.nstates)
            self.keep = states.numel() > 0
            self.states = states if self.keep else torch.empty(per_state)
            self.states[:, : self.nstates] = 0
        self.threads = _Threads(batch, self.channels, layout, lanes)

    def _arguments(self, inputs: ScanInputs, places: np.ndarray, targets: np.ndarray) -> list:
        z = inputs.u[:0] if inputs.z is None else inputs.z
        tensors = (
            *(inputs.u, inputs.delta, self.rates, inputs.B, inputs.C),
            *(self.skip, z, self.bias),
        )
        flags = (self.softplus, inputs.z is not None)
        return [*(t.detach().float().numpy() for t in tensors), *flags, places, targets]

    def forward(
        self, inputs: ScanInputs, places: np.ndarray, targets: np.ndarray, chunk: int, y: Tensor
    ) -> None:
        """The steps from `chunk` on, one for each place: write y (B, D, L) at the targets."""
        arguments = self._arguments(inputs, places, targets)
        row, advance = (chunk * self.nstates, self.nstates) if self.keep else (0, 0)

        def task(tiles: tuple, group: int, *share: int) -> None:
            self.kernel(*arguments, tiles, y.numpy(), self.states.numpy(), row, advance, *share)

        self.threads.run(task)

    def backward(
        self,
        inputs: ScanInputs,
        places: np.ndarray,
        targets: np.ndarray,
        chunk: int,
        grad: Tensor,
        du: Tensor,
    ) -> Gradients:
        """The same steps backwards: gradients of u, delta, B, C and z, that of u in `du`."""
        arguments = self._arguments(inputs, places, targets)
        like = functools.partial(torch.empty_like, dtype=torch.float32)
        groups = range(self.threads.groups)
        ddelta, dz = like(inputs.delta), like(inputs.u[:0] if inputs.z is None else inputs.z)
        dB, dC = [like(inputs.B) for _ in groups], [like(inputs.C) for _ in groups]
        row = chunk * self.nstates
        states, carries, *sums = (
            t.numpy() for t in (self.states, self.carries, self.dA, self.dD, self.dbias)
        )

        def task(tiles: tuple, group: int, *share: int) -> None:
            results = (t.numpy() for t in (du, ddelta, dB[group], dC[group], dz))
            self.kernel(
                *arguments, tiles, grad.numpy(), states, row, carries, *results, *sums, *share
            )

        self.threads.run(task)
        results = {"u": du, "delta": ddelta, "z": dz}
        return results | {
            name: functools.reduce(Tensor.add_, shares) for name, shares in (("B", dB), ("C", dC))
        }

    def sums(self) -> Gradients:
        """Gradients of A, D and delta_bias, after the backward pass."""
        dA = self.dA.sum(0)[:, : self.channels].T.contiguous()
        dD, dbias = (t.sum(0)[: self.channels] for t in (self.dD, self.dbias))
        return {"A": dA, "D": dD, "delta_bias": dbias}


def forward(inputs: ScanInputs, options: Options, states: Tensor) -> Tensor:
    """The scan's output (B, D, L); fills `states` unless it is empty."""
    if inputs.u.dtype == torch.float64:
        return chunked.forward(inputs, options, states)
    y = torch.empty_like(inputs.u, dtype=torch.float32)
    order = order_table(options.order, y.shape[2], options.nslices)
    scan = ScanPass(y, inputs.A, inputs.D, inputs.delta_bias, states, options.delta_softplus)
    scan.forward(inputs, order, order, 0, y)
    return y.to(inputs.u.dtype)


def backward(inputs: ScanInputs, options: Options, states: Tensor, grad: Tensor) -> Gradients:
    """Gradients of all inputs, from `grad` (B, D, L) and the states of the forward pass."""
    if inputs.u.dtype == torch.float64:
        return chunked.backward(inputs, options, states, grad)
    order = order_table(options.order, grad.shape[2], options.nslices)
    du = torch.empty_like(inputs.u, dtype=torch.float32)
    parameters = (inputs.A, inputs.D, inputs.delta_bias)
    scan = ScanPass(du, *parameters, states, options.delta_softplus, backward=True)
    results = scan.backward(inputs, order, order, 0, grad.detach().float(), du) | scan.sums()
    return {
        name: results[name].to(t.dtype) if name != "A" else torch.empty_like(t).copy_(results[name])
        for name, t in inputs.given().items()
    }


class ConvPass:
    """The causal depthwise convolution with SiLU, forward or backward, in stretches of an order's steps."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor, order: np.ndarray, backward: bool = False
    ) -> None:
        from . import kernels

        self.x, self.order, self.channels = x.detach(), order, len(bias)
        self.weights, self.bias = (_padded(t, kernels.LANES) for t in (weight.T, bias))
        self.kernel = (kernels.conv_backward if backward else kernels.conv_forward).compiled
        layout = kernels.conv_tiles(weight.shape[1])
        self.threads = _Threads(*x.shape[:2], layout, kernels.LANES)
        if backward:
            self.dx = torch.empty_like(self.x)
            self.dweights, self.dbias = (
                torch.zeros(len(x), *t.shape) for t in (self.weights, self.bias)
            )

    def _run(self, begin: int, places: np.ndarray, *tensors: Tensor) -> None:
        arrays = [t.numpy() for t in (self.x, self.weights, self.bias)]
        results = [t.numpy() for t in tensors]

        def task(tiles: tuple, group: int, *share: int) -> None:
            self.kernel(*arrays, self.order, begin, places, tiles, *results, *share)

        self.threads.run(task)

    def forward(self, begin: int, places: np.ndarray, u: Tensor) -> None:
        """Fill u (B, D, places) with the steps from `begin` on."""
        self._run(begin, places, u)

    def backward(self, begin: int, places: np.ndarray, du: Tensor) -> None:
        """Adds to the sums and fills `dx` at the steps' tokens; du has `taps - 1` more steps."""
        self._run(begin, places, du, self.dx, self.dweights, self.dbias)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias."""
        weights = self.dweights.sum(0)[:, : self.channels].T.contiguous()
        return weights, self.dbias.sum(0)[: self.channels]
