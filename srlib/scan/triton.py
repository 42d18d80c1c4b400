"""The selective scan on a GPU in Triton, which comes with torch's CUDA builds.

A scan of one 3D feature map has few channels and hundreds of thousands of tokens; one block per channel
leaves most of a GPU idle. So the sequence is cut into chunks that are worked on at the same time:

    forward    chunk_ends     each chunk's end state from zero, and its decay
               join           a short scan over chunks: the state that each starts from (checkpoints)
               outputs        each chunk again, from there
    backward   chunk_carries  each chunk's states again: dz, dC; what its gradients carry backwards
               join           the same, from the end
               gradients      each chunk from its end, tile by tile with a tile's states in registers

Decay and state are float32. A state is kept each chunk, in the backward pass each 16 steps. dB and dC
are written for each block of channels and then summed, so that the same bits come out every time.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Gradients, Options, ScanInputs

BLOCK = 32  # channels of a program, which is one warp
PROGRAMS = 4096  # chunks are made short enough for about so many
CHUNKS = (16, 256)  # shortest and longest chunk
TILE = 16  # steps whose states the backward pass holds in registers


def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def unavailable() -> str:
    """Why this back end cannot run here: no CUDA device, or no Triton."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        _kernels()
    except Exception as error:  # a Triton made for another torch fails in many ways
        return f"Triton cannot be used ({type(error).__name__}: {error})"
    return ""


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why this back end cannot take such tensors."""
    if device.type != "cuda":
        return f"triton needs CUDA tensors, got {device.type}"
    if dtype == torch.float64:
        return "triton computes in float32, got float64 tensors"
    return ""


def _chunk(u: Tensor) -> int:
    """Steps in a chunk, a power of two."""
    batch, channels, length = u.shape
    wanted = batch * -(-channels // BLOCK) * length / PROGRAMS
    shortest, longest = CHUNKS
    return min(longest, max(shortest, 2 ** math.ceil(math.log2(max(wanted, 1)))))


def states_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """The state before each chunk, (B, chunks, N, D)."""
    return u.shape[0], -(-u.shape[2] // _chunk(u)), A.shape[1], A.shape[0]


class _Launch:
    """What the kernels are called with: grid, sizes, and inputs as they want them."""

    def __init__(self, inputs: ScanInputs, options: Options) -> None:
        u = inputs.u
        batch, self.channels, self.length = u.shape
        self.states = inputs.A.shape[1]
        self.chunk = _chunk(u)
        self.chunks = -(-self.length // self.chunk)
        self.blocks = -(-self.channels // BLOCK)
        self.grid = (self.chunks, self.blocks, batch)
        self.inputs = inputs
        self.A = (inputs.A.float() * math.log2(math.e)).t().contiguous()
        self.B, self.C = (t.transpose(1, 2).float().contiguous() for t in (inputs.B, inputs.C))
        zeros = torch.zeros_like(self.A[0])
        self.D, self.bias = (
            zeros if t is None else t.float().contiguous() for t in (inputs.D, inputs.delta_bias)
        )
        self.sizes = {"chunks": self.chunks, "channels": self.channels, "states": self.states}
        self.scan = {
            **self.sizes,
            "length": self.length,
            "slice_length": -(-self.length // options.nslices),
            "per_chunk": self.chunk,
            "BLOCK": BLOCK,
            "ORDER": options.order,
            "SOFTPLUS": options.delta_softplus,
        }
        self.padded = 1 << (self.states - 1).bit_length()

    def empty(self, *shape: int) -> Tensor:
        return self.A.new_empty(shape)

    def per_chunk(self, *rows: int) -> Tensor:
        """Room for `rows` of channels of each chunk."""
        return self.empty(self.grid[2], self.chunks, *rows, self.channels)

    def join(self, ends: Tensor, totals: Tensor, starts: Tensor, backwards: bool) -> None:
        grid = (self.blocks, self.states, self.grid[2])
        _kernels().join[grid](
            ends, totals, self.A, starts, **self.sizes,
            ROWS=32, BLOCK=BLOCK, BACKWARDS=backwards, num_warps=1,
        )  # fmt: skip


def _strided(*sequences: Tensor | None) -> list:
    """Sequences, each followed by its strides."""
    return [x for t in sequences for x in (t, t.stride() if t is not None else (0, 0, 0))]


def forward(inputs: ScanInputs, options: Options, states: Tensor) -> Tensor:
    """The scan's output (B, D, L); fills `states` (B, chunks, N, D) unless it is empty."""
    go, kernels = _Launch(inputs, options), _kernels()
    ends, totals = go.per_chunk(go.states), go.per_chunk()
    starts = states if states.numel() else torch.empty_like(ends)
    y = torch.empty_like(inputs.u)
    u, delta, z = inputs.u, inputs.delta, inputs.z
    kernels.chunk_ends[go.grid](
        *_strided(u, delta), go.A, go.B, go.bias, ends, totals,
        **go.scan, STATES=go.padded, num_warps=1,
    )  # fmt: skip
    go.join(ends, totals, starts, backwards=False)
    kernels.outputs[go.grid](
        *_strided(u, delta, z, y), go.A, go.B, go.C, go.D, go.bias, starts,
        **go.scan, STATES=go.padded, num_warps=1,
    )  # fmt: skip
    return y


def backward(inputs: ScanInputs, options: Options, states: Tensor, grad: Tensor) -> Gradients:
    """Gradients of all inputs from `grad` (B, D, L) and the checkpoints of the forward pass."""
    go, kernels = _Launch(inputs, options), _kernels()
    u, delta, z = inputs.u, inputs.delta, inputs.z
    out = {name: torch.empty_like(t) for name, t in inputs.sequences().items()}
    batch, tiles = u.shape[0], -(-go.length // TILE)
    carries, totals = go.per_chunk(go.states), go.per_chunk()
    tile_starts = go.empty(batch, tiles, go.states, go.channels)
    by_block = (go.blocks, batch, go.length, go.states)

    def write(name: str, rows: Tensor) -> None:
        out[name].copy_(rows.sum(0).transpose(1, 2))

    dC = go.empty(*by_block)
    kernels.chunk_carries[go.grid](
        *_strided(u, delta, z, grad, out.get("z")), go.A, go.B, go.C, go.D, go.bias,
        states, tile_starts, carries, totals, dC, **go.scan, tiles=tiles, TILE=TILE, STATES=go.padded, num_warps=1,
    )  # fmt: skip
    write("C", dC)
    del dC
    after = torch.empty_like(carries)
    go.join(carries, totals, after, backwards=True)
    B, C = (F.pad(t, (0, 0, TILE, TILE)) for t in (go.B, go.C))
    dB, dA, dD, dbias = go.empty(go.blocks, *B.shape), carries, go.per_chunk(), totals
    kernels.gradients[go.grid](
        *_strided(u, delta, z, grad, out["u"], out["delta"]), go.A, B, C, go.D, go.bias,
        tile_starts, after, dB, dA, dD, dbias, **go.scan, tiles=tiles, TILE=TILE, num_warps=1,
    )  # fmt: skip
    write("B", dB[:, :, TILE:-TILE])
    sums = {"A": dA.sum((0, 1)).t(), "D": dD.sum((0, 1)), "delta_bias": dbias.sum((0, 1))}
    return {**out, **{name: sums[name].to(t.dtype) for name, t in inputs.parameters().items()}}
