"""The selective scan in ONNX, for `srlib.export.onnx`, which imports this module when it needs it.

ONNX's Scan takes one step after the other, and each costs some microseconds whatever it computes. So a sequence is
cut into segments: all walk at once from an empty state to their last ones; from these and the product of a segment's
decays come the states that they begin with; then all walk again and give their outputs. One segment is ONNX's Scan
over the tokens, and slower (`results/reference/cpu/onnx.csv`).
"""

# No annotations from __future__: onnxscript evaluates them.
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from onnxscript import FLOAT, INT64, graph, script
from onnxscript import opset18 as op


@script(default_opset=op)
def walk(
    dt: FLOAT[...], u: FLOAT[...], A: FLOAT[...], B: FLOAT[...], C: FLOAT[...], segments: INT64[1]
) -> FLOAT[...]:
    """Scan of u with step sizes dt (B, E, L), A (E, N), B and C (B, N, L), in so many segments -> y (B, E, L)."""
    last_axis = op.Constant(value_ints=[-1])
    row_axis = op.Constant(value_ints=[-2])
    length = op.Shape(u, start=2)
    steps = (length + segments - 1) / segments
    missing = steps * segments - length  # tokens with dt = 0, which change no state
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0, 0]), missing, axis=0)
    cut = op.Concat(op.Constant(value_ints=[0, 0]), segments, steps, axis=0)
    # (B, ., L) -> (steps, B, segments, .)
    dts = op.Transpose(op.Reshape(op.Pad(dt, pads), cut), perm=[3, 0, 2, 1])
    added = op.Transpose(op.Reshape(op.Pad(dt * u, pads), cut), perm=[3, 0, 2, 1])
    Bs = op.Transpose(op.Reshape(op.Pad(B, pads), cut), perm=[3, 0, 2, 1])
    Cs = op.Transpose(op.Reshape(op.Pad(C, pads), cut), perm=[3, 0, 2, 1])
    whole = op.ReduceSum(dts, op.Constant(value_ints=[0]), keepdims=0)
    decays = op.Exp(op.Unsqueeze(whole, last_axis) * A)  # of a segment, (B, segments, E, N)
    zeros = op.Expand(op.Constant(value_float=0.0), op.Shape(decays))

    @graph()
    def to_its_end(h: FLOAT[...], dt_t: FLOAT[...], added_t: FLOAT[...], B_t: FLOAT[...]):
        decay = op.Exp(op.Unsqueeze(dt_t, last_axis) * A)
        return decay * h + op.Unsqueeze(added_t, last_axis) * op.Unsqueeze(B_t, row_axis)

    @graph()
    def to_the_next(h: FLOAT[...], decay: FLOAT[...], end: FLOAT[...]):
        after = decay * h + end
        start = op.Identity(h)
        return after, start

    @graph()
    def output(
        h: FLOAT[...], dt_t: FLOAT[...], added_t: FLOAT[...], B_t: FLOAT[...], C_t: FLOAT[...]
    ):
        decay = op.Exp(op.Unsqueeze(dt_t, last_axis) * A)
        after = decay * h + op.Unsqueeze(added_t, last_axis) * op.Unsqueeze(B_t, row_axis)
        y_t = op.Squeeze(op.MatMul(after, op.Unsqueeze(C_t, last_axis)), last_axis)
        return after, y_t

    ends = op.Scan(zeros, dts, added, Bs, body=to_its_end, num_scan_inputs=3)
    first = op.ReduceSum(zeros, op.Constant(value_ints=[1]), keepdims=0)
    _, starts = op.Scan(
        first,
        decays,
        ends,
        body=to_the_next,
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    _, ys = op.Scan(starts, dts, added, Bs, Cs, body=output, num_scan_inputs=4)
    y = op.Reshape(op.Transpose(ys, perm=[1, 3, 2, 0]), op.Constant(value_ints=[0, 0, -1]))
    return op.Slice(y, op.Constant(value_ints=[0]), length, op.Constant(value_ints=[2]))


def translated(elements: int) -> Callable[..., Any]:
    """What the exporter writes for `srlib::fused_mixer`, whose arguments it takes.

    Args:
        elements: of the states of all segments of a scan together.
    """

    def visit(x: Any, order: str, first: Any, second: Any) -> Any:
        """Tokens (B, L, E), of slices and tokens (`first`, `second`; -1 for what is left), in the order of visit."""
        if order == "reverse":
            return op.Slice(x, [-1], [-(2**62)], [1], [-1])
        if order == "inter_slice":
            sizes = (op.Shape(x, start=0, end=1), first, second, op.Shape(x, start=2))
            by_slice = op.Reshape(x, op.Concat(*sizes, axis=0))
            visited = op.Transpose(by_slice, perm=[0, 2, 1, 3])
            return op.Reshape(visited, op.Shape(x))
        return x

    def translate(
        x: Any,
        conv_weight: Any,
        conv_bias: Any,
        x_proj: Any,
        dt_proj: Any,
        dt_bias: Any,
        A: Any,
        D: Any,
        order: str,
        nslices: Any,
        keep_states: bool,
    ) -> Any:
        (width, taps), (_, rank), (_, states) = conv_weight.shape, dt_proj.shape, A.shape
        slices, rest = op.Reshape(nslices, [1]), op.Constant(value_ints=[-1])
        visited = op.Transpose(visit(x, order, slices, rest), perm=[0, 2, 1])  # (B, E, L)
        kernel = op.Unsqueeze(conv_weight, [1])
        u = op.Conv(visited, kernel, conv_bias, group=width, pads=[taps - 1, 0])
        u = op.Mul(u, op.Sigmoid(u))
        rows = op.MatMul(x_proj, u)  # (B, R + 2 N, L)
        ends = (0, rank, rank + states, rank + 2 * states)
        dt, B, C = (op.Slice(rows, [first], [last], [1]) for first, last in pairwise(ends))
        dt = op.Softplus(op.Add(op.MatMul(dt_proj, dt), op.Unsqueeze(dt_bias, [1])))
        segments = op.Constant(value_ints=[max(1, elements // (width * states))])
        none = op.ConstantOfShape(
            op.Constant(value_ints=[0])
        )  # states, which a gradient would need
        y = op.Add(walk(dt, u, A, B, C, segments), op.Mul(op.Unsqueeze(D, [1]), u))
        return visit(op.Transpose(y, perm=[0, 2, 1]), order, rest, slices), none

    return translate
