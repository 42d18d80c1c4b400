"""ToM's mixers, its gate and LayerNorm over channels, and the decoder's upsampling, on a GPU in Triton.

`mixers` is the sum of `mamba_mixer` over orders. All orders go through the same launches:

    forward    convolve      x -> u in each order of visit, the convolution with SiLU
               two matrix products: u -> step sizes of rank R, B and C -> step sizes
               walk, join, walk: the scan as in `triton.py`, y written where x lies
               gate          the sum over orders
    backward   all of it up to the step sizes again, then the scan's gradients, and the products'
               through_silu  the gradient by the convolution's sums, and by its weights
               unconvolve    the gradient by x, the sum over orders

For the backward pass x and the scan's state before each chunk are kept. Decay and state are float32, sequences as
wide as x is. Sums over tokens go by way of partial sums, without atomic additions: the same bits come out every time.
Where one order fills the GPU, the orders take turns, so that memory holds what is computed again of one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton
from .definition import ORDERS
from .inputs import check_gradient, check_mixer
from .operator import mixer_flops, register
from .triton import BLOCK, join, launch

# Chunks are long enough for no more programs of the scan: an H200 holds as many of `walk_orders` at once.
PROGRAMS = 132 * 32
CHUNKS = (16, 256)  # shortest and longest chunk
TILE = 8  # steps whose states the backward pass holds in registers
REGISTERS = {"walk": 64, "backward": 128}  # of a thread; fewer let more programs run at once
TOGETHER = 2**25  # elements of x times orders in one launch
STEPS = 32  # steps of a program of the convolution, times 32 channels
SUMS = 512  # programs that share a sum over tokens
VOXELS = 128  # of a program of the upsampling's gradient


def _kernels() -> ModuleType:
    from . import triton_mixer_kernels

    return triton_mixer_kernels


def refuses(x: Tensor) -> str:
    """The reason why these kernels cannot take tokens or a map like `x`; empty where they can."""
    if reason := triton.refuses(x.device, x.dtype):
        return reason
    return "" if math.prod(x.shape[1:]) < 2**31 else "an image's tensor of 2**31 elements or more"


class _Orders:
    """Both passes of some orders: sizes, weights and u, its projections and step sizes."""

    def __init__(
        self, x: Tensor, weights: Sequence[Tensor], orders: list[str], nslices: int
    ) -> None:
        conv, _, _, dt_proj, _, A, _ = weights[:: len(orders)]
        (self.batch, self.length, channels), count = x.shape, len(orders)
        self.x, self.count, self.rows = x, count, count * self.batch
        self.channels, self.taps = channels, conv.shape[1]
        self.states, self.ranks = A.shape[1], dt_proj.shape[1]
        # Widths of matrices are multiples of 8, which the GPU's matrix units ask for.
        self.rank = -(-self.ranks // 8) * 8
        self.width = -(-(self.rank + 2 * self.states) // 8) * 8
        self.blocks = -(-channels // BLOCK)
        self._pack(weights)
        self.padded = -(-self.length // TILE) * TILE
        self.chunk = _chunk(x, count)
        self.chunks = -(-self.padded // self.chunk)
        self.steps = {
            "orders": sum(ORDERS.index(order) << 2 * i for i, order in enumerate(orders)),
            "length": self.length, "padded": self.padded, "slice_length": -(-self.length // nslices),
            "batch": self.batch, "channels": channels, "BLOCK": BLOCK,
        }  # fmt: skip
        self.scan = dict(
            **self.steps, chunks=self.chunks, per_chunk=self.chunk, states=self.states, ROW=self.width,
            RANK=self.rank, num_warps=1,
        )  # fmt: skip
        self.wide = {"STATES": _power(self.states)}

    def _pack(self, weights: Sequence[Tensor]) -> None:
        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return self.x.new_empty(self.count, *shape, dtype=dtype)

        channels, half = self.channels, self.x.dtype
        self.conv = room(channels, self.taps), room(channels)
        self.x_proj = room(self.width, channels, dtype=half)
        self.dt_proj = room(channels, self.rank, dtype=half)
        self.bias, self.A, self.D = room(channels), room(self.states, channels), room(channels)
        kinds = [tuple(weights[i : i + self.count]) for i in range(0, len(weights), self.count)]
        launch(
            _kernels().pack, (self.blocks, self.count), self.x,
            *(tuple(t.contiguous() for t in kind) for kind in kinds),
            *self.conv, self.x_proj, self.dt_proj, self.bias, self.A, self.D,
            count=self.count, channels=channels, TAPS=self.taps, states=self.states, ranks=self.ranks,
            RANK=self.rank, WIDTH=self.width, FEW=_power(max(self.taps, self.states, self.rank)),
            WIDE=_power(self.width), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    def tiled(
        self, kernel: str, rows: int, *arguments: Any, programs: int = 0, **more: int
    ) -> None:
        """Launch a kernel whose programs have `STEPS` steps each, or so many programs."""
        grid = (programs or -(-self.padded // STEPS), self.blocks, rows)
        more |= {**self.steps, "TAPS": self.taps, "STEPS": STEPS, "num_warps": 4}
        launch(getattr(_kernels(), kernel), grid, self.x, *arguments, **more)

    def scanned(self, kernel: str, *arguments: Any, **more: int) -> None:
        """Launch a kernel that goes through the sequences."""
        grid = self.chunks, self.blocks, self.rows
        launch(getattr(_kernels(), kernel), grid, self.x, *arguments, **self.scan, **more)

    def room(self, *rows: int) -> Tensor:
        """Float32 room for `rows` of channels of each chunk."""
        return self.A.new_empty(self.rows, self.chunks, *rows, self.channels)

    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of visit, u, the rows of step size, B and C, and the step sizes: (orders, B * padded, .)."""
        u = self.x.new_empty(self.count, self.batch * self.padded, self.channels)
        self.tiled("convolve", self.rows, self.x, self.x.stride(1), u, *self.conv)
        rows = torch.bmm(u, self.x_proj.mT)
        return u, rows, torch.bmm(rows[..., : self.rank], self.dt_proj.mT)

    def forward(self, y: Tensor, states: Tensor | None) -> None:
        """Write y (orders, B, L, E) and, where they are kept, the states."""
        u, rows, delta = self.sequences()
        ends, totals = self.room(self.states), self.room()
        given = u, delta, rows, self.A, self.D, self.bias
        more = {**self.wide, "maxnreg": REGISTERS["walk"]}
        self.scanned("walk_orders", *given, None, ends, totals, None, **more)
        starts = torch.empty_like(ends) if states is None else states
        join(ends, totals, self.A, starts, self.batch, backwards=False)
        self.scanned("walk_orders", *given, starts, None, None, y, **more)

    def backward(self, grad: Tensor, states: Tensor, du: Tensor) -> tuple[Tensor, ...]:
        """Write du (orders, B * padded, E); returns the gradients by x_proj, dt_proj, dt_bias, A and D."""
        u, rows, delta = self.sequences()
        filled = self.rank + 2 * self.states  # of the width
        d_rows = torch.empty_like(rows)
        if self.width > filled:
            d_rows[..., filled:] = 0
        weights = d_rows[..., self.rank :]
        parts = weights
        if self.blocks > 1:
            parts = self.A.new_empty(self.blocks, self.count, u.shape[1], 2 * self.states)
        tile_starts = self.A.new_empty(self.rows, self.padded // TILE, *self.A.shape[1:])
        carries, totals = torch.empty_like(states), self.room()
        tiles = {"DROW": parts.stride(-2), "TILE": TILE, "maxnreg": REGISTERS["backward"]}
        self.scanned(
            "carries_of_orders", u, delta, rows, grad, self.A, self.bias, states, tile_starts, carries, totals,
            parts[..., self.states :], **tiles, **self.wide,
        )  # fmt: skip
        after = join(carries, totals, self.A, torch.empty_like(carries), self.batch, backwards=True)
        sums = self.room(self.states + 2)
        self.scanned(
            "gradients_of_orders", u, delta, rows, grad, du, self.A, self.D, self.bias, tile_starts, after,
            parts, sums, **tiles,
        )  # fmt: skip
        del tile_starts
        if self.blocks > 1:
            tokens = parts[0, ..., 0].numel()
            launch(
                _kernels().sum_blocks, (-(-tokens // 64),), self.x, parts, weights, tokens, blocks=self.blocks,
                width=2 * self.states, ROW=self.width, STEPS=64, WIDE=_power(2 * self.states), num_warps=4,
            )  # fmt: skip
        torch.bmm(delta, self.dt_proj, out=d_rows[..., : self.rank])  # delta is its gradient by now
        du.baddbmm_(d_rows, self.x_proj)
        zeros = self.rank - self.ranks
        d_dt_proj = _by_weights(delta, rows[..., zeros : self.rank])
        d_x_proj = _by_weights(d_rows, u)[:, zeros:filled]
        total = sums.unflatten(0, (self.count, -1)).sum((1, 2))  # (orders, N + 2, E)
        return d_x_proj, d_dt_proj, total[:, -1], total[:, :-2].mT, total[:, -2]

    def unconvolved(self, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients by x and by the convolution's weights and bias; `du` is used up."""
        programs = min(SUMS, -(-self.length // STEPS))
        sums = self.room().new_empty(self.rows, programs, (1 + self.taps) * self.channels)
        given = self.x, self.x.stride(1), du, *self.conv, sums
        self.tiled("through_silu", self.rows, *given, programs=programs)
        dx = self.x.new_empty(self.x.shape)
        self.tiled("unconvolve", self.batch, du, self.conv[0], dx, count=self.count)
        total = sums.unflatten(0, (self.count, -1)).sum((1, 2))
        bias, weight = total.tensor_split([self.channels], 1)
        return dx, weight.unflatten(1, (-1, self.taps)), bias


def _by_weights(a: Tensor, b: Tensor) -> Tensor:
    """The sums over t of a (orders, T, M) times b (orders, T, N): (orders, M, N), in pieces that a GPU does at once."""
    pieces = math.gcd(a.shape[1], 256) if a.shape[1] > 4096 else 1
    a, b = (t.unflatten(1, (pieces, -1)).flatten(0, 1) for t in (a, b))
    wide = a.is_cuda and a.dtype != torch.float32
    products = torch.bmm(a.mT, b, torch.float32) if wide else torch.bmm(a.mT, b)
    return products if pieces == 1 else products.unflatten(0, (-1, pieces)).sum(1)


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def _chunk(x: Tensor, count: int) -> int:
    """Steps in a chunk of `count` orders, whole tiles."""
    batch, length, channels = x.shape
    wanted = count * batch * -(-channels // BLOCK) * length / PROGRAMS
    shortest, longest = CHUNKS
    return min(longest, max(shortest, TILE * math.ceil(wanted / TILE)))


def _together(x: Tensor, count: int) -> int:
    """Orders in a launch."""
    return max(1, min(count, TOGETHER // x.numel()))


def _parts(
    x: Tensor, weights: Sequence[Tensor], orders: str, nslices: int
) -> Iterator[tuple[slice, _Orders]]:
    """The orders that go together, one lot after the other: which they are, and what they work with."""
    names = orders.split(",")
    together = _together(x, len(names))
    kinds = [weights[i : i + len(names)] for i in range(0, len(weights), len(names))]
    for first in range(0, len(names), together):
        part = slice(first, first + together)
        own = [t for kind in kinds for t in kind[part]]
        yield part, _Orders(x, own, names[part], nslices)


def _check(x: Tensor, weights: Sequence[Tensor], orders: str, nslices: int) -> None:
    names = orders.split(",")
    if len(weights) != 7 * len(names):
        raise ValueError(f"weights: expected 7 for each of {orders}, got {len(weights)}")
    for i, order in enumerate(names):
        check_mixer((x, *weights[i :: len(names)]), order, nslices, casts=True)


def _states_shape(x: Tensor, weights: Sequence[Tensor], orders: str, _: int) -> tuple[int, ...]:
    """Shape of the states before each chunk, (orders, B, chunks, N, E)."""
    (batch, length, channels), count = x.shape, orders.count(",") + 1
    padded = -(-length // TILE) * TILE
    chunks = -(-padded // _chunk(x, _together(x, count)))
    return count, batch, chunks, weights[5 * count].shape[1], channels


def _rows(x: Tensor) -> Tensor:
    """Tokens x (B, L, E), each a contiguous row at the same distance from the next."""
    fits = x.stride(2) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if fits else x.contiguous()


def _forward(
    x: Tensor, weights: Sequence[Tensor], orders: str, nslices: int, states: Tensor
) -> Tensor:
    x = _rows(x)
    with torch.autocast(x.device.type, enabled=False):
        y = x.new_empty(orders.count(",") + 1, *x.shape)
        for part, work in _parts(x, weights, orders, nslices):
            work.forward(y[part], states[part].flatten(0, 1) if states.numel() else None)
        return _gated(y, None)


def _backward(
    grad: Tensor, states: Tensor, x: Tensor, weights: Sequence[Tensor], orders: str, nslices: int
) -> list[Tensor]:
    check_gradient(grad, states, x, _states_shape(x, weights, orders, nslices))
    x, grad = _rows(x), grad.contiguous()
    padded, count = -(-x.shape[1] // TILE) * TILE, orders.count(",") + 1
    with torch.autocast(x.device.type, enabled=False):
        found, du = [], x.new_empty(count, x.shape[0] * padded, x.shape[2])
        for part, work in _parts(x, weights, orders, nslices):
            found.append(work.backward(grad, states[part].flatten(0, 1), du[part]))
        whole = work if len(found) == 1 else _Orders(x, weights, orders.split(","), nslices)
        dx, *d_conv = whole.unconvolved(du)
    gradients = [t for kind in d_conv for t in kind]
    gradients += [t for kind in zip(*found, strict=True) for part in kind for t in part]
    return [dx, *(g.to(t.dtype) for g, t in zip(gradients, weights, strict=True))]


def _flops(
    x: Sequence[int], weights: list[tuple[int, ...]], orders: str, *_: Any
) -> tuple[int, int]:
    count = orders.count(",") + 1
    conv_weight, _, x_proj, dt_proj, _, A, _ = weights[::count]
    forward, backward = mixer_flops(x, conv_weight, x_proj, dt_proj, A)
    return count * forward, count * backward


def _contiguous(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


# The sum of `mamba_mixer` over orders: of tokens x (B, L, E) in memory order, which may be parts of longer rows; with
# the seven kinds of weights of a mixer, of each the orders' own one after the other; the orders separated by commas.
mixers = register(
    "mixers",
    "Tensor x, Tensor[] weights, str orders, SymInt nslices",
    _forward,
    _backward,
    like=_contiguous,
    states_shape=_states_shape,
    check=_check,
    flops=_flops,
)


def _launch_rates(logs: Sequence[Tensor], grad: Tensor | None) -> Tensor:
    out, size = _stacked(logs[0], logs[1:]), logs[0].numel()
    launch(
        _kernels().rates, (-(-size // 1024), len(logs)), out, tuple(t.contiguous() for t in logs), grad, out, size,
        count=len(logs), BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


def _stacked(log: Tensor, others: Sequence[Tensor]) -> Tensor:
    return log.new_empty(1 + len(others), *log.shape)


# -exp of the logarithms of rates A (E, N) of one order and of others: (orders, E, N).
rates = register(
    "rates", "Tensor log, Tensor[] others",
    lambda log, others, _: _launch_rates([log, *others], None),
    lambda grad, _, log, others: [*_launch_rates([log, *others], grad.contiguous())],
    output=_stacked,
)  # fmt: skip


def _launch_gate(kernel: str, tokens: Tensor, *arguments: Any, **more: int) -> None:
    """Launch a kernel of the gate over tokens (B, L, E)."""
    count, channels = tokens[..., 0].numel(), tokens.shape[-1]
    grid = -(-count // STEPS), -(-channels // BLOCK)
    more |= {"channels": channels, "STEPS": STEPS, "BLOCK": BLOCK, "num_warps": 4}
    launch(getattr(_kernels(), kernel), grid, tokens, *arguments, count, **more)


def _gated(y: Tensor, z: Tensor | None) -> Tensor:
    """The sum of y (orders, B, L, E) over orders, times silu(z)."""
    out = torch.empty_like(y[0])
    row = 0 if z is None else z.stride(1)
    _launch_gate("gate", out, y, z, row, out, count=len(y))
    return out


def _gate(y: Tensor, z: Tensor, _: Tensor) -> Tensor:
    return _gated(y.contiguous()[None], _rows(z))


def _gate_backward(grad: Tensor, _: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    grad, y, z = grad.contiguous(), y.contiguous(), _rows(z)
    dy, dz = torch.empty_like(y), z.new_empty(z.shape)
    _launch_gate("gate_backward", y, grad, y, z, z.stride(1), dy, dz)
    return [dy, dz]


# The gate, y silu(z), of tokens (B, L, E).
silu_gate = register("silu_gate", "Tensor y, Tensor z", _gate, _gate_backward, like=_contiguous)


def _project(tokens: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return torch.bmm(weight.to(tokens.dtype).expand(len(tokens), -1, -1), tokens.mT)


def _project_backward(grad: Tensor, _: Tensor, tokens: Tensor, weight: Tensor) -> list[Tensor]:
    grad = grad.contiguous()
    by_tokens = torch.bmm(grad.mT, weight.to(grad.dtype).expand(len(grad), -1, -1))
    by_weight = grad.transpose(0, 1).flatten(1) @ tokens.flatten(0, 1)
    return [by_tokens, by_weight.to(weight.dtype)]


# A linear map from tokens (B, L, E) by weight (C, E) to a map (B, C, L), in the tokens' type.
project = register(
    "project", "Tensor tokens, Tensor weight", _project, _project_backward, like=_contiguous,
    output=lambda tokens, weight: tokens.new_empty(len(tokens), len(weight), tokens.shape[1]),
)  # fmt: skip


def _norm_tile(channels: int) -> dict[str, int]:
    """Channels and tokens of a program of LayerNorm: about 4096 elements."""
    padded = _power(channels)
    return {"CHANNELS": padded, "TOKENS": max(8, min(64, 4096 // padded)), "num_warps": 4}


def _norm_output(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], dtype=dtype)


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, _: Tensor
) -> Tensor:
    batch, channels, length = x.shape
    out, tile = _norm_output(x, weight, bias, eps, dtype), _norm_tile(channels)
    launch(
        _kernels().norm, (-(-length // tile["TOKENS"]), batch), x,
        x, x.stride(), weight.float(), bias.float(), out, length, channels, eps, **tile,
    )  # fmt: skip
    return out


def _norm_backward(
    grad: Tensor, _: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> list[Tensor]:
    batch, channels, length = x.shape
    tile = _norm_tile(channels)
    programs = min(SUMS, -(-length // tile["TOKENS"]))
    sums = x.new_empty(batch, programs, 2, channels, dtype=torch.float32)
    dx = torch.empty_like(x)
    launch(
        _kernels().norm_backward, (programs, batch), x,
        x, x.stride(), weight.float(), grad.contiguous(), dx, sums, length, channels, eps, **tile,
    )  # fmt: skip
    return [dx, *(t.to(weight.dtype) for t in sums.sum((0, 1)))]


# LayerNorm over the channels of a map x (B, C, L): tokens (B, L, C) of a type.
channel_norm = register(
    "channel_norm", "Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype",
    _norm, _norm_backward, output=_norm_output,
)  # fmt: skip


def interpolated(x: Tensor, *_: Tensor) -> Tensor:
    """`double` with torch's own gradient."""
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)


def _double(x: Tensor, *_: Tensor) -> Tensor:
    # Of other strides torch on a GPU and its fake tensors make different ones.
    return interpolated(x.contiguous())


def _double_backward(grad: Tensor, _: Tensor, x: Tensor) -> list[Tensor]:
    dx, sizes = x.new_empty(x.shape), x.shape[2:]
    grid = (x.shape[:2].numel() * -(-sizes.numel() // VOXELS),)
    launch(
        _kernels().undouble, grid, x, grad.contiguous(), dx, *sizes, BLOCK=VOXELS, num_warps=4
    )  # fmt: skip
    return [dx]


# Trilinear interpolation of a map x (B, C, D, H, W) to (B, C, 2 D, 2 H, 2 W). torch sums its gradient with atomic
# additions, so that its bits differ from time to time.
double = register("double", "Tensor x", _double, _double_backward, like=_contiguous, output=_double)
