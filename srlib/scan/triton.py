"""The selective scan on a GPU in Triton, which comes with torch's CUDA builds.

A scan of one 3D feature map has few channels and hundreds of thousands of tokens; one block per channel
leaves most of a GPU idle. So the sequence is cut into chunks that are worked on at the same time:

    forward    walk           each chunk's end state from zero, and its decay
               join           a short scan over chunks: the state that each starts from, which is kept
               walk           each chunk again, from there: the output
    backward   chunk_carries  each chunk's states again: dz, dC; what its gradients carry backwards
               join           the same, from the end
               gradients      each chunk from its end, tile by tile with a tile's states in registers

Decay and state are float32. A state is kept each chunk, in the backward pass each tile. dB and dC
are written for each block of channels and then summed, so that the same bits come out every time.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Gradients, Options, ScanInputs, refused_by_cuda, unusable

BLOCK = 32  # channels of a program, which is one warp
PROGRAMS = 6144  # chunks are made short enough for about so many
CHUNKS = (16, 256)  # shortest and longest chunk
TILE = 8  # steps whose states the backward pass holds in registers
REGISTERS = 128  # of a thread of `gradients`; fewer let more programs run at once


def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def unavailable() -> str:
    """The reason why this back end cannot run here: no CUDA device, or no Triton."""
    return (
        unusable(_kernels, "Triton cannot be used")
        if torch.cuda.is_available()
        else "no CUDA device"
    )


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """The reason why this back end cannot take such tensors."""
    return refused_by_cuda("triton", device, dtype)


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
    """The kernels' grid, sizes and weights: those of one scan."""

    def __init__(self, inputs: ScanInputs, options: Options) -> None:
        batch, channels, length = inputs.u.shape
        chunk, states = _chunk(inputs.u), inputs.A.shape[1]
        self.grid = (-(-length // chunk), -(-channels // BLOCK), batch)
        self.sizes = {"chunks": self.grid[0], "channels": channels, "states": states}
        self.scan = {
            "length": length,
            "slice_length": -(-length // options.nslices),
            "per_chunk": chunk,
            "STATES": 1 << (states - 1).bit_length(),
            "ORDER": options.order,
            "SOFTPLUS": options.delta_softplus,
        }
        self.A = (inputs.A.float() * math.log2(math.e)).t().contiguous()
        self.B, self.C = (t.transpose(1, 2).float().contiguous() for t in (inputs.B, inputs.C))
        zeros = torch.zeros_like(self.A[0])
        self.D, self.bias = (
            zeros if t is None else t.float().contiguous() for t in (inputs.D, inputs.delta_bias)
        )

    def room(self, *rows: int) -> Tensor:
        """Room for `rows` of channels of each chunk, (B, chunks, *rows, D)."""
        return self.A.new_empty(self.grid[2], self.grid[0], *rows, self.sizes["channels"])

    def run(
        self, kernel: str, sequences: tuple, B: Tensor, C: Tensor, *rest: Any, **more: int
    ) -> None:
        """Launch a kernel that goes through the sequence."""
        strided = [x for t in sequences for x in (t, (0, 0, 0) if t is None else t.stride())]
        launch(
            getattr(_kernels(), kernel), self.grid, self.A,
            *strided, self.A, B, C, self.D, self.bias, *rest,
            **self.sizes, **self.scan, BLOCK=BLOCK, num_warps=1, **more,
        )  # fmt: skip


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **more: Any) -> None:
    """Launch `kernel(*arguments, **more)` on the device of `like`."""
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **more)


def join(
    ends: Tensor, totals: Tensor, A: Tensor, starts: Tensor, batch: int, backwards: bool
) -> Tensor:
    """The states that chunks start from, written to `starts` (rows, chunks, N, D) from `ends` of that shape."""
    rows, chunks, states, channels = ends.shape
    launch(
        _kernels().join, (-(-channels // BLOCK), states, rows), A, ends, totals, A, starts, batch=batch,
        chunks=chunks, channels=channels, states=states, ROWS=32, BLOCK=BLOCK, BACKWARDS=backwards, num_warps=1,
    )  # fmt: skip
    return starts


def forward(inputs: ScanInputs, options: Options, states: Tensor) -> Tensor:
    """The scan's output (B, D, L); fills `states` (B, chunks, N, D) unless it is empty."""
    go, y = _Launch(inputs, options), torch.empty_like(inputs.u)
    u, delta, z = inputs.u, inputs.delta, inputs.z
    ends, totals = go.room(inputs.A.shape[1]), go.room()
    go.run("walk", (u, delta, None, None), go.B, go.C, None, ends, totals)
    starts = states if states.numel() else torch.empty_like(ends)
    join(ends, totals, go.A, starts, len(u), backwards=False)
    go.run("walk", (u, delta, z, y), go.B, go.C, starts, None, None)
    return y


def backward(inputs: ScanInputs, options: Options, states: Tensor, grad: Tensor) -> Gradients:
    """Gradients of all inputs from `grad` (B, D, L) and the states that the forward pass kept."""
    go, (u, delta, z) = _Launch(inputs, options), (inputs.u, inputs.delta, inputs.z)
    out = {name: torch.empty_like(t) for name, t in inputs.sequences().items()}
    tiles = {"tiles": -(-u.shape[2] // TILE), "TILE": TILE}
    tile_starts = go.A.new_empty(u.shape[0], tiles["tiles"], *go.A.shape)
    carries, totals = torch.empty_like(states), go.room()

    by_block = go.A.new_empty(go.grid[1], *go.C.shape)  # (blocks of channels, B, L, N)
    sequences: tuple[Tensor | None, ...] = (u, delta, z, grad, out.get("z"))
    go.run(
        "chunk_carries", sequences, go.B, go.C, states, tile_starts, carries, totals, by_block, **tiles
    )  # fmt: skip
    out["C"].copy_(by_block.sum(0).transpose(1, 2))
    del by_block
    after = join(carries, totals, go.A, torch.empty_like(carries), len(u), backwards=True)

    B, C = (F.pad(t, (0, 0, TILE, TILE)) for t in (go.B, go.C))  # tiles may reach beyond the ends
    by_block = go.A.new_empty(go.grid[1], *B.shape)
    sums = {"A": torch.empty_like(carries), "D": go.room(), "delta_bias": go.room()}
    sequences = (u, delta, z, grad, out["u"], out["delta"])
    go.run(
        "gradients", sequences, B, C, tile_starts, after, by_block, *sums.values(), **tiles,
        maxnreg=REGISTERS,
    )  # fmt: skip
    out["B"].copy_(by_block[:, :, TILE:-TILE].sum(0).transpose(1, 2))
    for name, t in inputs.parameters().items():
        total = sums[name].sum((0, 1))
        out[name] = (total.t() if name == "A" else total).to(t.dtype)
    return out
