"""Triton kernels of the selective scan; `triton.py` launches them and says how they work together.

Symbols: h the state, dt the step size, decay = exp(dt A), g the gradient of the loss by what the gate
multiplies, q the gradient by h. A *step* is a place in the order of visit, a *token* one in memory.
Sequences of channels come with their strides; A transposed to (N, D) and times log2(e), so that a decay
is one exp2; B, C and their gradients as float32 rows (B, L, N).

Where a thread keeps one channel, all sums over states and all steps of a recurrence stay within it:
`_apart` sees to that, as blocks of 32 channels are otherwise dealt out four to a thread.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

# log1p(y) / y on [0, 1], within 1e-8.
_series = np.polynomial.Chebyshev.interpolate(lambda y: np.log1p(y) / y, 9, domain=[0, 1])
LOG1P = tl.constexpr(tuple(_series.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()))
TERMS = tl.constexpr(10)
LOG2E = tl.constexpr(float(np.log2(np.e)))
UNROLL = tl.constexpr(4)


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr):
    if not SOFTPLUS:
        return raw
    y = tl.exp2(tl.abs(raw) * -LOG2E)
    ratio = tl.full(y.shape, LOG1P[0], tl.float32)
    for power in tl.static_range(TERMS - 1):
        ratio = ratio * y + LOG1P[power + 1]
    return tl.where(raw > 0, raw, 0.0) + y * ratio


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def _token(step, length, slice_length, ORDER: tl.constexpr):
    """The token visited at `step`; past the end, one at most as far outside of the sequence."""
    if ORDER == "forward":
        token = step
    elif ORDER == "reverse":
        token = length - 1 - step
    else:
        whole = length // slice_length  # slices that have all their tokens
        rest = length - whole * slice_length  # tokens of the slice after them
        late = step >= rest * (whole + 1)  # past the tokens that this slice has too
        per_row = tl.where(late, whole, whole + 1)
        since = tl.where(late, step - rest * (whole + 1), step)
        row = since // per_row
        token = tl.where(late, rest, 0) + row + (since - row * per_row) * slice_length
        token = tl.where(step < length, token, length)
    return token


@triton.jit
def _apart(block, BLOCK: tl.constexpr):
    """The channels of a block; told less than is known of them, the compiler spreads them out."""
    return tl.multiple_of(block * BLOCK + tl.arange(0, BLOCK), 1)


@triton.jit
def _place(t, stride, b, d, token):
    """Pointers to the channels `d` of `token` in a sequence with strides of (B, D, L)."""
    return t + b.to(tl.int64) * stride[0] + d * stride[1] + token.to(tl.int64) * stride[2]


@triton.jit
def _take(t, stride, b, d, token, mask):
    return tl.load(_place(t, stride, b, d, token), mask, 0.0).to(tl.float32)


@triton.jit
def chunk_ends(
    u, u_stride, delta, delta_stride, A, B, bias, ends, totals,
    length, slice_length, chunks, channels, states: tl.constexpr,
    per_chunk, BLOCK: tl.constexpr, STATES: tl.constexpr,
    ORDER: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The state at each chunk's end from zero at its start (B, chunks, N, D), and its sum of dt."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d = _apart(tl.program_id(1), BLOCK)
    n = tl.arange(0, STATES)
    inside, real = d < channels, n < states
    place = n[:, None] * channels + d[None, :]
    both = real[:, None] & inside[None, :]
    a = tl.load(A + place, both, 0.0)
    shift = tl.load(bias + d, inside, 0.0)
    h = tl.zeros((STATES, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    last = tl.minimum(chunk * per_chunk + per_chunk, length)
    for step in tl.range(chunk * per_chunk, last, loop_unroll_factor=UNROLL):
        token = _token(step, length, slice_length, ORDER)
        x = _take(u, u_stride, b, d, token, inside)
        dt = _step_size(_take(delta, delta_stride, b, d, token, inside) + shift, SOFTPLUS)
        into = tl.load(B + (b * length + token) * states + n, real, 0.0)
        h = tl.exp2(dt[None, :] * a) * h + (dt * x)[None, :] * into[:, None]
        total += dt
    row = b * chunks + chunk
    tl.store(ends + row * states * channels + place, h, both)
    tl.store(totals + row * channels + d, total, inside)


@triton.jit
def _then(decay, h, later_decay, later_h):
    return decay * later_decay, later_decay * h + later_h


@triton.jit
def join(
    ends, totals, A, starts, chunks, channels, states: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to a zero state to the state that each chunk starts from."""
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = _apart(tl.program_id(0), BLOCK)
    r = tl.arange(0, ROWS)
    inside = d < channels
    a = tl.load(A + n * channels + d, inside, 0.0)
    h = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks, ROWS):
        k = first + r
        chunk = b * chunks + (chunks - 1 - k if BACKWARDS else k)
        mask = (k < chunks)[:, None] & inside[None, :]
        decay = tl.exp2(tl.load(totals + chunk[:, None] * channels + d[None, :], mask, 0.0) * a)
        place = (chunk[:, None] * states + n) * channels + d[None, :]
        added = tl.load(ends + place, mask, 0.0)
        added += tl.where(r[:, None] == 0, decay * h[None, :], -0.0)
        decay, after = tl.associative_scan((decay, added), 0, _then)
        following = -states * channels if BACKWARDS else states * channels
        tl.store(starts + place + following, after, mask & (k < chunks - 1)[:, None])
        h = tl.sum(tl.where(r[:, None] == ROWS - 1, after, -0.0), 0)
    edge = b * chunks + (chunks - 1 if BACKWARDS else 0)
    tl.store(starts + (edge * states + n) * channels + d, tl.zeros((BLOCK,), tl.float32), inside)


@triton.jit
def outputs(
    u, u_stride, delta, delta_stride, z, z_stride, y, y_stride, A, B, C, D, bias, starts,
    length, slice_length, chunks, channels, states: tl.constexpr,
    per_chunk, BLOCK: tl.constexpr, STATES: tl.constexpr,
    ORDER: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The output, each chunk from the state it starts from."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d = _apart(tl.program_id(1), BLOCK)
    n = tl.arange(0, STATES)
    inside, real = d < channels, n < states
    place = n[:, None] * channels + d[None, :]
    both = real[:, None] & inside[None, :]
    a = tl.load(A + place, both, 0.0)
    shift = tl.load(bias + d, inside, 0.0)
    direct = tl.load(D + d, inside, 0.0)
    h = tl.load(starts + (b * chunks + chunk) * states * channels + place, both, 0.0)
    last = tl.minimum(chunk * per_chunk + per_chunk, length)
    for step in tl.range(chunk * per_chunk, last, loop_unroll_factor=UNROLL):
        token = _token(step, length, slice_length, ORDER)
        x = _take(u, u_stride, b, d, token, inside)
        dt = _step_size(_take(delta, delta_stride, b, d, token, inside) + shift, SOFTPLUS)
        row = (b * length + token) * states + n
        into, out = tl.load(B + row, real, 0.0), tl.load(C + row, real, 0.0)
        h = tl.exp2(dt[None, :] * a) * h + (dt * x)[None, :] * into[:, None]
        result = tl.sum(h * out[:, None], 0) + direct * x
        if z is not None:
            gate = _take(z, z_stride, b, d, token, inside)
            result *= gate * _sigmoid(gate)
        tl.store(_place(y, y_stride, b, d, token), result, inside)


@triton.jit
def chunk_carries(
    u, u_stride, delta, delta_stride, z, z_stride, grad, grad_stride, dz, dz_stride,
    A, B, C, D, bias, starts, tile_starts, carries, totals, dC,
    length, slice_length, chunks, tiles, channels, states: tl.constexpr,
    per_chunk, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
    ORDER: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Once more through the states: dz, dC, the state before each tile, and the chunk's carry.

    The carry is what the chunk's own gradients add to decay q at its first step, with zero after it.
    """
    chunk, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = block * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    inside, real = d < channels, n < states
    place = n[:, None] * channels + d[None, :]
    both = real[:, None] & inside[None, :]
    a = tl.load(A + place, both, 0.0)
    shift = tl.load(bias + d, inside, 0.0)
    direct = tl.load(D + d, inside, 0.0)
    h = tl.load(starts + (b * chunks + chunk) * states * channels + place, both, 0.0)
    since_start = tl.full((STATES, BLOCK), 1.0, tl.float32)
    carry = tl.zeros((STATES, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    last = tl.minimum(chunk * per_chunk + per_chunk, length)
    for first in range(chunk * per_chunk, last, TILE):
        tile = (b * tiles + first // TILE) * states * channels
        tl.store(tile_starts + tile + place, h, both)
        for step in range(first, tl.minimum(first + TILE, last)):
            token = _token(step, length, slice_length, ORDER)
            x = _take(u, u_stride, b, d, token, inside)
            dt = _step_size(_take(delta, delta_stride, b, d, token, inside) + shift, SOFTPLUS)
            g = _take(grad, grad_stride, b, d, token, inside)
            row = (b * length + token) * states + n
            into, out = tl.load(B + row, real, 0.0), tl.load(C + row, real, 0.0)
            decay = tl.exp2(dt[None, :] * a)
            h = decay * h + (dt * x)[None, :] * into[:, None]
            if z is not None:
                gate = _take(z, z_stride, b, d, token, inside)
                s = _sigmoid(gate)
                ungated = tl.sum(h * out[:, None], 0) + direct * x
                by_gate = g * ungated * s * (1 + gate * (1 - s))
                tl.store(_place(dz, dz_stride, b, d, token), by_gate, inside)
                g *= gate * s
            by_out = tl.sum(g[None, :] * h, 1)
            tl.store(dC + block * tl.num_programs(2) * length * states + row, by_out, real)
            since_start *= decay
            carry += since_start * (g[None, :] * out[:, None])
            total += dt
    row = b * chunks + chunk
    tl.store(carries + row * states * channels + place, carry, both)
    tl.store(totals + row * channels + d, total, inside)


@triton.jit
def gradients(
    u, u_stride, delta, delta_stride, z, z_stride, grad, grad_stride,
    du, du_stride, ddelta, ddelta_stride, A, B, C, D, bias, tile_starts, carries, dB, dA, dD, dbias,
    length, slice_length, chunks, tiles, channels, states: tl.constexpr,
    per_chunk, TILE: tl.constexpr, BLOCK: tl.constexpr,
    ORDER: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The other gradients, tile by tile from each chunk's end; `carries` is used up on the way."""
    chunk, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = _apart(block, BLOCK)
    inside = d < channels
    shift = tl.load(bias + d, inside, 0.0)
    direct = tl.load(D + d, inside, 0.0)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    row = b * chunks + chunk
    first_tile = chunk * (per_chunk // TILE)
    here = tl.minimum(tiles - first_tile, per_chunk // TILE)
    padded = length + 2 * TILE
    slab = block.to(tl.int64) * tl.num_programs(2) * padded * states
    for i in range(here):
        tile = first_tile + here - 1 - i
        origin = _token(tile * TILE, length, slice_length, ORDER)
        u_at = _place(u, u_stride, b, d, origin)
        delta_at = _place(delta, delta_stride, b, d, origin)
        grad_at = _place(grad, grad_stride, b, d, origin)
        offsets, masks, dts, inputs, gs, by_x, by_exponent = (), (), (), (), (), (), ()
        for k in tl.static_range(TILE):
            step = tile * TILE + k
            offset = (_token(step, length, slice_length, ORDER) - origin).to(tl.int64)
            mask = d < tl.where(step < length, channels, 0)
            x = tl.load(u_at + offset * u_stride[2], mask, 0.0).to(tl.float32)
            raw = tl.load(delta_at + offset * delta_stride[2], mask, 0.0).to(tl.float32) + shift
            dt = tl.where(mask, _step_size(raw, SOFTPLUS), 0.0)
            g = tl.load(grad_at + offset * grad_stride[2], mask, 0.0).to(tl.float32)
            if z is not None:
                gate = _take(z, z_stride, b, d, origin + offset, mask)
                g *= gate * _sigmoid(gate)
            offsets, masks, gs = offsets + (offset,), masks + (mask,), gs + (g,)
            dts, inputs = dts + (dt,), inputs + (dt * x,)
            by_x = by_x + (tl.zeros((BLOCK,), tl.float32),)
            by_exponent = by_exponent + (tl.zeros((BLOCK,), tl.float32),)
        rows = (b * padded + TILE + origin) * states
        for n in range(states):
            place = (row * states + n) * channels + d
            a = tl.load(A + n * channels + d, inside, 0.0)
            h = tl.load(tile_starts + ((b * tiles + tile) * states + n) * channels + d, inside, 0.0)
            p = tl.load(carries + place, inside, 0.0)
            decays, befores, intos = (), (), ()
            for k in tl.static_range(TILE):
                into = tl.load(B + rows + n + offsets[k] * states)
                decay = tl.exp2(dts[k] * a)
                before = decay * h
                h = before + inputs[k] * into
                decays, befores, intos = decays + (decay,), befores + (before,), intos + (into,)
            sum_A = tl.zeros((BLOCK,), tl.float32)
            if i > 0:
                sum_A = tl.load(dA + place, inside, 0.0)
            next_x, next_exponent = (), ()
            for k in tl.static_range(TILE - 1, -1, -1):
                q = gs[k] * tl.load(C + rows + n + offsets[k] * states) + p
                p = decays[k] * q
                tl.store(dB + slab + rows + n + offsets[k] * states, tl.sum(q * inputs[k], 0))
                by_decay = q * befores[k]
                sum_A += by_decay * dts[k]
                next_x = (by_x[k] + q * intos[k],) + next_x
                next_exponent = (by_exponent[k] + by_decay * a,) + next_exponent
            by_x, by_exponent = next_x, next_exponent
            tl.store(dA + place, sum_A, inside)
            tl.store(carries + place, p, inside)
        du_at = _place(du, du_stride, b, d, origin)
        ddelta_at = _place(ddelta, ddelta_stride, b, d, origin)
        for k in tl.static_range(TILE):
            x = tl.load(u_at + offsets[k] * u_stride[2], masks[k], 0.0).to(tl.float32)
            by_dt = x * by_x[k] + by_exponent[k] * (1 / LOG2E)
            if SOFTPLUS:
                raw = tl.load(delta_at + offsets[k] * delta_stride[2], masks[k], 0.0)
                by_dt *= _sigmoid(raw.to(tl.float32) + shift)
            tl.store(du_at + offsets[k] * du_stride[2], dts[k] * by_x[k] + direct * gs[k], masks[k])
            tl.store(ddelta_at + offsets[k] * ddelta_stride[2], by_dt, masks[k])
            sum_D += gs[k] * x
            sum_bias += tl.where(masks[k], by_dt, 0.0)
        tl.debug_barrier()  # the next tile reads the carries that this one wrote
    tl.store(dD + row * channels + d, sum_D, inside)
    tl.store(dbias + row * channels + d, sum_bias, inside)
