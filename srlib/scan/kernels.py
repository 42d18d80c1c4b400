"""The selective scan's fused CPU kernels, in numba over vectors of 16 channels.

The scan is worked off in chunks of `CHUNK` tokens and blocks of 16 channels. A chunk's rows are first
copied into tiles of (tokens, 16 lanes) that stay in the innermost cache, in the order in which the scan
visits them: whatever strides and order the memory has end there. Then state after state runs through the
chunk, its value in one register:

    h = exp(dt A) h + x B,   x = dt u,   y += C h

The forward pass keeps the states before each chunk. The backward pass takes the chunks from the end,
computes a chunk's states again and runs the adjoint recurrence through them (see `_adjoint`).

What belongs to channels alone comes padded to whole vectors of P channels, with zeros: rates (N, P) are
A log2(e), for exp(dt A) = 2^(dt rates); `skip` (P,) is D. The kernels hold no lock and start no thread:
`cpu` calls them from the threads of `threads`. numba's parallel loops would use an OpenMP of their own, which does
not survive a fork.
"""

# mypy: ignore-errors
# (numba's functions take vectors and tiles, which Python's types do not describe)
from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import boolean, config, float32, int64, njit, types, void

from . import simd
from .simd import LANES, broadcast, dots, exp2, fma, load, sigmoid, softplus, spread, store

CHUNK = 64  # tokens; eight tiles of 64 x 16 float32 fill a 32 KiB cache
TAPS = 4  # of the causal convolution; fewer are padded with zeros

_OPTIONS = {"error_model": "numpy", "boundscheck": False, "nogil": True}
_ZERO, _ONE, _LN2 = np.float32(0), np.float32(1), np.float32(math.log(2))

_helper = njit(forceinline=True, **_OPTIONS)  # a call would pass each tile as eight words
_channels = float32[::1]  # (P,)
_per_state = float32[:, ::1]  # (N, P)
_sequence = float32[:, :, :]  # (B, channels or states, L) of any strides
_states = float32[:, :, ::1]  # (B, rows, P)


def _tiles(count: int) -> Any:
    return types.UniTuple(float32[:, ::1], count)


class _Kernel:
    """A function that is compiled at its first use, from numba's cache when that is possible.

    numba looks only at the function's own file to see whether its cache is stale; the name under which it
    is cached therefore carries a digest of the vocabulary's file, and whether NUMBA_BOUNDSCHECK is set.
    """

    def __init__(self, function: Callable, signature: Any) -> None:
        self.function, self.signature = function, signature

    @functools.cached_property
    def compiled(self) -> Callable:
        digest = hashlib.sha256(Path(simd.__file__).read_bytes()).hexdigest()[:8]
        checked = "_checked" * bool(config.BOUNDSCHECK)
        self.function.__qualname__ = f"{self.function.__name__}_{digest}{checked}"
        try:
            return njit(self.signature, cache=True, **_OPTIONS)(self.function)
        except RuntimeError as error:  # neither the package nor the user's cache folder is writable
            logging.getLogger("srlib.scan").info("compiling without cache: %s", error)
            return njit(self.signature, **_OPTIONS)(self.function)


def _kernel(*arguments: Any) -> Callable[[Callable], _Kernel]:
    return lambda function: _Kernel(function, void(*arguments))


@_helper
def _gather(tile, source, b, channel, places):
    """tile[t, c] = source[b, channel + c, places[t]]; 0 in lanes beyond the last channel."""
    width = min(LANES, source.shape[1] - channel)
    if width == LANES and source.strides[1] == 4:
        for t in range(len(places)):
            store(tile, t, load(source, (b, channel, places[t])))
    else:
        tile[: len(places), width:] = 0
        for c in range(width):
            for t in range(len(places)):
                tile[t, c] = source[b, channel + c, places[t]]


@_helper
def _scatter(target, tile, b, channel, places):
    """target[b, channel + c, places[t]] = tile[t, c]."""
    width = min(LANES, target.shape[1] - channel)
    if width == LANES and target.strides[1] == 4:
        for t in range(len(places)):
            store(target, (b, channel, places[t]), load(tile, t))
    else:
        for c in range(width):
            for t in range(len(places)):
                target[b, channel + c, places[t]] = tile[t, c]


@_helper
def _whole_and_consecutive(places):
    """A chunk of CHUNK tokens that follow each other in memory."""
    consecutive = len(places) == CHUNK
    for t in range(1, len(places)):  # the ends alone can lie so in the inter-slice order, too
        consecutive &= places[t] - places[t - 1] == 1
    return consecutive


@_helper
def _scatter_tokens(target, sums, b, n, places, in_vectors):
    """target[b, n, places[t]] = the t-th of CHUNK floats that begin in row n * CHUNK // 16 of `sums`."""
    count = len(places)
    row = n * CHUNK // LANES
    if in_vectors and target.strides[2] == 4:
        for k in range(CHUNK // LANES):
            store(target, (b, n, places[0] + k * LANES), load(sums, row + k))
    else:
        for t in range(count):
            target[b, n, places[t]] = sums[row + t // LANES, t % LANES]


@_helper
def _gather_states(tile, source, b, places):
    """All of B or C at the places: state n of token t is at [n // 16 * CHUNK + t, n % 16]."""
    for n in range(0, source.shape[1], LANES):
        _gather(tile[n // LANES * CHUNK :], source, b, n, places)


def forward_tiles(nstates: int) -> list[tuple[int, int]]:
    """Rows and place of the tiles that `forward` works in (see `work_tiles`)."""
    groups = -(-nstates // LANES) * CHUNK
    return [(CHUNK, 0), (CHUNK, 8), (CHUNK, 16), (groups, 24), (groups, 32)]


@_kernel(
    _sequence, _sequence, _per_state, _sequence, _sequence, _channels, _sequence, _channels, boolean,
    boolean, int64[::1], int64[::1], _tiles(5), _sequence, _states, int64, int64, int64, int64, int64,
)  # fmt: skip
def forward(
    u, delta, rates, B, C, skip, z, bias, with_softplus, with_gate, places, targets, tiles, y, states, row,
    advance, b, first, last,
):  # fmt: skip
    """Scan channels `first` to `last` of sequence `b`; step t reads at places[t] and writes at targets[t].

    `states` (B, rows, P) holds the N states before the first step from `row` on. Those after each chunk go
    `advance` rows further: N to keep them all, 0 to keep the last.
    """
    nstates = len(rates)
    out, dt, x, Bs, Cs = tiles
    for start in range(0, len(places), CHUNK):
        inside = places[start : start + CHUNK]
        _gather_states(Bs, B, b, inside)
        _gather_states(Cs, C, b, inside)
        for channel in range(first, last, LANES):
            _gather(dt, delta, b, channel, inside)
            _gather(x, u, b, channel, inside)
            D, offset = load(skip, (channel,)), load(bias, (channel,))
            for t in range(len(inside)):
                step, value = load(dt, t) + offset, load(x, t)
                if with_softplus:
                    step = softplus(step)
                store(dt, t, step)
                store(x, t, step * value)
                store(out, t, D * value)

            for n in range(nstates):
                group, lane = n // LANES * CHUNK, n % LANES
                rate, h = load(rates, (n, channel)), load(states, (b, row + n, channel))
                for t in range(len(inside)):
                    decay = exp2(load(dt, t) * rate)
                    h = fma(decay, h, load(x, t) * spread(Bs, group + t, lane))
                    store(out, t, fma(h, spread(Cs, group + t, lane), load(out, t)))
                store(states, (b, row + advance + n, channel), h)

            if with_gate:
                _gather(x, z, b, channel, inside)
                for t in range(len(inside)):
                    gate = load(x, t)
                    store(out, t, load(out, t) * gate * sigmoid(gate))
            _scatter(y, out, b, channel, targets[start : start + CHUNK])
        row += advance


@_helper
def _adjoint(rate, h, carry, lane, dt, x, Bs, Cs, dy, dx, ddt, hs, decays):
    """One state through a chunk: forwards from `h`, then backwards from `carry`.

    With q[t] the loss's derivative by h[t], and `carry` = exp(dt[t+1] A) q[t+1] from the token after:

        q = dy C + carry,   dx += q B,   dB += q x,   dC += dy h
        carry = exp(dt A) q,   ddt += (carry h[t-1]) A,   dA += (carry h[t-1]) dt

    Returns `carry` for the chunk before, and this chunk's share of dA. Leaves h[t] in `hs[t + 1]` and q
    in place of the decays, for dB and dC.
    """
    store(hs, 0, h)
    for t in range(len(dt)):
        decay = exp2(load(dt, t) * rate)
        h = fma(decay, h, load(x, t) * spread(Bs, t, lane))
        store(decays, t, decay)
        store(hs, t + 1, h)
    dA = broadcast(_ZERO)
    for t in range(len(dt) - 1, -1, -1):
        q = fma(load(dy, t), spread(Cs, t, lane), carry)
        carry = q * load(decays, t)
        store(decays, t, q)
        store(dx, t, fma(q, spread(Bs, t, lane), load(dx, t)))
        by_exponent = carry * load(hs, t)
        store(ddt, t, fma(by_exponent, rate, load(ddt, t)))
        dA = fma(by_exponent, load(dt, t), dA)
    return carry, dA


def backward_tiles(nstates: int) -> list[tuple[int, int]]:
    """Rows and place of the tiles that `backward` works in."""
    groups = -(-nstates // LANES) * CHUNK
    sums = nstates * CHUNK // LANES
    return [
        *[(CHUNK, 0)] * 4, (CHUNK, 56), (CHUNK, 57), (CHUNK, 58), (groups, 59), (groups, 60),
        (CHUNK + 1, 27), (CHUNK, 28), (CHUNK, 0), (CHUNK, 32), (sums, 0), (sums, 0),
    ]  # fmt: skip


@_kernel(
    _sequence, _sequence, _per_state, _sequence, _sequence, _channels, _sequence, _channels, boolean,
    boolean, int64[::1], int64[::1], _tiles(15), _sequence, _states, int64, _states, _sequence, _sequence,
    _sequence, _sequence, _sequence, _states, _per_state, _per_state, int64, int64, int64,
)  # fmt: skip
def backward(
    u, delta, rates, B, C, skip, z, bias, with_softplus, with_gate, places, targets, tiles, grad, states,
    row, carries, du, ddelta, dB, dC, dz, dA, dD, dbias, b, first, last,
):  # fmt: skip
    """Gradients for channels `first` to `last` of sequence `b`, over the steps of a call of `forward`.

    `carries` (B, N, P) come from the steps after, and go to those before. dB and dC are this worker's sums
    over its channels. dA (B, N, P), dD and dbias (B, P) are added to, the sums over a sequence's tokens.
    """
    nstates = len(rates)
    v, slope, out, gates, dt, x, dy, Bs, Cs, hs, decays, ddt, dx, dBs, dCs = tiles
    zero, one, ln2 = broadcast(_ZERO), broadcast(_ONE), broadcast(_LN2)
    for chunk in range((len(places) - 1) // CHUNK, -1, -1):
        inside = places[chunk * CHUNK : (chunk + 1) * CHUNK]
        count = len(inside)
        _gather_states(Bs, B, b, inside)
        _gather_states(Cs, C, b, inside)
        dBs[:] = 0
        dCs[:] = 0
        for channel in range(first, last, LANES):
            _gather(dt, delta, b, channel, inside)
            _gather(v, u, b, channel, inside)
            _gather(dy, grad, b, channel, targets[chunk * CHUNK : (chunk + 1) * CHUNK])
            D, offset = load(skip, (channel,)), load(bias, (channel,))
            for t in range(count):
                step, value = load(dt, t) + offset, load(v, t)
                steepness = one
                if with_softplus:
                    steepness = sigmoid(step)
                    step = softplus(step)
                store(slope, t, steepness)
                store(dt, t, step)
                store(x, t, step * value)
                store(dx, t, zero)
                store(ddt, t, zero)
            if with_gate:  # y = out silu(z): keep grad silu'(z) until `out` is known
                _gather(gates, z, b, channel, inside)
                for t in range(count):
                    gate, outer = load(gates, t), load(dy, t)
                    s = sigmoid(gate)
                    store(gates, t, outer * s * fma(gate, one - s, one))
                    store(dy, t, outer * gate * s)
                    store(out, t, D * load(v, t))

            for n in range(nstates):
                group, lane = n // LANES * CHUNK, n % LANES
                h = load(states, (b, row + chunk * nstates + n, channel))
                carry, share = _adjoint(
                    load(rates, (n, channel)), h, load(carries, (b, n, channel)), lane,
                    dt[:count], x, Bs[group:], Cs[group:], dy, dx, ddt, hs, decays,
                )  # fmt: skip
                for t in range(0, count, LANES):
                    k = (n * CHUNK + t) // LANES
                    store(dBs, k, load(dBs, k) + dots(decays, t, x, t))
                    store(dCs, k, load(dCs, k) + dots(dy, t, hs, t + 1))
                store(carries, (b, n, channel), carry)
                store(dA, (b, n, channel), load(dA, (b, n, channel)) + share)
                if with_gate:
                    for t in range(count):
                        weight = spread(Cs, group + t, lane)
                        store(out, t, fma(load(hs, t + 1), weight, load(out, t)))

            dD_share, dbias_share = zero, zero
            for t in range(count):
                value, outer, by_x = load(v, t), load(dy, t), load(dx, t)
                by_delta = fma(load(ddt, t), ln2, by_x * value) * load(slope, t)
                dD_share = fma(outer, value, dD_share)
                dbias_share = dbias_share + by_delta
                store(ddt, t, by_delta)
                store(dx, t, fma(by_x, load(dt, t), outer * D))
            store(dD, (b, channel), load(dD, (b, channel)) + dD_share)
            store(dbias, (b, channel), load(dbias, (b, channel)) + dbias_share)
            _scatter(du, dx, b, channel, inside)
            _scatter(ddelta, ddt, b, channel, inside)
            if with_gate:
                for t in range(count):
                    store(out, t, load(out, t) * load(gates, t))
                _scatter(dz, out, b, channel, inside)

        in_vectors = _whole_and_consecutive(inside)
        for n in range(nstates):
            _scatter_tokens(dB, dBs, b, n, inside, in_vectors)
            _scatter_tokens(dC, dCs, b, n, inside, in_vectors)


@_helper
def _history(x_rows, x, b, channel, order, start, stop):
    """Rows of x from `TAPS - 1` steps before `start` up to `stop`; zeros before the first step."""
    before = min(TAPS - 1, start)
    x_rows[: TAPS - 1 - before] = 0
    _gather(x_rows[TAPS - 1 - before :], x, b, channel, order[start - before : stop])


@_helper
def _convolve(x_rows, t, w0, w1, w2, w3, bias):
    """The pre-activation of the step whose history begins in row `t`."""
    recent = fma(w3, load(x_rows, t + 3), fma(w2, load(x_rows, t + 2), bias))
    return fma(w1, load(x_rows, t + 1), fma(w0, load(x_rows, t), recent))


CONV_TILES = [(CHUNK + 2 * TAPS, place) for place in (32, 16, 0)]  # of both kernels below


@_kernel(
    _sequence, _per_state, _channels, int64[::1], int64, int64[::1], _tiles(3), _sequence, int64, int64,
    int64,
)  # fmt: skip
def conv_forward(x, weights, bias, order, begin, places, tiles, u, b, first, last):
    """Convolve and apply SiLU, for as many steps of the order from `begin` on as there are `places`.

    The step `begin + t` goes to places[t]. weights (TAPS, P), the last for the token itself.
    """
    x_rows, out, _ = tiles
    for start in range(0, len(places), CHUNK):
        inside = places[start : start + CHUNK]
        stop = begin + start + len(inside)
        for channel in range(first, last, LANES):
            w0, w1 = load(weights, (0, channel)), load(weights, (1, channel))
            w2, w3 = load(weights, (2, channel)), load(weights, (3, channel))
            offset = load(bias, (channel,))
            _history(x_rows, x, b, channel, order, begin + start, stop)
            for t in range(len(inside)):
                value = _convolve(x_rows, t, w0, w1, w2, w3, offset)
                store(out, t, value * sigmoid(value))
            _scatter(u, out, b, channel, inside)


@_kernel(
    _sequence, _per_state, _channels, int64[::1], int64, int64[::1], _tiles(3), _sequence, _sequence,
    _states, _per_state, int64, int64, int64,
)  # fmt: skip
def conv_backward(
    x, weights, bias, order, begin, places, tiles, du, dx, dweights, dbias, b, first, last
):
    """Gradients of `conv_forward` for its steps; the sums dweights (B, TAPS, P) and dbias (B, P) are added to.

    A token's dx needs du of the `TAPS - 1` steps after it, too: they follow at the end of `places`, as far as
    the order has them.
    """
    x_rows, g, out = tiles
    one, zero = broadcast(_ONE), broadcast(_ZERO)
    steps = len(places) - (TAPS - 1)
    for start in range(0, steps, CHUNK):
        now = begin + start
        count = min(CHUNK, steps - start)
        known = min(count + TAPS - 1, len(order) - now)
        for channel in range(first, last, LANES):
            w0, w1 = load(weights, (0, channel)), load(weights, (1, channel))
            w2, w3 = load(weights, (2, channel)), load(weights, (3, channel))
            offset = load(bias, (channel,))
            _history(x_rows, x, b, channel, order, now, now + known)
            _gather(g, du, b, channel, places[start : start + known])
            g[known : count + TAPS - 1] = 0
            for t in range(known):
                value = _convolve(x_rows, t, w0, w1, w2, w3, offset)
                s = sigmoid(value)
                store(g, t, load(g, t) * s * fma(value, one - s, one))
            d0, d1, d2, d3, dsum = zero, zero, zero, zero, zero
            for t in range(count):
                store(out, t, _convolve(g, t, w3, w2, w1, w0, zero))
                slope = load(g, t)
                d0, d1 = fma(slope, load(x_rows, t), d0), fma(slope, load(x_rows, t + 1), d1)
                d2, d3 = fma(slope, load(x_rows, t + 2), d2), fma(slope, load(x_rows, t + 3), d3)
                dsum = dsum + slope
            _scatter(dx, out, b, channel, order[now : now + count])
            store(dweights, (b, 0, channel), load(dweights, (b, 0, channel)) + d0)
            store(dweights, (b, 1, channel), load(dweights, (b, 1, channel)) + d1)
            store(dweights, (b, 2, channel), load(dweights, (b, 2, channel)) + d2)
            store(dweights, (b, 3, channel), load(dweights, (b, 3, channel)) + d3)
            store(dbias, (b, channel), load(dbias, (b, channel)) + dsum)
