"""A small vocabulary of vectors for numba: 16 float32 lanes, one channel a lane.

Numba's own vectoriser leaves a factor of four on the table in a recurrence, so kernels say what is a
vector. LLVM maps 16 lanes to what the machine has: one register with AVX-512, two with AVX2, four
with NEON. NaN goes in, NaN comes out: bounds are compared so that a NaN passes them (LLVM's `maxnum`
would drop it), and no fast-math flag assumes that there is none.
"""

# mypy: ignore-errors
# (numba's functions take vectors and tiles, which Python's types do not describe)
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

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


_LANES_OF_TWO = np.arange(2 * LANES)
# Four ways to split two vectors into (their first halves, their second halves): by 8, 4, 2 and 1 lanes,
# each a single shuffle on common machines.
_HALVES = [
    _LANES_OF_TWO.reshape(2, 2, 8).swapaxes(0, 1),
    _LANES_OF_TWO.reshape(4, 2, 4).swapaxes(0, 1),
    _LANES_OF_TWO.reshape(2, 4, 2, 2).transpose(2, 1, 0, 3),
    _LANES_OF_TWO.reshape(2, 4, 2, 2).transpose(3, 1, 0, 2),
]


def _fold(vectors: list, add_halves: Callable) -> Any:
    """16 vectors to one: halves of two are added to one vector, four times over."""
    for halves in _HALVES:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [add_halves(a, b, *halves.reshape(2, LANES)) for a, b in pairs]
    return vectors[0]


@intrinsic
def dots(typing_context, a, i, b, j):
    """Dot products of 16 rows of tile a, from row i, with those of b from row j: a vector."""

    def codegen(context, builder, sig, args):
        def row(tile, k):
            index = builder.add(args[tile + 1], ir.Constant(args[tile + 1].type, k))
            where = types.void(*sig.args[tile : tile + 2])
            address = _address(context, builder, where, (args[tile], index))
            return builder.load(address, align=4)

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
