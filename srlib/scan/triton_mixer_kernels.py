"""Triton kernels of the fused mixer, the gate, LayerNorm and upsampling; `triton_mixer.py` launches them.

Every order has its own sequences, in its *order of visit*: `convolve` reads the tokens of x where they lie and
writes u as the order visits them, so that u, what is projected from it and their gradients are plain sequences.
Only y and its gradient lie as x does. Sequences (orders * B, padded, channels) are filled up with steps of u = 0
to whole tiles; they change nothing, as they come last. `row` counts orders and images together.

Symbols as in `triton_kernels`: h the state, g the gradient by y, q the gradient by h. Orders are numbers, their
places in `ORDERS`; those of a launch are two bits each of `orders`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import LOG2E, _apart, _inter_slice, _one_of_each, _sigmoid, _step_size, _sums

# Sizes that differ from image to image: no kernel is compiled anew for them.
SIZES = ("orders", "length", "padded", "slice_length", "batch", "chunks", "per_chunk")


@triton.jit
def visited(step, order, length, slice_length):
    """The token that is visited at `step`."""
    token = _inter_slice(step, length, slice_length)
    return tl.where(order == 0, step, tl.where(order == 1, length - 1 - step, token))


@triton.jit
def visit(token, order, length, slice_length):
    """The step at which `token` is visited: the inverse of `visited`."""
    whole = length // slice_length
    rest = length - whole * slice_length
    row = token % slice_length
    step = row * whole + tl.minimum(row, rest) + token // slice_length
    return tl.where(order == 0, token, tl.where(order == 1, length - 1 - token, step))


@triton.jit
def _following(token, row, order, length, slice_length):
    """The token visited after `token`, and its place in its slice; past the last step anything."""
    token += tl.where(order == 0, 1, tl.where(order == 1, -1, slice_length))
    wraps = token >= length
    row += wraps.to(tl.int32)
    return tl.where(wraps, row, token), row


@triton.jit
def _preceding(token, row, order, length, slice_length):
    """The token visited before `token`, and its place in its slice; before the first step anything."""
    token -= tl.where(order == 0, 1, tl.where(order == 1, -1, slice_length))
    wraps = (order == 2) & (token < 0)
    row -= wraps.to(tl.int32)
    whole = length // slice_length
    before = tl.where(row < length - whole * slice_length, whole, whole - 1)  # it, in its row
    return tl.where(wraps, row + before * slice_length, token), row


@triton.jit
def _order_of(orders, row, batch):
    scan = row // batch
    return (orders >> (2 * scan)) & 3, scan


@triton.jit(do_not_specialize=SIZES)
def convolve(
    x, x_row, u, weight, bias, orders, length, padded, slice_length, batch,
    channels: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The causal convolution with SiLU: x (B, L, E) -> u (rows, padded, E) in the order of visit."""
    row = tl.program_id(2)
    order, scan = _order_of(orders, row, batch)
    step = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < channels
    total, _ = _convolved(
        x, x_row, weight, bias, step, d, row, scan, order, length, slice_length, batch, channels, TAPS
    )  # fmt: skip
    result = tl.where((step < length)[:, None], total * _sigmoid(total), 0.0)
    at = (row.to(tl.int64) * padded + step[:, None]) * channels + d[None, :]
    tl.store(u + at, result, (step < padded)[:, None] & inside[None, :])


@triton.jit
def _convolved(
    x, x_row, weight, bias, step, d, row, scan, order, length, slice_length, batch,
    channels: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The argument of SiLU (steps, channels), and x under each tap, the last one first."""
    inside = d < channels
    x += (row % batch).to(tl.int64) * length * x_row
    total = tl.load(bias + scan * channels + d, inside, 0.0)[None, :]
    token = visited(step, order, length, slice_length)
    in_slice = token % slice_length
    values = ()
    for back in tl.static_range(TAPS):
        there = (step >= back) & (step < length)
        at = token[:, None].to(tl.int64) * x_row + d[None, :]
        value = tl.load(x + at, there[:, None] & inside[None, :], 0.0).to(tl.float32)
        w = tl.load(weight + (scan * channels + d) * TAPS + TAPS - 1 - back, inside, 0.0)
        total += value * w[None, :]
        values += (value,)
        token, in_slice = _preceding(token, in_slice, order, length, slice_length)
    return total, values


@triton.jit(do_not_specialize=SIZES)
def through_silu(
    x, x_row, du, weight, bias, sums, orders, length, padded, slice_length, batch,
    channels: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`du` becomes the gradient by what SiLU was applied to; a program's sums for bias and taps.

    sums: (rows, programs, (1 + TAPS) E), those for taps as (E, TAPS).
    """
    row = tl.program_id(2)
    order, scan = _order_of(orders, row, batch)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < channels
    by_bias = tl.zeros((STEPS, BLOCK), tl.float32)
    by_tap = ()
    for tap in tl.static_range(TAPS):
        by_tap += (tl.zeros((STEPS, BLOCK), tl.float32),)
    for first in range(tl.program_id(0) * STEPS, length, tl.num_programs(0) * STEPS):
        step = first + tl.arange(0, STEPS)
        total, values = _convolved(
            x, x_row, weight, bias, step, d, row, scan, order, length, slice_length, batch, channels, TAPS
        )  # fmt: skip
        both = (step < length)[:, None] & inside[None, :]
        at = (row.to(tl.int64) * padded + step[:, None]) * channels + d[None, :]
        s = _sigmoid(total)
        grad = tl.load(du + at, both, 0.0).to(tl.float32) * s * (1 + total * (1 - s))
        tl.store(du + at, grad, both)
        by_bias += grad
        later = ()
        for tap in tl.static_range(TAPS):
            later += (by_tap[tap] + grad * values[TAPS - 1 - tap],)
        by_tap = later
    program = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    sums += program * (1 + TAPS) * channels
    tl.store(sums + d, tl.sum(by_bias, 0), inside)
    for tap in tl.static_range(TAPS):
        tl.store(sums + channels + d * TAPS + tap, tl.sum(by_tap[tap], 0), inside)


@triton.jit(do_not_specialize=SIZES)
def unconvolve(
    by_total, weight, dx, orders, count: tl.constexpr, length, padded, slice_length, batch,
    channels: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient by x (B, L, E), the sum over `count` orders, from what `through_silu` left."""
    token = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2)
    inside = d < channels
    total = tl.zeros((STEPS, BLOCK), tl.float32)
    for scan in tl.static_range(count):
        step = visit(token, (orders >> (2 * scan)) & 3, length, slice_length)
        row = (scan * batch + b).to(tl.int64) * padded
        for tap in tl.static_range(TAPS):
            target = step + (TAPS - 1 - tap)
            there = ((target < length) & (token < length))[:, None] & inside[None, :]
            at = (row + target[:, None]) * channels + d[None, :]
            w = tl.load(weight + (scan * channels + d) * TAPS + tap, inside, 0.0)
            total += tl.load(by_total + at, there, 0.0).to(tl.float32) * w[None, :]
    at = (b.to(tl.int64) * length + token[:, None]) * channels + d[None, :]
    tl.store(dx + at, total, (token < length)[:, None] & inside[None, :])


@triton.jit
def _row_of(weights, n, states: tl.constexpr, STATES: tl.constexpr):
    if states == STATES:
        row = tl.load(weights + n)
    else:
        row = tl.load(weights + n, n < states, 0.0)
    return row


@triton.jit(do_not_specialize=SIZES)
def walk_orders(
    u, delta, rows, A, D, bias, starts, ends, totals, y, orders, length, padded, slice_length, batch,
    chunks, per_chunk, channels: tl.constexpr, states: tl.constexpr, ROW: tl.constexpr,
    RANK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Each chunk's output y (rows, L, E) in memory order from the state it starts from.

    Without starts: no output, but where the chunk ends from a zero state, and its sum of dt.
    """
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    order, scan = _order_of(orders, tl.program_id(2), batch)
    d = _apart(tl.program_id(1), BLOCK)
    n = tl.arange(0, STATES)
    inside, real = d < channels, n < states
    both = real[:, None] & inside[None, :]
    a = tl.load(A + scan * states * channels + n[:, None] * channels + d[None, :], both, 0.0)
    shift = tl.load(bias + scan * channels + d, inside, 0.0)
    at = row * chunks + chunk
    place = at * states * channels + n[:, None] * channels + d[None, :]
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, padded)
    u += (row * padded + first) * channels + d
    delta += (row * padded + first) * channels + d
    rows += (row * padded + first) * ROW + RANK
    total = tl.zeros((BLOCK,), tl.float32)
    x, raw = tl.load(u, inside, 0.0), tl.load(delta, inside, 0.0)
    into = _row_of(rows, n, states, STATES)
    if starts is None:
        h = tl.zeros((STATES, BLOCK), tl.float32)
        for step in range(first, last):
            more = step + 1 < last  # what the next step needs is loaded while this one is computed
            u += channels
            delta += channels
            rows += tl.where(more, ROW, 0)
            ahead = d < tl.where(more, channels, 0)
            later_x, later_raw = tl.load(u, ahead, 0.0), tl.load(delta, ahead, 0.0)
            later_into = _row_of(rows, n, states, STATES)
            dt = _step_size(raw.to(tl.float32) + shift, True)
            by_x = (dt * x.to(tl.float32))[None, :]
            h = tl.exp2(dt[None, :] * a) * h + by_x * into.to(tl.float32)[:, None]
            total += dt
            x, raw, into = later_x, later_raw, later_into
        tl.store(ends + place, h, both)
        tl.store(totals + at * channels + d, total, inside)
    else:
        h = tl.load(starts + place, both, 0.0)
        direct = tl.load(D + scan * channels + d, inside, 0.0)
        out = _row_of(rows + states, n, states, STATES)
        y += row * length * channels + d
        token = visited(first, order, length, slice_length)
        in_slice = token % slice_length
        for step in range(first, last):
            more = step + 1 < last
            u += channels
            delta += channels
            rows += tl.where(more, ROW, 0)
            ahead = d < tl.where(more, channels, 0)
            later_x, later_raw = tl.load(u, ahead, 0.0), tl.load(delta, ahead, 0.0)
            later_into = _row_of(rows, n, states, STATES)
            later_out = _row_of(rows + states, n, states, STATES)
            x = x.to(tl.float32)
            dt = _step_size(raw.to(tl.float32) + shift, True)
            h = tl.exp2(dt[None, :] * a) * h + (dt * x)[None, :] * into.to(tl.float32)[:, None]
            result = tl.sum(h * out.to(tl.float32)[:, None], 0) + direct * x
            there = d < tl.where(step < length, channels, 0)
            tl.store(y + token.to(tl.int64) * channels, result, there)
            token, in_slice = _following(token, in_slice, order, length, slice_length)
            x, raw, into, out = later_x, later_raw, later_into, later_out


@triton.jit(do_not_specialize=SIZES)
def carries_of_orders(
    u, delta, rows, grad, A, bias, starts, tile_starts, carries, totals, dC,
    orders, length, padded, slice_length, batch, chunks, per_chunk,
    channels: tl.constexpr, states: tl.constexpr, ROW: tl.constexpr, DROW: tl.constexpr,
    RANK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Once more through the states: dC, the state before each tile, and the chunk's carry.

    The carry is what the chunk's own gradients add to decay q at its first step, with zero after it.
    """
    chunk, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    order, scan = _order_of(orders, tl.program_id(2), batch)
    d = block * BLOCK + tl.arange(0, BLOCK)  # four to a thread, as sums over channels want it
    n = tl.arange(0, STATES)
    inside, real = d < channels, n < states
    both = real[:, None] & inside[None, :]
    place = n[:, None] * channels + d[None, :]
    a = tl.load(A + scan * states * channels + place, both, 0.0)
    shift = tl.load(bias + scan * channels + d, inside, 0.0)
    at = row * chunks + chunk
    h = tl.load(starts + at * states * channels + place, both, 0.0)
    since_start = tl.full((STATES, BLOCK), 1.0, tl.float32)
    carry = tl.zeros((STATES, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, padded)
    u += (row * padded + first) * channels + d
    delta += (row * padded + first) * channels + d
    rows += (row * padded + first) * ROW + RANK
    dC += ((block * tl.num_programs(2) + row) * padded + first) * DROW + n
    tile_starts += (row * padded + first) // TILE * states * channels + place
    grad += (row % batch) * length * channels + d
    token = visited(first, order, length, slice_length)
    in_slice = token % slice_length
    x, raw = tl.load(u, inside, 0.0), tl.load(delta, inside, 0.0)
    g = tl.load(
        grad + token.to(tl.int64) * channels, d < tl.where(first < length, channels, 0), 0.0
    )
    into = _row_of(rows, n, states, STATES)
    out = _row_of(rows + states, n, states, STATES)
    for step in range(first, last):
        if step % TILE == 0:
            tl.store(tile_starts, h, both)
            tile_starts += states * channels
        more = step + 1 < last
        u += channels
        delta += channels
        rows += tl.where(more, ROW, 0)
        ahead = d < tl.where(more, channels, 0)
        later_x, later_raw = tl.load(u, ahead, 0.0), tl.load(delta, ahead, 0.0)
        token, in_slice = _following(token, in_slice, order, length, slice_length)
        there = d < tl.where(more & (step + 1 < length), channels, 0)
        later_g = tl.load(grad + token.to(tl.int64) * channels, there, 0.0)
        later_into = _row_of(rows, n, states, STATES)
        later_out = _row_of(rows + states, n, states, STATES)
        g, out = g.to(tl.float32), out.to(tl.float32)
        dt = _step_size(raw.to(tl.float32) + shift, True)
        decay = tl.exp2(dt[None, :] * a)
        h = decay * h + (dt * x.to(tl.float32))[None, :] * into.to(tl.float32)[:, None]
        tl.store(dC, tl.sum(h * g[None, :], 1), real)
        dC += DROW
        since_start *= decay
        carry += since_start * (g[None, :] * out[:, None])
        total += dt
        x, raw, g, into, out = later_x, later_raw, later_g, later_into, later_out
    tl.store(carries + at * states * channels + place, carry, both)
    tl.store(totals + at * channels + d, total, inside)


@triton.jit(do_not_specialize=SIZES)
def gradients_of_orders(
    u, delta, rows, grad, du, A, D, bias, tile_starts, carries, dB, sums,
    orders, length, padded, slice_length, batch, chunks, per_chunk,
    channels: tl.constexpr, states: tl.constexpr, ROW: tl.constexpr, DROW: tl.constexpr,
    RANK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The other gradients, tile by tile from each chunk's end; that by delta takes its place.

    `carries` is used up on the way. sums: by A, D and the bias (rows, chunks, N + 2, E).
    """
    chunk, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    order, scan = _order_of(orders, tl.program_id(2), batch)
    d = _apart(block, BLOCK)
    inside = d < channels
    shift = tl.load(bias + scan * channels + d, inside, 0.0)
    direct = tl.load(D + scan * channels + d, inside, 0.0)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    at = row * chunks + chunk
    first = chunk * per_chunk
    here = (tl.minimum(first + per_chunk, padded) - first) // TILE
    A += scan * states * channels + d
    carries += at * states * channels + d
    sums += at * (states + 2) * channels + d
    grad += (row % batch) * length * channels + d
    for i in range(here):
        start = first + (here - 1 - i) * TILE
        step = row * padded + start
        at_step = step * channels + d
        u_at, du_at, delta_at = u + at_step, du + at_step, delta + at_step
        dts, inputs, gs, by_x, by_exponent = (), (), (), (), ()
        token = visited(tl.minimum(start, length - 1), order, length, slice_length)
        in_slice = token % slice_length
        for k in tl.static_range(TILE):
            x = tl.load(u_at + k * channels, inside, 0.0).to(tl.float32)
            raw = tl.load(delta_at + k * channels, inside, 0.0).to(tl.float32)
            dt = tl.where(inside, _step_size(raw + shift, True), 0.0)
            there = d < tl.where(start + k < length, channels, 0)
            g = tl.load(grad + token.to(tl.int64) * channels, there, 0.0).to(tl.float32)
            token, in_slice = _following(token, in_slice, order, length, slice_length)
            dts, inputs, gs = dts + (dt,), inputs + (dt * x,), gs + (g,)
            by_x += (tl.zeros((BLOCK,), tl.float32),)
            by_exponent += (tl.zeros((BLOCK,), tl.float32),)
        rows_at = rows + step * ROW + RANK
        dB_at = dB + (block * tl.num_programs(2) * padded + step) * DROW
        starts_at = tile_starts + step // TILE * states * channels + d
        a, h = tl.load(A, inside, 0.0), tl.load(starts_at, inside, 0.0)
        p = tl.load(carries, inside, 0.0)
        for n in range(states):
            later = tl.minimum(n + 1, states - 1) * channels  # loaded while this state is computed
            later_a = tl.load(A + later, inside, 0.0)
            later_h = tl.load(starts_at + later, inside, 0.0)
            later_p = tl.load(carries + later, inside, 0.0)
            sum_A = tl.load(sums + n * channels, d < tl.where(i > 0, channels, 0), 0.0)
            intos, outs = (), ()
            for k in tl.static_range(TILE):
                intos += (tl.load(rows_at + k * ROW + n).to(tl.float32),)
                outs += (tl.load(rows_at + k * ROW + states + n).to(tl.float32),)
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
            sums_at = dB_at + tl.arange(0, BLOCK) // (BLOCK // TILE) * DROW + n
            tl.store(sums_at, _sums(by_into, TILE, BLOCK), _one_of_each(TILE, BLOCK))
            tl.store(sums + n * channels, sum_A, inside)
            tl.store(carries + n * channels, p, inside)
            a, h, p = later_a, later_h, later_p
        for k in tl.static_range(TILE):
            x = tl.load(u_at + k * channels, inside, 0.0).to(tl.float32)
            raw = tl.load(delta_at + k * channels, inside, 0.0).to(tl.float32)
            by_dt = x * by_x[k] + by_exponent[k] * (1 / LOG2E)
            by_dt *= _sigmoid(raw + shift)
            tl.store(du_at + k * channels, dts[k] * by_x[k] + direct * gs[k], inside)
            tl.store(delta_at + k * channels, by_dt, inside)
            sum_D += gs[k] * x
            sum_bias += by_dt
        tl.debug_barrier()  # the next tile reads the carries that this one wrote
    tl.store(sums + states * channels, sum_D, inside)
    tl.store(sums + (states + 1) * channels, sum_bias, inside)


@triton.jit
def _tile(channels: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * STEPS + tl.arange(0, STEPS)
    return token[:, None], (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]


@triton.jit(do_not_specialize=("tokens",))
def gate(
    y, z, z_row, out, tokens, count: tl.constexpr,
    channels: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gate, y silu(z), y the sum of `count` sequences one after the other."""
    token, d = _tile(channels, STEPS, BLOCK)
    real = (token < tokens) & (d < channels)
    at = token * channels + d
    total = tl.load(y + at, real, 0.0).to(tl.float32)
    for scan in tl.static_range(1, count):
        later = scan * tokens.to(tl.int64) * channels
        total += tl.load(y + later + at, real, 0.0).to(tl.float32)
    if z is not None:
        opening = tl.load(z + token * z_row + d, real, 0.0).to(tl.float32)
        total *= opening * _sigmoid(opening)
    tl.store(out + at, total, real)


@triton.jit(do_not_specialize=("tokens",))
def gate_backward(
    grad, y, z, z_row, dy, dz, tokens,
    channels: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of y silu(z)."""
    token, d = _tile(channels, STEPS, BLOCK)
    real = (token < tokens) & (d < channels)
    at = token * channels + d
    g = tl.load(grad + at, real, 0.0).to(tl.float32)
    opening = tl.load(z + token * z_row + d, real, 0.0).to(tl.float32)
    s = _sigmoid(opening)
    tl.store(dy + at, g * opening * s, real)
    by_z = g * tl.load(y + at, real, 0.0).to(tl.float32) * s * (1 + opening * (1 - s))
    tl.store(dz + at, by_z, real)


@triton.jit
def pack(
    conv_weights, conv_biases, x_projs, dt_projs, dt_biases, As, Ds,
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D,
    count: tl.constexpr, channels: tl.constexpr, TAPS: tl.constexpr, states: tl.constexpr,
    ranks: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    FEW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights of all orders one after the other, as the other kernels and the matrix products want them.

    Rows of x_proj and columns of dt_proj for a step size come after zeros that fill up RANK; A is (N, E), times
    log2(e). FEW and WIDE are powers of two, the one for taps, ranks and states, the other for WIDTH.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    few, wide = tl.arange(0, FEW), tl.arange(0, WIDE)
    inside = d < channels
    for scan in tl.static_range(count):
        if tl.program_id(1) == scan:
            at = scan * channels + d
            tl.store(conv_bias + at, tl.load(conv_biases[scan] + d, inside), inside)
            tl.store(dt_bias + at, tl.load(dt_biases[scan] + d, inside), inside)
            tl.store(D + at, tl.load(Ds[scan] + d, inside), inside)
            both = inside[:, None] & (few < TAPS)[None, :]
            value = tl.load(conv_weights[scan] + d[:, None] * TAPS + few[None, :], both)
            tl.store(conv_weight + at[:, None] * TAPS + few[None, :], value, both)
            both = inside[:, None] & (few < states)[None, :]
            value = tl.load(As[scan] + d[:, None] * states + few[None, :], both)
            place = (scan * states + few[None, :]) * channels + d[:, None]
            tl.store(A + place, value.to(tl.float32) * LOG2E, both)
            source = few - (RANK - ranks)
            both = inside[:, None] & ((source >= 0) & (few < RANK))[None, :]
            value = tl.load(dt_projs[scan] + d[:, None] * ranks + source[None, :], both, 0.0)
            both = inside[:, None] & (few < RANK)[None, :]
            tl.store(dt_proj + at[:, None] * RANK + few[None, :], value, both)
            source = wide - (RANK - ranks)
            both = ((source >= 0) & (source < ranks + 2 * states))[:, None] & inside[None, :]
            value = tl.load(x_projs[scan] + source[:, None] * channels + d[None, :], both, 0.0)
            both = (wide < WIDTH)[:, None] & inside[None, :]
            place = (scan * WIDTH + wide[:, None]) * channels + d[None, :]
            tl.store(x_proj + place, value, both)


@triton.jit(do_not_specialize=("size",))
def rates(logs, grad, out, size, count: tl.constexpr, BLOCK: tl.constexpr):
    """-exp of `count` tensors of a size, one after the other; with their gradient, that by the logarithms."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for scan in tl.static_range(count):
        if tl.program_id(1) == scan:
            value = -tl.exp(tl.load(logs[scan] + at, at < size, 0.0).to(tl.float32))
            if grad is not None:
                value *= tl.load(grad + scan * size + at, at < size, 0.0).to(tl.float32)
            tl.store(out + scan * size + at, value, at < size)


@triton.jit(do_not_specialize=("tokens",))
def sum_blocks(
    parts, rows, tokens, blocks: tl.constexpr, width: tl.constexpr, ROW: tl.constexpr,
    STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sum over `blocks` of parts (blocks, tokens, width), written to rows of a width ROW."""
    token = tl.program_id(0).to(tl.int64) * STEPS + tl.arange(0, STEPS)[:, None]
    n = tl.arange(0, WIDE)[None, :]
    real = (token < tokens) & (n < width)
    total = tl.zeros((STEPS, WIDE), tl.float32)
    for block in range(blocks):
        total += tl.load(parts + (block * tokens.to(tl.int64) + token) * width + n, real, 0.0)
    tl.store(rows + token * ROW + n, total, real)


@triton.jit
def _normalized(x, stride_c, stride_l, c, token, length, channels, eps):
    """A tile (channels, tokens) of a map, normalised; its factors (1, tokens); which of it is real."""
    real = (c < channels)[:, None] & (token < length)[None, :]
    at = c[:, None].to(tl.int64) * stride_c + token[None, :].to(tl.int64) * stride_l
    value = tl.load(x + at, real, 0.0).to(tl.float32)
    mean = tl.sum(value, 0)[None, :] / channels
    value = tl.where(real, value - mean, 0.0)
    factor = tl.rsqrt(tl.sum(value * value, 0)[None, :] / channels + eps)
    return value * factor, factor, real, at


@triton.jit(do_not_specialize=SIZES)
def norm(
    x, x_stride, weight, bias, out, length, channels, eps,
    CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """LayerNorm over the channels of a map x (B, C, L): tokens out (B, L, C)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, CHANNELS)
    value, _, real, _ = _normalized(
        x + b * x_stride[0], x_stride[1], x_stride[2], c, token, length, channels, eps
    )
    scale = tl.load(weight + c, c < channels, 0.0)[:, None]
    shift = tl.load(bias + c, c < channels, 0.0)[:, None]
    at = (b * length + token[None, :]) * channels + c[:, None]
    tl.store(out + at, value * scale + shift, real)


@triton.jit(do_not_specialize=SIZES)
def norm_backward(
    x, x_stride, weight, grad, dx, sums, length, channels, eps,
    CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The gradient by the map; a program's sums for weight and bias (B, programs, 2, C)."""
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, CHANNELS)
    scale = tl.load(weight + c, c < channels, 0.0)[:, None]
    by_weight = tl.zeros((CHANNELS,), tl.float32)
    by_bias = tl.zeros((CHANNELS,), tl.float32)
    for first in range(tl.program_id(0) * TOKENS, length, tl.num_programs(0) * TOKENS):
        token = first + tl.arange(0, TOKENS)
        value, factor, real, at = _normalized(
            x + b * x_stride[0], x_stride[1], x_stride[2], c, token, length, channels, eps
        )
        place = (b * length + token[None, :]) * channels + c[:, None]
        g = tl.load(grad + place, real, 0.0).to(tl.float32)
        by_weight += tl.sum(g * value, 1)
        by_bias += tl.sum(g, 1)
        g *= scale
        along = tl.sum(g * value, 0)[None, :] / channels
        result = factor * (g - tl.sum(g, 0)[None, :] / channels - value * along)
        tl.store(dx + b * x_stride[0] + at, result, real)
    sums += (b * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(sums, by_weight, c < channels)
    tl.store(sums + channels, by_bias, c < channels)


@triton.jit(do_not_specialize=("depth", "height", "width"))
def undouble(grad, out, depth, height, width, BLOCK: tl.constexpr):
    """The gradient by maps (rows, D, H, W), from that by their trilinear interpolation (rows, 2 D, 2 H, 2 W).

    Along each axis (g[2 i - 1] + 3 g[2 i] + 3 g[2 i + 1] + g[2 i + 2]) / 4; beyond a border is the border's voxel.
    """
    size = depth * height * width
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    z, y, x = at // (height * width), at // width % height, at % width
    plane = height.to(tl.int64) * width * 4
    grad += row * depth * 2 * plane
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(4):
        above = tl.minimum(tl.maximum(2 * z + i - 1, 0), 2 * depth - 1) * plane
        for j in tl.static_range(4):
            line = above + tl.minimum(tl.maximum(2 * y + j - 1, 0), 2 * height - 1) * (2 * width)
            for k in tl.static_range(4):
                there = line + tl.minimum(tl.maximum(2 * x + k - 1, 0), 2 * width - 1)
                value = tl.load(grad + there, at < size, 0.0).to(tl.float32)
                total += value * (3 ** ((i % 3 > 0) + (j % 3 > 0) + (k % 3 > 0)) / 64)
    tl.store(out + row * size + at, total, at < size)
