"""The fused selective scan on the CPU: numba kernels on torch's threads, in float32.

The work is split by sequence and, when there are more threads than sequences, by groups of channels.
Who sums what is fixed by the number of threads, so that with the same number the same bits come out.
float64, which only checks need, goes to the chunked back end.

Why torch's own threads: after an operation they spin for some milliseconds, to be there for the next one. Threads of
another pool have to share the cores with them: between two matrix products, a scan on two threads of its own
gained nothing over one on two cores. So the tasks go to the team of torch's own OpenMP runtime, by the entry
point that compilers call for `#pragma omp parallel`. Where torch has another runtime than GNU's (macOS, conda),
and in a process that was forked, where GNU's hangs, a pool of Python's threads takes them.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked
from .definition import token_order
from .inputs import Gradients, Options, ScanInputs, unusable

MOST_TAPS = 4  # that the kernels' causal convolution has


def unavailable() -> str:
    """The reason why this back end cannot run here: numba cannot be used."""
    return unusable(_kernels, "numba cannot be used")


@functools.cache
def _kernels() -> ModuleType:
    from . import kernels

    return kernels


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """The reason why this back end cannot take such tensors."""
    return "" if device.type == "cpu" else f"cpu needs tensors on the CPU, got {device.type}"


def states_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of what the forward pass keeps: states before each chunk and after the last."""
    if u.dtype == torch.float64:
        return chunked.states_shape(u, A)
    kernels = _kernels()
    chunks, blocks = -(-u.shape[2] // kernels.CHUNK), -(-A.shape[0] // kernels.LANES)
    return u.shape[0], (chunks + 1) * A.shape[1], blocks * kernels.LANES


@functools.lru_cache(maxsize=16)
def order_table(order: str, length: int, nslices: int) -> np.ndarray:
    """`token_order` as the kernels take it, kept for the next calls."""
    return token_order(order, length, nslices).numpy()


class _Tiles(threading.local):
    """Each thread's tiles of (rows, 16 lanes), kept for its next tasks."""

    def __init__(self) -> None:
        self.get = functools.lru_cache(maxsize=8)(self._make)

    @staticmethod
    def _make(*layout: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """Tiles of so many rows, each at its place, in cache lines, after a multiple of 4 KiB.

        A processor takes a load to depend on a recent store when their addresses agree modulo 4 KiB.
        The places keep what a kernel reads next away from what it has just written.
        """
        line = 4 * (lanes := _kernels().LANES)  # bytes of a row, which is a cache line
        page = 4096 // line
        starts, end = [], 0
        for rows, place in layout:
            starts.append(-(-end // page) * page + place)
            end = starts[-1] + rows
        scratch = torch.zeros(end + page, lanes).numpy()
        scratch = scratch[-scratch.ctypes.data % 4096 // line :]  # torch aligns to 64 bytes
        return tuple(
            scratch[start:][:rows] for start, (rows, _) in zip(starts, layout, strict=True)
        )


_tiles = _Tiles()


class _Team:
    """Division of a pass among workers, each with a sequence and a group of its channels."""

    def __init__(self, batch: int, channels: int, layout: list[tuple[int, int]]) -> None:
        lanes = _kernels().LANES
        blocks = -(-channels // lanes)
        self.groups, self.layout = min(blocks, -(-torch.get_num_threads() // batch)), layout
        bounds = [g * blocks // self.groups * lanes for g in range(self.groups + 1)]
        groups = [*enumerate(itertools.pairwise(bounds))]
        self.shares = [(group, b, *channels) for b in range(batch) for group, channels in groups]

    def run(self, task: Callable[..., None]) -> None:
        """`task(tiles, group, sequence, first channel, last channel)` for all."""

        def work(*share: int) -> None:
            task(_tiles.get(*self.layout), *share)  # looked up here: they are this thread's

        on_threads(work, self.shares)


def _padded(t: Tensor) -> Tensor:
    """`t` (..., D) with zeros up to whole vectors (..., P)."""
    return F.pad(t.detach().float(), (0, -t.shape[-1] % _kernels().LANES)).contiguous()


def _summed(parts: Tensor, like: Tensor) -> Tensor:
    """The gradient of a parameter `like` (D,) or (D, n) from each sequence's own, (B, P) or (B, rows, P)."""
    total = parts.sum(0)
    if like.ndim == 1:
        return total[: len(like)].to(like.dtype)
    return torch.empty_like(like).copy_(total.t()[: len(like), -like.shape[1] :])


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
        kernels, (batch, channels, _) = _kernels(), u.shape
        self.nstates, self.states, self.softplus = A.shape[1], states, softplus
        self.parameters = {"A": A, "D": D, "delta_bias": delta_bias}
        self.rates = _padded(A.T / math.log(2))
        zeros = torch.zeros(channels)
        self.skip, self.bias = (_padded(zeros if t is None else t) for t in (D, delta_bias))
        per_state = (batch, self.nstates, len(self.skip))
        if backward:
            self.kernel, layout = kernels.backward.compiled, kernels.backward_tiles(self.nstates)
            self.carries = torch.zeros(per_state)
            self.totals = [torch.zeros(per_state)]
            self.totals += [torch.zeros(batch, len(self.skip)) for _ in ("D", "delta_bias")]
        else:
            self.kernel, layout = kernels.forward.compiled, kernels.forward_tiles(self.nstates)
            self.keep = states.numel() > 0
            self.states = states if self.keep else torch.empty(per_state)
            self.states[:, : self.nstates] = 0
        self.team = _Team(batch, channels, layout)

    def _arguments(self, inputs: ScanInputs, places: np.ndarray, targets: np.ndarray) -> list:
        z = inputs.u[:0] if inputs.z is None else inputs.z
        u, delta, _, B, C, *_ = inputs
        tensors = (u, delta, self.rates, B, C, self.skip, z, self.bias)
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

        self.team.run(task)

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
        shares = [(out["B"], out["C"])]
        shares += [
            (torch.empty_like(B), torch.empty_like(C)) for B, C in shares * (self.team.groups - 1)
        ]

        def task(tiles: tuple, group: int, *share: int) -> None:
            tensors = (self.carries, out["u"], out["delta"], *shares[group], out["z"], *self.totals)
            results = [t.numpy() for t in tensors]
            state = (self.states.numpy(), chunk * self.nstates)
            self.kernel(*arguments, tiles, grad.numpy(), *state, *results, *share)

        self.team.run(task)
        for dB, dC in shares[1:]:
            out["B"] += dB
            out["C"] += dC

    def sums(self) -> Gradients:
        """Gradients of A, D and delta_bias, after the backward pass."""
        pairs = zip(self.totals, self.parameters.items(), strict=True)
        return {name: _summed(total, t) for total, (name, t) in pairs if t is not None}


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
    return {name: results[name].to(t.dtype) for name, t in inputs.given().items()}


class ConvPass:
    """The causal depthwise convolution with SiLU, forward or backward, in stretches of an order's steps."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor, order: np.ndarray, backward: bool = False
    ) -> None:
        kernels, taps = _kernels(), weight.shape[1]
        self.x, self.order, self.parameters = x.detach(), order, (weight, bias)
        self.overlap = kernels.TAPS - 1
        self.weights = _padded(F.pad(weight.T, (0, 0, kernels.TAPS - taps, 0)))
        self.bias = _padded(bias)
        self.kernel = (kernels.conv_backward if backward else kernels.conv_forward).compiled
        self.team = _Team(x.shape[0], x.shape[1], kernels.CONV_TILES)
        if backward:
            self.dx = torch.empty_like(self.x)
            self.totals = [torch.zeros(len(x), *t.shape) for t in (self.weights, self.bias)]

    def _run(self, begin: int, places: np.ndarray, *tensors: Tensor) -> None:
        arrays = [t.numpy() for t in (self.x, self.weights, self.bias)]
        results = [t.numpy() for t in tensors]

        def task(tiles: tuple, group: int, *share: int) -> None:
            self.kernel(*arrays, self.order, begin, places, tiles, *results, *share)

        self.team.run(task)

    def forward(self, begin: int, places: np.ndarray, u: Tensor) -> None:
        """Fill u (B, D, places) with the steps from `begin` on."""
        self._run(begin, places, u)

    def backward(self, begin: int, places: np.ndarray, du: Tensor) -> None:
        """Add to the sums and fill `dx` at the steps' tokens; du has `overlap` more steps."""
        self._run(begin, places, du, self.dx, *self.totals)

    def sums(self) -> Iterator[Tensor]:
        """Gradients of weight and bias."""
        return map(_summed, self.totals, self.parameters)


# --- Threads --------------------------------------------------------------------------------------

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROCESS = os.getpid()  # that imported this; a fork of it has another


def on_threads(task: Callable[..., None], shares: Sequence[tuple]) -> None:
    """Call `task(*share)` for each of the shares, on as many threads as torch uses.

    The first exception that a task raises is raised here, when all have ended.
    """
    threads = min(torch.get_num_threads(), len(shares))
    if threads == 1:
        for share in shares:
            task(*share)
    elif os.getpid() == _PROCESS and (parallel := _gnu_openmp()):
        _in_team(parallel, threads, task, shares)
    else:
        pending = [_pool(os.getpid(), threads).submit(task, *share) for share in shares]
        for result in pending:
            result.result()


@functools.cache
def _gnu_openmp() -> Callable[..., None] | None:
    """GOMP_parallel(function, data, threads, flags) of the library that torch brings; None without it."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        parallel = ctypes.CDLL(str(path)).GOMP_parallel
        parallel.argtypes = [_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


def _in_team(
    parallel: Callable[..., Any], threads: int, task: Callable[..., None], shares: Sequence[tuple]
) -> None:
    remaining = iter(shares)
    errors: list[BaseException] = []

    @_Region
    def region(_: Any) -> None:
        try:
            for share in remaining:  # the interpreter's lock lets one thread at a time take one
                task(*share)
        except BaseException as error:  # an interrupt too: nothing can pass through the C code
            errors.append(error)

    parallel(region, None, threads, 0)
    if errors:
        raise errors[0]


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of one process: what a fork leaves of its parent's pool is not used."""
    return ThreadPoolExecutor(threads, thread_name_prefix="selective-scan")
