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
`cpu` calls them from torch's threads. numba's parallel loops would use an OpenMP of their own, which does
not survive a fork.
"""

# mypy: ignore-errors
# (numba's functions take vectors and tiles, which Python's types do not describe)
from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import boolean, config, float32, int64, njit, types, void
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# --- Vectors --------------------------------------------------------------------------------------
# A small vocabulary for numba: 16 float32 lanes, one channel a lane. Numba's own vectoriser leaves a factor of four on
# the table in a recurrence, so kernels say what is a vector. LLVM maps 16 lanes to what the machine has: one register
# with AVX-512, two with AVX2, four with NEON. NaN goes in, NaN comes out: bounds are compared so that a NaN passes them
# (LLVM's `maxnum` would drop it), and no fast-math flag assumes that there is none.

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_FLAGS = ("contract", "nsz", "arcp")  # fuse products and sums; nothing that touches NaN or infinity


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _FLOATS)


def _operator(function: Callable, instruction: str) -> None:
    """`vector op vector` as one LLVM instruction."""

    @infer_global(function)
    class _Template(ConcreteTemplate):
        cases = (signature(vector, vector, vector),)

    @lower_builtin(function, vector, vector)
    def _lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args, flags=_FLAGS)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    function_type = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
    name = f"llvm.{name}.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
    """Horner's rule, highest power first."""
    value: ir.Value = _constant(coefficients[0])
    for c in coefficients[1:]:
        value = _call(builder, "fmuladd", value, x, _constant(c))
    return value


def _exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x = 2^r 2^(x-r), r the nearest integer: 2^r goes into the exponent bits of a polynomial's value.

    Relative error 1e-7. At the bounds the bits come out as exactly 0 (-127) and infinity (128).
    """
    for bound, beyond in ((-127.0, "<"), (128.0, ">")):
        limit = _constant(bound)
        x = builder.select(builder.fcmp_ordered(beyond, x, limit), limit, x)
    whole = _call(builder, "rint", x)
    minimax = (0.00132765, 0.00967554, 0.05550713, 0.2402212, 0.69314697, 1.0)
    mantissa = _polynomial(builder, builder.fsub(x, whole), minimax)
    exponent = builder.shl(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(mantissa, _INTS), exponent), _FLOATS)


def _exp_minus(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _exp2(builder, builder.fmul(x, _constant(-1 / math.log(2))))


def _sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x), or t / (1 + t) below 0, with the t = e^-|x| that softplus computes as well."""
    one = _constant(1.0)
    t = _exp_minus(builder, _call(builder, "fabs", x))
    below = builder.fcmp_ordered("<", x, _constant(0.0))
    return builder.fdiv(builder.select(below, t, one), builder.fadd(one, t), flags=_FLAGS)


def _softplus(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(1 + e^x) = max(x, 0) + log(1 + t), t = e^-|x|; log(1 + t) = 2 artanh(s), s = t / (2 + t)."""
    t = _exp_minus(builder, _call(builder, "fabs", x))
    s = builder.fdiv(t, builder.fadd(t, _constant(2.0)), flags=_FLAGS)
    series = (0.28178327, 0.27960605, 0.4002491, 0.66666315, 2.0)
    artanh = _polynomial(builder, builder.fmul(s, s), series)  # 2 artanh(s) / s
    zero = _constant(0.0)
    positive = builder.select(builder.fcmp_ordered(">", x, zero), x, zero)
    return _call(builder, "fmuladd", s, artanh, positive)


def _of_vectors(count: int, generate: Callable[..., ir.Value]) -> Any:
    """A numba function of `count` vectors whose value `generate(builder, *vectors)` builds."""

    def codegen(context, builder, sig, args):
        return generate(builder, *args)

    if count == 1:
        return intrinsic(lambda typing_context, x: (vector(vector), codegen))
    return intrinsic(lambda typing_context, x, y, z: (vector(vector, vector, vector), codegen))


exp2 = _of_vectors(1, _exp2)
sigmoid = _of_vectors(1, _sigmoid)
softplus = _of_vectors(1, _softplus)
fma = _of_vectors(3, lambda builder, x, y, z: _call(builder, "fmuladd", x, y, z))  # x y + z


def _broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


@intrinsic
def broadcast(typing_context, x):
    """A float32 in all lanes."""

    def codegen(context, builder, sig, args):
        return _broadcast(builder, *args)

    return vector(types.float32), codegen


def _address(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    """Where the lanes of `array[index]` begin, the first two of `args`."""
    array = context.make_array(sig.args[0])(context, builder, args[0])
    if isinstance(sig.args[1], types.Integer):
        indices = [args[1], ir.Constant(args[1].type, 0)]
    else:
        indices = cgutils.unpack_tuple(builder, args[1])
    if context.enable_boundscheck:
        _check_bounds(context, builder, array, indices)
    if isinstance(sig.args[1], types.Integer):
        return builder.gep(builder.bitcast(array.data, _FLOATS.as_pointer()), [args[1]])
    pointer = cgutils.get_item_pointer(context, builder, sig.args[0], array, indices)
    return builder.bitcast(pointer, _FLOATS.as_pointer())


def _check_bounds(context: Any, builder: ir.IRBuilder, array: Any, indices: Sequence) -> None:
    """Raise an IndexError unless the 16 floats from `array[indices]` on are the array's, and neighbours."""
    neighbours = cgutils.false_bit
    for index, size, stride in zip(
        indices,
        *(cgutils.unpack_tuple(builder, t) for t in (array.shape, array.strides)),
        strict=True,
    ):
        cgutils.do_boundscheck(context, builder, index, size)
        fits = builder.icmp_signed("<=", builder.add(index, index.type(LANES)), size)
        dense = builder.icmp_signed("==", stride, stride.type(4))
        neighbours = builder.or_(neighbours, builder.and_(fits, dense))
    with cgutils.if_unlikely(builder, builder.not_(neighbours)):
        context.call_conv.return_user_exc(builder, IndexError, ("lanes are out of bounds",))


@intrinsic
def load(typing_context, array, index):
    """A vector: row `index` of a tile (rows, 16), or what begins at an array's `index`, a tuple.

    The 16 floats must be neighbours in memory; that and the bounds are checked with NUMBA_BOUNDSCHECK=1 only.
    """

    def codegen(context, builder, sig, args):
        return builder.load(_address(context, builder, sig, args), align=4)

    return vector(array, index), codegen


@intrinsic
def store(typing_context, array, index, x):
    """Write a vector to where `load` reads one."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], _address(context, builder, sig, args), align=4)
        return context.get_dummy_value()

    return types.void(array, index, vector), codegen


@intrinsic
def spread(typing_context, tile, row, lane):
    """One float of a tile (rows, 16) in all lanes."""

    def codegen(context, builder, sig, args):
        pointer = builder.bitcast(
            _address(context, builder, sig, args), ir.FloatType().as_pointer()
        )
        return _broadcast(builder, builder.load(builder.gep(pointer, [args[2]])))

    return vector(tile, row, lane), codegen


# Lanes of two vectors a and b, for blocks of 8, 4, 2 and 1 lanes: a's even blocks with b's moved up by one block.
# Of a's and b's odd blocks these are the lanes one block further.
_EVEN_BLOCKS = [
    (by, np.arange(LANES) + (np.arange(LANES) // by % 2) * (LANES - by)) for by in (8, 4, 2, 1)
]


def _fold(vectors: list, add_halves: Callable) -> Any:
    """16 vectors to one: halves of two are added to one vector, four times over."""
    for by, even in _EVEN_BLOCKS:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [add_halves(a, b, even, even + by) for a, b in pairs]
    return vectors[0]


def _following(
    context: Any, builder: ir.IRBuilder, sig: Any, args: Any, first: int, k: int
) -> ir.Value:
    """Where the vector `k` rows of a tile or, by a tuple, `k` channels after `array[index]` begins.

    Array and index are the arguments from `first` on.
    """
    array, index = args[first : first + 2]
    if isinstance(sig.args[first + 1], types.Integer):
        index = builder.add(index, index.type(k))
    else:
        channel = builder.extract_value(index, 1)
        index = builder.insert_value(index, builder.add(channel, channel.type(k)), 1)
    return _address(context, builder, types.void(*sig.args[first : first + 2]), (array, index))


@intrinsic
def dots(typing_context, a, i, b, j):
    """Dot products of 16 rows of tile a, from row i, with those of b from row j: a vector."""

    def codegen(context, builder, sig, args):
        def row(tile, k):
            return builder.load(_following(context, builder, sig, args, tile, k), align=4)

        def add_halves(x, y, first, second):
            halves = (ir.Constant(_INTS, half.tolist()) for half in (first, second))
            return builder.fadd(
                *(builder.shuffle_vector(x, y, half) for half in halves), flags=_FLAGS
            )

        # Which input's sum comes out in which lane, found by folding the inputs' numbers.
        numbers = [np.full(LANES, k) for k in range(LANES)]
        lanes = _fold(numbers, lambda x, y, first, _: np.concatenate([x, y])[first]).argsort()
        products = [builder.fmul(row(0, int(k)), row(2, int(k)), flags=_FLAGS) for k in lanes]
        return _fold(products, add_halves)

    return vector(a, i, b, j), codegen


@intrinsic
def transpose(typing_context, target, i, source, j):
    """Write 16 vectors of `source`, from index j on, as columns to `target`, from index i on."""

    def codegen(context, builder, sig, args):
        each = range(LANES)
        rows = [builder.load(_following(context, builder, sig, args, 2, k), align=4) for k in each]
        for by, even in _EVEN_BLOCKS:
            lanes = [ir.Constant(_INTS, (even + (k & by)).tolist()) for k in each]
            rows = [builder.shuffle_vector(rows[k & ~by], rows[k | by], lanes[k]) for k in each]
        for k in each:
            builder.store(rows[k], _following(context, builder, sig, args, 0, k), align=4)
        return context.get_dummy_value()

    return types.void(target, i, source, j), codegen


# --- Kernels --------------------------------------------------------------------------------------

CHUNK = 64  # tokens; eight tiles of 64 x 16 float32 fill a 32 KiB cache
TAPS = 4  # of the causal convolution; fewer are padded with zeros

# Nothing is allocated here; without numba's runtime, tiles are not counted atomically at each slice of one.
_OPTIONS = {"error_model": "numpy", "boundscheck": False, "nogil": True, "_nrt": False}
_ZERO, _ONE, _LN2 = np.float32(0), np.float32(1), np.float32(math.log(2))

_helper = njit(forceinline=True, **_OPTIONS)  # a call would pass each tile as eight words
_called = njit(**_OPTIONS)  # with registers of its own: inlined, it would take those of the loops
_channels = float32[::1]  # (P,)
_per_state = float32[:, ::1]  # (N, P)
_sequence = float32[:, :, :]  # (B, channels or states, L) of any strides
_states = float32[:, :, ::1]  # (B, rows, P)


def _tiles(count: int) -> Any:
    return types.UniTuple(float32[:, ::1], count)


class _Kernel:
    """A function that is compiled at its first use, from numba's cache when that is possible."""

    def __init__(self, function: Callable, signature: Any) -> None:
        self.function, self.signature = function, signature

    @functools.cached_property
    def compiled(self) -> Callable:
        # numba's cache goes by the name, which therefore says whether NUMBA_BOUNDSCHECK is set.
        self.function.__qualname__ = self.function.__name__ + "_checked" * bool(config.BOUNDSCHECK)
        try:
            return njit(self.signature, cache=True, **_OPTIONS)(self.function)
        except RuntimeError as error:  # neither the package nor the user's cache folder is writable
            logging.getLogger("srlib.scan").info("compiling without cache: %s", error)
            return njit(self.signature, **_OPTIONS)(self.function)


def _kernel(*arguments: Any) -> Callable[[Callable], _Kernel]:
    return lambda function: _Kernel(function, void(*arguments))


@_helper
def _whole_and_consecutive(places):
    """A chunk of CHUNK tokens that follow each other in memory."""
    consecutive = len(places) == CHUNK
    for t in range(1, len(places)):  # the ends alone can lie so in the inter-slice order, too
        consecutive &= places[t] - places[t - 1] == 1
    return consecutive


@_helper
def _gather(tile, source, b, channel, places):
    """tile[t, c] = source[b, channel + c, places[t]]; 0 in lanes beyond the last channel."""
    if source.strides[1] == 4 and source.shape[1] - channel >= LANES:
        for t in range(len(places)):
            store(tile, t, load(source, (b, channel, places[t])))
    else:
        _gather_columns(tile, source, b, channel, places)


@_called
def _gather_columns(tile, source, b, channel, places):
    width = min(LANES, source.shape[1] - channel)
    if width == LANES and source.strides[2] == 4 and _whole_and_consecutive(places):
        for t in range(0, CHUNK, LANES):
            transpose(tile, t, source, (b, channel, places[t]))
    else:
        tile[: len(places), width:] = 0
        for c in range(width):
            for t in range(len(places)):
                tile[t, c] = source[b, channel + c, places[t]]


@_helper
def _scatter(target, tile, b, channel, places):
    """target[b, channel + c, places[t]] = tile[t, c]."""
    if target.strides[1] == 4 and target.shape[1] - channel >= LANES:
        for t in range(len(places)):
            store(target, (b, channel, places[t]), load(tile, t))
    else:
        _scatter_columns(target, tile, b, channel, places)


@_called
def _scatter_columns(target, tile, b, channel, places):
    width = min(LANES, target.shape[1] - channel)
    if width == LANES and target.strides[2] == 4 and _whole_and_consecutive(places):
        for t in range(0, CHUNK, LANES):
            transpose(target, (b, channel, places[t]), tile, t)
    else:
        for c in range(width):
            for t in range(len(places)):
                target[b, channel + c, places[t]] = tile[t, c]


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


@_called
def _recur(rates, states, b, row, advance, channel, dt, x, Bs, Cs, out):
    """All states of 16 channels through a chunk, from `row` of `states` to `advance` rows further."""
    for n in range(len(rates)):
        group, lane = n // LANES * CHUNK, n % LANES
        rate, h = load(rates, (n, channel)), load(states, (b, row + n, channel))
        for t in range(len(dt)):
            decay = exp2(load(dt, t) * rate)
            h = fma(decay, h, load(x, t) * spread(Bs, group + t, lane))
            store(out, t, fma(h, spread(Cs, group + t, lane), load(out, t)))
        store(states, (b, row + advance + n, channel), h)


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

            _recur(rates, states, b, row, advance, channel, dt[: len(inside)], x, Bs, Cs, out)

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

    A token's dx needs du of the `TAPS - 1` steps after it, too: they follow at the end of `places`, those that
    the order has.
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
