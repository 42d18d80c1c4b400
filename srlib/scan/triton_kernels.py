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
def _inter_slice(step, length, slice_length):
    """The token that the inter-slice order visits at `step`."""
    whole = length // slice_length  # slices that have all their tokens
    rest = length - whole * slice_length  # tokens of the slice after them
    late = step >= rest * (whole + 1)  # past the tokens that this slice has too
    per_row = tl.where(late, whole, whole + 1)
    since = tl.where(late, step - rest * (whole + 1), step)
    row = since // per_row
    return tl.where(late, rest, 0) + row + (since - row * per_row) * slice_length


@triton.jit
def _token(step, length, slice_length, ORDER: tl.constexpr):
    """The token visited at `step`, and its place in its slice, which `_next` wants to know."""
    if ORDER == "forward":
        token = step
    elif ORDER == "reverse":
        token = length - 1 - step
    else:
        token = _inter_slice(step, length, slice_length)
    return token, token % slice_length


@triton.jit
def _next(token, row, length, slice_length, ORDER: tl.constexpr):
    """The token visited after `token`, and its place in its slice."""
    if ORDER == "forward":
        token += 1
    elif ORDER == "reverse":
        token -= 1
    else:
        token += slice_length
        wraps = token >= length
        row += wraps.to(tl.int32)
        token = tl.where(wraps, row, token)
    return token, row


@triton.jit
def _apart(block, BLOCK: tl.constexpr):
    """The channels of a block; told less than is known of them, the compiler spreads them out."""
    return tl.multiple_of(block * BLOCK + tl.arange(0, BLOCK), 1)


@triton.jit
def _sums(values, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of TILE vectors (BLOCK,): that of vector k in the places from k BLOCK / TILE on, in so many.

    Two threads give each other the half that the other one goes on with: for 8 vectors of a warp 9 shuffles, not 40.
    """
    place = tl.arange(0, BLOCK)
    for level in tl.static_range(TILE):
        if TILE >> level > 1:
            other, high, half = place ^ (BLOCK >> level + 1), place & (BLOCK >> level + 1), ()
            for k in tl.static_range(TILE >> level + 1):
                a, b = values[k], values[k + (TILE >> level + 1)]
                given = tl.gather(tl.where(high != 0, a, b), other, 0)
                half = half + (tl.where(high != 0, b, a) + given,)
            values = half
    total = values[0]
    for level in tl.static_range(BLOCK):
        if BLOCK // TILE >> level > 1:
            total += tl.gather(total, place ^ (BLOCK // TILE >> level + 1), 0)
    return total


@triton.jit
def _one_of_each(TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One place of each of `_sums`."""
    return tl.arange(0, BLOCK) % (BLOCK // TILE) == 0


@triton.jit
def _place(t, stride, b, d, token):
    """Pointers to the channels `d` of `token` in a sequence with strides of (B, D, L)."""
    return (
        t + b.to(tl.int64) * stride[0] + d.to(tl.int64) * stride[1] + token.to(tl.int64) * stride[2]
    )


@triton.jit
def _take(t, stride, b, d, token, mask):
    return tl.load(_place(t, stride, b, d, token), mask, 0.0)


@triton.jit
def _take_all(u, u_stride, delta, delta_stride, z, z_stride, b, d, token, mask):
    x = _take(u, u_stride, b, d, token, mask)
    gate = x
    if z is not None:
        gate = _take(z, z_stride, b, d, token, mask)
    return x, _take(delta, delta_stride, b, d, token, mask), gate


@triton.jit
def walk(
    u, u_stride, delta, delta_stride, z, z_stride, y, y_stride,
    A, B, C, D, bias, starts, ends, totals,
    length, slice_length, chunks, channels, states: tl.constexpr,
    per_chunk, BLOCK: tl.constexpr, STATES: tl.constexpr,
    ORDER: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Each chunk's output y from the state it starts from (B, chunks, N, D).

    Without starts: no output, but where the chunk ends from a zero state, and its sum of dt.
    """
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d = _apart(tl.program_id(1), BLOCK)
    n = tl.arange(0, STATES)
    inside, real = d < channels, n < states
    both = real[:, None] & inside[None, :]
    a = tl.load(A + n[:, None] * channels + d[None, :], both, 0.0)
    shift = tl.load(bias + d, inside, 0.0)
    row = b * chunks + chunk
    place = row * states * channels + n[:, None] * channels + d[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    if starts is None:
        h = tl.zeros((STATES, BLOCK), tl.float32)
    else:
        h = tl.load(starts + place, both, 0.0)
        direct = tl.load(D + d, inside, 0.0)
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, length)
    token, in_slice = _token(first, length, slice_length, ORDER)
    x, raw, gate = _take_all(u, u_stride, delta, delta_stride, z, z_stride, b, d, token, inside)
    weights = (b * length + token) * states + n
    into, out = tl.load(B + weights, real, 0.0), tl.load(C + weights, real, 0.0)
    for step in range(first, last):
        here = token
        token, in_slice = _next(token, in_slice, length, slice_length, ORDER)
        ahead = d < tl.where(step + 1 < last, channels, 0)  # loaded while this step is computed
        later_x, later_raw, later_gate = _take_all(
            u, u_stride, delta, delta_stride, z, z_stride, b, d, token, ahead
        )
        weights = (b * length + tl.where(step + 1 < last, token, here)) * states + n
        later_into = tl.load(B + weights, real, 0.0)
        if starts is not None:
            later_out = tl.load(C + weights, real, 0.0)
        x = x.to(tl.float32)
        dt = _step_size(raw.to(tl.float32) + shift, SOFTPLUS)
        h = tl.exp2(dt[None, :] * a) * h + (dt * x)[None, :] * into[:, None]
        total += dt
        if starts is not None:
            result = tl.sum(h * out[:, None], 0) + direct * x
            if z is not None:
                gate = gate.to(tl.float32)
                result *= gate * _sigmoid(gate)
            tl.store(_place(y, y_stride, b, d, here), result, inside)
        x, raw, gate = later_x, later_raw, later_gate
        into = later_into
        if starts is not None:
            out = later_out
    if starts is None:
        tl.store(ends + place, h, both)
        tl.store(totals + row * channels + d, total, inside)


@triton.jit
def _then(decay, h, later_decay, later_h):
    return decay * later_decay, later_decay * h + later_h


@triton.jit(do_not_specialize=("batch", "chunks"))
def join(
    ends, totals, A, starts, batch, chunks, channels: tl.constexpr, states: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to a zero state to the state that each chunk starts from.

    Each `batch` of sequences has its own A.
    """
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    A += (b // batch) * states * channels
    d = _apart(tl.program_id(0), BLOCK)
    r = tl.arange(0, ROWS)[:, None]
    inside = d < channels
    a = tl.load(A + n * channels + d, inside, 0.0)
    first = b * chunks + (chunks - 1 if BACKWARDS else 0)
    step: tl.constexpr = -1 if BACKWARDS else 1
    totals += first * channels + d[None, :] + step * r * channels
    ends += (first * states + n) * channels + d[None, :] + step * r * states * channels
    starts += (first * states + n) * channels + d[None, :] + step * (r + 1) * states * channels
    h = tl.zeros((BLOCK,), tl.float32)
    tl.store(starts - step * (r + 1) * states * channels, 0.0, (r == 0) & inside[None, :])
    total = tl.load(totals, (r < chunks) & inside[None, :], 0.0)
    added = tl.load(ends, (r < chunks) & inside[None, :], 0.0)
    for k in range(0, chunks, ROWS):
        totals += step * ROWS * channels
        ends += step * ROWS * states * channels
        ahead = (k + ROWS + r < chunks) & inside[None, :]  # loaded while these rows are joined
        later_total, later_added = tl.load(totals, ahead, 0.0), tl.load(ends, ahead, 0.0)
        decay = tl.exp2(total * a)
        added += tl.where(r == 0, decay * h[None, :], -0.0)
        decay, after = tl.associative_scan((decay, added), 0, _then)
        tl.store(starts, after, (k + 1 + r < chunks) & inside[None, :])
        starts += step * ROWS * states * channels
        h = tl.sum(tl.where(r == ROWS - 1, after, -0.0), 0)
        total, added = later_total, later_added


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
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, length)
    token, row = _token(first, length, slice_length, ORDER)
    x, raw, gate = _take_all(u, u_stride, delta, delta_stride, z, z_stride, b, d, token, inside)
    g = _take(grad, grad_stride, b, d, token, inside)
    by_block = dC + block.to(tl.int64) * tl.num_programs(2) * length * states
    for step in range(first, last):
        if step % TILE == 0:
            tile = (b * tiles + step // TILE) * states * channels
            tl.store(tile_starts + tile + place, h, both)
        weights = (b * length + token) * states + n
        into, out = tl.load(B + weights, real, 0.0), tl.load(C + weights, real, 0.0)
        dz_at = _place(grad if z is None else dz, dz_stride, b, d, token)
        token, row = _next(token, row, length, slice_length, ORDER)
        ahead = d < tl.where(step + 1 < last, channels, 0)
        later_x, later_raw, later_gate = _take_all(
            u, u_stride, delta, delta_stride, z, z_stride, b, d, token, ahead
        )
        later_g = _take(grad, grad_stride, b, d, token, ahead)
        x, g = x.to(tl.float32), g.to(tl.float32)
        dt = _step_size(raw.to(tl.float32) + shift, SOFTPLUS)
        decay = tl.exp2(dt[None, :] * a)
        h = decay * h + (dt * x)[None, :] * into[:, None]
        if z is not None:
            gate = gate.to(tl.float32)
            s = _sigmoid(gate)
            ungated = tl.sum(h * out[:, None], 0) + direct * x
            tl.store(dz_at, g * ungated * s * (1 + gate * (1 - s)), inside)
            g *= gate * s
        tl.store(by_block + weights, tl.sum(g[None, :] * h, 1), real)
        since_start *= decay
        carry += since_start * (g[None, :] * out[:, None])
        total += dt
        x, raw, gate, g = later_x, later_raw, later_gate, later_g
    at = b * chunks + chunk
    tl.store(carries + at * states * channels + place, carry, both)
    tl.store(totals + at * channels + d, total, inside)


@triton.jit
def gradients(
    u, u_stride, delta, delta_stride, z, z_stride, grad, grad_stride,
    du, du_stride, ddelta, ddelta_stride, A, B, C, D, bias, tile_starts, carries, dB, dA, dD, dbias,
    length, slice_length, chunks, tiles, channels, states: tl.constexpr,
    per_chunk, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
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
    by_block = dB + block.to(tl.int64) * tl.num_programs(2) * padded * states
    carries_at = carries + row * states * channels + d
    dA_at = dA + row * states * channels + d
    for i in range(here):
        tile = first_tile + here - 1 - i
        origin, in_slice = _token(tile * TILE, length, slice_length, ORDER)
        token = origin
        u_at = _place(u, u_stride, b, d, origin)
        delta_at = _place(delta, delta_stride, b, d, origin)
        grad_at = _place(grad, grad_stride, b, d, origin)
        offsets, masks, dts, inputs, gs, by_x, by_exponent = (), (), (), (), (), (), ()
        for k in tl.static_range(TILE):
            real = tile * TILE + k < length
            mask = d < tl.where(real, channels, 0)
            if ORDER == "inter_slice":
                token = tl.where(real, token, length)
            offset = (token - origin).to(tl.int64)
            x = tl.load(u_at + offset * u_stride[2], mask, 0.0).to(tl.float32)
            raw = tl.load(delta_at + offset * delta_stride[2], mask, 0.0).to(tl.float32) + shift
            dt = tl.where(mask, _step_size(raw, SOFTPLUS), 0.0)
            g = tl.load(grad_at + offset * grad_stride[2], mask, 0.0).to(tl.float32)
            if z is not None:
                gate = _take(z, z_stride, b, d, token, mask).to(tl.float32)
                g *= gate * _sigmoid(gate)
            offsets, masks, gs = offsets + (offset,), masks + (mask,), gs + (g,)
            dts, inputs = dts + (dt,), inputs + (dt * x,)
            by_x = by_x + (tl.zeros((BLOCK,), tl.float32),)
            by_exponent = by_exponent + (tl.zeros((BLOCK,), tl.float32),)
            token, in_slice = _next(token, in_slice, length, slice_length, ORDER)
        weights = (b * padded + TILE + origin) * states
        steps = tile * TILE + tl.arange(0, BLOCK) // (BLOCK // TILE)
        tokens, _ = _token(steps, length, slice_length, ORDER)
        if ORDER == "inter_slice":
            tokens = tl.where(steps < length, tokens, length)
        sums_at = by_block + (b * padded + TILE + tokens) * states
        starts_at = tile_starts + (b * tiles + tile) * states * channels + d
        a, h = tl.load(A + d, inside, 0.0), tl.load(starts_at, inside, 0.0)
        p = tl.load(carries_at, inside, 0.0)
        for n in range(states):
            ahead = d < tl.where(n + 1 < states, channels, 0)
            later = (n + 1) * channels  # loaded while this state is computed
            later_a = tl.load(A + later + d, ahead, 0.0)
            later_h = tl.load(starts_at + later, ahead, 0.0)
            later_p = tl.load(carries_at + later, ahead, 0.0)
            sum_A = tl.load(dA_at + n * channels, d < tl.where(i > 0, channels, 0), 0.0)
            intos, outs = (), ()
            for k in tl.static_range(TILE):
                intos = intos + (tl.load(B + weights + n + offsets[k] * states),)
                outs = outs + (tl.load(C + weights + n + offsets[k] * states),)
            decays, befores = (), ()
            for k in tl.static_range(TILE):
                decay = tl.exp2(dts[k] * a)
                before = decay * h
                h = before + inputs[k] * intos[k]
                decays, befores = decays + (decay,), befores + (before,)
            later_x, later_exponent, by_into = (), (), ()
            for k in tl.static_range(TILE - 1, -1, -1):
                q = gs[k] * outs[k] + p
                p = decays[k] * q
                by_decay = q * befores[k]
                sum_A += by_decay * dts[k]
                later_x = (by_x[k] + q * intos[k],) + later_x
                later_exponent = (by_exponent[k] + by_decay * a,) + later_exponent
                by_into = (q * inputs[k],) + by_into
            by_x, by_exponent = later_x, later_exponent
            tl.store(sums_at + n, _sums(by_into, TILE, BLOCK), _one_of_each(TILE, BLOCK))
            tl.store(dA_at + n * channels, sum_A, inside)
            tl.store(carries_at + n * channels, p, inside)
            a, h, p = later_a, later_h, later_p
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
