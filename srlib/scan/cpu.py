"""The fused selective scan on the CPU: numba kernels on torch's threads, in float32.

The work is split by sequence and, when there are more threads than sequences, by groups of channels.
Who sums what is fixed by the number of threads, so that with the same number the same bits come out.
float64, which only checks need, goes to the chunked back end.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked, threads
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


MOST_TAPS = 4  # that the kernels' causal convolution has


def states_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of what the forward pass keeps: states before each chunk and after the last."""
    if u.dtype == torch.float64:
        return chunked.states_shape(u, A)
    from .kernels import CHUNK, LANES

    chunks = -(-u.shape[2] // CHUNK)
    return u.shape[0], (chunks + 1) * A.shape[1], -(-A.shape[0] // LANES) * LANES


@functools.lru_cache(maxsize=16)
def order_table(order: str, length: int, nslices: int) -> np.ndarray:
    """`token_order` as the kernels take it, kept for the next calls."""
    return token_order(order, length, nslices).numpy()


class _Tiles(threading.local):
    """Each thread's tiles of (rows, 16 lanes), kept for its next tasks."""

    def __init__(self) -> None:
        self.get = functools.lru_cache(maxsize=8)(self._make)

    @staticmethod
    def _make(lanes: int, *layout: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """Tiles of so many rows, each at its place, in cache lines, after a multiple of 4 KiB.

        A processor takes a load to depend on a recent store when their addresses agree modulo 4 KiB.
        The places keep what a kernel reads next away from what it has just written.
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


_tiles = _Tiles()


class _Threads:
    """Who does what in a scan: each worker a sequence and a group of its channels."""

    def __init__(
        self, batch: int, channels: int, layout: list[tuple[int, int]], lanes: int
    ) -> None:
        blocks = -(-channels // lanes)
        self.groups = min(blocks, -(-torch.get_num_threads() // batch))
        bounds = [g * blocks // self.groups * lanes for g in range(self.groups + 1)]
        self.shares = [
            (group, b, bounds[group], bounds[group + 1])
            for b in range(batch)
            for group in range(self.groups)
        ]
        self.others = range(1, self.groups)
        self.layout = (lanes, *layout)

    def run(self, task: Callable[..., None]) -> None:
        """`task(tiles, group, sequence, first channel, last channel)` for all."""

        def work(*share: int) -> None:
            task(_tiles.get(*self.layout), *share)  # looked up here: they are this thread's

        threads.run(work, self.shares)


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
        out: Gradients,
    ) -> None:
        """The same steps backwards: fill `out`, the gradients of u, delta, B, C and z."""
        arguments = self._arguments(inputs, places, targets)
        shares = [[torch.empty_like(t) for t in (out["B"], out["C"])] for _ in self.threads.others]
        sums = (self.dA, self.dD, self.dbias)

        def task(tiles: tuple, group: int, *share: int) -> None:
            dB, dC = shares[group - 1] if group else (out["B"], out["C"])
            tensors = (out["u"], out["delta"], dB, dC, out["z"], *sums)
            kernel_sums = (self.carries.numpy(), *(t.numpy() for t in tensors))
            state = (self.states.numpy(), chunk * self.nstates)
            self.kernel(*arguments, tiles, grad.numpy(), *state, *kernel_sums, *share)

        self.threads.run(task)
        for dB, dC in shares:
            out["B"] += dB
            out["C"] += dC

    def sums(self) -> Gradients:
        """Gradients of A, D and delta_bias, after the backward pass."""
        dA = self.dA.sum(0)[:, : self.channels].T.clone(memory_format=torch.contiguous_format)
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
    out = {name: torch.empty_like(t, dtype=torch.float32) for name, t in inputs.sequences().items()}
    out.setdefault("z", torch.empty(0, 0, 0))
    parameters = (inputs.A, inputs.D, inputs.delta_bias)
    scan = ScanPass(inputs.u, *parameters, states, options.delta_softplus, backward=True)
    scan.backward(inputs, order, order, 0, grad.detach().float(), out)
    results = out | scan.sums()
    return {
        name: torch.empty_like(t).copy_(results[name]) if name == "A" else results[name].to(t.dtype)
        for name, t in inputs.given().items()
    }


class ConvPass:
    """The causal depthwise convolution with SiLU, forward or backward, in stretches of an order's steps."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor, order: np.ndarray, backward: bool = False
    ) -> None:
        from . import kernels

        self.x, self.order, self.channels = x.detach(), order, len(bias)
        self.taps = weight.shape[1]
        weights = F.pad(weight.T, (0, 0, kernels.TAPS - self.taps, 0))
        self.weights, self.bias = (_padded(t, kernels.LANES) for t in (weights, bias))
        self.kernel = (kernels.conv_backward if backward else kernels.conv_forward).compiled
        self.threads = _Threads(x.shape[0], x.shape[1], kernels.CONV_TILES, kernels.LANES)
        self.overlap = kernels.TAPS - 1
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
        """Adds to the sums and fills `dx` at the steps' tokens; du has `overlap` more steps."""
        self._run(begin, places, du, self.dx, self.dweights, self.dbias)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias."""
        weights = self.dweights.sum(0)[-self.taps :, : self.channels].T.clone(
            memory_format=torch.contiguous_format
        )
        return weights, self.dbias.sum(0)[: self.channels]
