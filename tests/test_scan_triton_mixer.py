"""ToM's mixers, gate, projection and LayerNorm in Triton against float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import relative_error

from srlib.scan import ORDERS, mamba_mixer, token_order, triton_mixer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is not installed: it comes with torch's CUDA builds")


def random_mixers(
    batch: int, length: int, width: int, count: int, rank: int = 1, states: int = 2, taps: int = 2
) -> list[torch.Tensor]:
    """Tokens, every second half of longer rows as a network has them, and the seven kinds of weights."""
    shapes = [(width, taps), (width,), (rank + 2 * states, width), (width, rank), (width,)]
    shapes += [(width, states), (width,)]
    weights = [torch.randn(shape) for shape in shapes for _ in range(count)]
    for A in weights[5 * count : 6 * count]:
        A.copy_(-A.abs())
    x = torch.randn(batch, length, 2 * width).chunk(2, -1)[1]
    return [t.to(DEVICE).requires_grad_() for t in (x, *weights)]


def results(tensors: list[torch.Tensor], orders: Sequence[str], nslices: int, grad: torch.Tensor):
    x, *weights = tensors
    y = triton_mixer.mixers(x, weights, ",".join(orders), nslices)
    return [y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


def definition(
    tensors: list[torch.Tensor], orders: Sequence[str], nslices: int, grad: torch.Tensor
):
    x, *weights = wide = [t.detach().double().requires_grad_() for t in tensors]
    ys = [
        mamba_mixer(x, *weights[i :: len(orders)], order=order, nslices=nslices)
        for i, order in enumerate(orders)
    ]
    y = torch.stack(ys).sum(0)
    return [y, *torch.autograd.grad(y, wide, grad.double())]


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Several chunks of several tiles in sequences that the interpreter can walk."""
    monkeypatch.setattr(triton_mixer, "CHUNKS", (4, 4))
    monkeypatch.setattr(triton_mixer, "TILE", 2)
    monkeypatch.setattr(triton_mixer, "STEPS", 4)


@pytest.mark.parametrize(
    ("orders", "shape", "nslices"),
    [
        (ORDERS, (1, 7, 3), 3),  # 3 slices of 3, the last of 1
        (("inter_slice",), (2, 5, 2), 4),  # 4 slices of 2, the third of 1, the last of none
        (("reverse", "forward"), (1, 1, 33), 1),  # a single token, two blocks of channels
    ],
)
def test_mixers_are_the_sum_of_the_compositions(orders, shape, nslices):
    torch.manual_seed(0)
    tensors = random_mixers(*shape, len(orders))
    grad = torch.randn(shape, device=DEVICE)
    found, expected = (
        results(tensors, orders, nslices, grad),
        definition(tensors, orders, nslices, grad),
    )
    for value, exact in zip(found, expected, strict=True):
        assert relative_error(value, exact) < 5e-6


def test_orders_may_take_turns(monkeypatch):
    """As on large maps, where one order fills the GPU."""
    torch.manual_seed(1)
    orders = ("inter_slice", "forward")
    tensors, grad = random_mixers(1, 3, 2, 2), torch.randn(1, 3, 2, device=DEVICE)
    together = results(tensors, orders, 2, grad)
    monkeypatch.setattr(triton_mixer, "TOGETHER", 1)
    apart = results(tensors, orders, 2, grad)
    for value, expected in zip(apart, together, strict=True):
        assert relative_error(value, expected) < 1e-6
    assert all(
        torch.equal(a, b) for a, b in zip(apart, results(tensors, orders, 2, grad), strict=True)
    )  # the same bits every time


def test_bfloat16_stays_within_its_rounding():
    torch.manual_seed(3)
    x, *weights = random_mixers(1, 4, 4, 1)
    tensors = [x.detach().bfloat16().requires_grad_(), *weights]
    grad = torch.randn(1, 4, 4, device=DEVICE)
    found, expected = (
        results(tensors, ["reverse"], 1, grad),
        definition(tensors, ["reverse"], 1, grad),
    )
    assert [t.dtype for t in found[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for value, exact in zip(found, expected, strict=True):
        assert relative_error(value, exact) < 0.05


def test_gate_projection_and_norm():
    torch.manual_seed(4)

    def compare(function, exact, *tensors):
        wide = [t.detach().double().requires_grad_() for t in tensors]
        value, expected = function(*tensors), exact(*wide)
        grad = torch.randn_like(value)
        assert relative_error(value, expected) < 2e-6
        pairs = zip(
            torch.autograd.grad(value, tensors, grad),
            torch.autograd.grad(expected, wide, grad.double()),
            strict=True,
        )
        for found, wanted in pairs:
            assert relative_error(found, wanted) < 2e-6

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, requires_grad=True)

    z = random(2, 5, 6).chunk(2, -1)[0]
    compare(triton_mixer.silu_gate, lambda y, z: y * F.silu(z), random(2, 5, 3), z)
    compare(triton_mixer.project, lambda t, w: (t @ w.mT).mT, random(2, 5, 3), random(4, 3))
    maps = random(2, 3, 2, 5), random(2, 3, 2, 5).contiguous(memory_format=torch.channels_last)
    for x in maps:
        compare(
            lambda x, w, b: triton_mixer.channel_norm(x.flatten(2), w, b, 1e-5, torch.float32),
            lambda x, w, b: F.layer_norm(x.flatten(2).mT, (3,), w, b, 1e-5),
            *(x, random(3), random(3)),
        )


def test_what_does_not_fit_is_named():
    x, *weights = random_mixers(1, 3, 2, 1)
    with pytest.raises(ValueError, match="weights"):
        triton_mixer.mixers(x, weights[:-1], "forward", 1)
    with pytest.raises(ValueError, match="order"):
        triton_mixer.mixers(x, weights, "backward", 1)


def test_addresses_for_all_lengths_and_slices():
    """The token of every step and the step of every token, for every length to 40 and number of slices."""
    import triton
    import triton.language as tl

    from srlib.scan.triton_mixer_kernels import visit, visited

    @triton.jit
    def places(cases, there, back, ROWS: tl.constexpr, STEPS: tl.constexpr):
        row, i = tl.arange(0, ROWS)[:, None], tl.arange(0, STEPS)[None, :]
        order, length = tl.load(cases + row * 3), tl.load(cases + row * 3 + 1)
        slice_length = tl.load(cases + row * 3 + 2)
        at = row * STEPS + i
        tl.store(there + at, visited(i, order, length, slice_length), i < length)
        tl.store(back + at, visit(i, order, length, slice_length), i < length)

    cases = [
        (number, length, nslices)
        for number in range(len(ORDERS))
        for length in range(1, 41)
        for nslices in range(1, length + 2)
    ]
    for some in (cases[i : i + 256] for i in range(0, len(cases), 256)):
        sizes = [(number, length, -(-length // nslices)) for number, length, nslices in some]
        sizes += [(0, 1, 1)] * (256 - len(sizes))
        there = torch.full((256, 64), -1, dtype=torch.int32, device=DEVICE)
        back = there.clone()
        places[1,](
            torch.tensor(sizes, dtype=torch.int32, device=DEVICE), there, back, ROWS=256, STEPS=64
        )
        for (number, length, nslices), row, inverse in zip(
            some, there.cpu(), back.cpu(), strict=False
        ):
            tokens = token_order(ORDERS[number], length, nslices)
            assert torch.equal(row[:length].long(), tokens)
            assert torch.equal(inverse[:length].long()[tokens], torch.arange(length))
