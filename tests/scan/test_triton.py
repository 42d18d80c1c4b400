"""Triton's kernels against the definition in float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import definition, random_inputs, relative_error, scan_checks, with_gradients

from srlib.scan import ORDERS, Weights, mamba_mixer, token_order, triton_mixer
from srlib.scan import triton as back_end

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch's CUDA builds")

import triton
import triton.language as tl

from srlib.scan.triton_mixer_kernels import visit, visited

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Several chunks of several tiles in sequences that the interpreter can walk."""
    for module in (back_end, triton_mixer):
        monkeypatch.setattr(module, "CHUNKS", (4, 4))
        monkeypatch.setattr(module, "TILE", 2)
    monkeypatch.setattr(triton_mixer, "STEPS", 4)


# --- The scan -------------------------------------------------------------------------------------


def inputs_of(
    *sizes: int, dtype=torch.float32, optional=("D", "z", "delta_bias"), **options
) -> dict:
    """Random inputs from the current seed, with these of the optional ones; parameters are float32."""
    without = tuple({"D", "z", "delta_bias"} - set(optional))
    inputs = random_inputs(*sizes, without=without, **options)
    wide = ("A", "D", "delta_bias")
    return {k: t.detach().to(DEVICE, None if k in wide else dtype) for k, t in inputs.items()}


def found_and_expected(inputs: dict, order="forward", nslices=1, delta_softplus=True):
    """Output and gradients of the kernels, and of the definition."""
    options = {"order": order, "nslices": nslices, "delta_softplus": delta_softplus}
    grad = torch.randn_like(inputs["u"])
    found = with_gradients(partial(scan_checks.by_triton, **options), inputs, grad)
    return found, definition(inputs, grad, **options)


def assert_close(results: tuple[dict, dict], tolerance: float) -> None:
    """Assert that the norm of each error is small beside that of what is expected."""
    found, expected = results
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error, allowed = (value.double() - expected[name]).norm(), tolerance * expected[name].norm()
        assert error <= allowed, f"{name}: error {error:.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tile", [4, back_end.TILE])
def test_longer_tiles(monkeypatch, order, tile):
    for module in (back_end, triton_mixer):
        monkeypatch.setattr(module, "TILE", tile)
        monkeypatch.setattr(module, "CHUNKS", (tile, tile))
    torch.manual_seed(7)
    assert_close(found_and_expected(inputs_of(2, 33, 7, 2, optional=()), order, 3), 3e-6)
    tensors, grad = random_mixers(2, 5, 33, 1), torch.randn(2, 5, 33, device=DEVICE)
    assert largest_error(*results(tensors, [order], 3, grad)) < 5e-6


# 11 tokens: 4 slices of 3, the last of 2; or 6 of 2, the last of 1
@pytest.mark.parametrize(
    ("order", "nslices"), [("forward", 1), ("reverse", 1), ("inter_slice", 4), ("inter_slice", 8)]
)
def test_orders(order, nslices):
    torch.manual_seed(0)
    assert_close(found_and_expected(inputs_of(1, 3, 11, 2), order, nslices), 3e-6)


@pytest.mark.parametrize(
    ("optional", "softplus"), [((), False), (("D",), True), (("z",), True), (("delta_bias",), True)]
)
def test_optional_inputs(optional, softplus):
    torch.manual_seed(1)
    inputs = inputs_of(1, 3, 6, 2, optional=optional)
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
    assert_close(found_and_expected(inputs, delta_softplus=softplus), 3e-6)


def test_batches_blocks_of_channels_and_the_other_layout():
    torch.manual_seed(2)
    inputs = inputs_of(2, 33, 5, 1, channels_last=False)
    results = found_and_expected(inputs, "reverse")
    assert_close(results, 3e-6)
    assert results[0]["y"].stride() == inputs["u"].stride()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_lengths_around_tiles_and_chunks(length):
    torch.manual_seed(length)
    assert_close(found_and_expected(inputs_of(1, 2, length, 1)), 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(3)
    results = found_and_expected(inputs_of(1, 4, 6, 2, dtype=dtype))
    assert {results[0][name].dtype for name in ("y", "u", "B", "z")} == {dtype}
    assert_close(results, 2 * torch.finfo(dtype).eps)


def test_step_sizes_from_tiny_to_huge():
    torch.manual_seed(4)
    inputs = inputs_of(1, 6, 8, 2, optional=())
    inputs["delta"] = torch.linspace(-30, 40, 48, device=DEVICE).view(1, 6, 8)
    assert_close(found_and_expected(inputs), 3e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("u", "inf"), ("delta", "nan"), ("B", "inf"), ("z", "nan")]
)
def test_what_is_not_finite_stays_so(name, value):
    torch.manual_seed(5)
    inputs = inputs_of(1, 3, 9, 1)
    inputs[name][0, 0, 5] = float(value)
    found, expected = found_and_expected(inputs)
    for key in expected:
        assert not found[key][~expected[key].isfinite()].isfinite().any(), key


def test_same_bits_every_time():
    torch.manual_seed(6)
    inputs, grad = inputs_of(1, 33, 3, 1), torch.randn(1, 33, 3, device=DEVICE)
    scan = partial(scan_checks.by_triton, order="forward", nslices=1, delta_softplus=True)
    first, second = (with_gradients(scan, inputs, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_it_cannot_do_is_said():
    assert "CUDA tensors" in back_end.refuses(torch.device("cpu"), torch.float32)
    assert "float64" in back_end.refuses(torch.device("cuda"), torch.float64)
    assert not back_end.refuses(torch.device("cuda"), torch.bfloat16)
    if DEVICE == "cpu":
        assert back_end.unavailable() == "no CUDA device"


# --- ToM's mixers, gate, projection and LayerNorm -------------------------------------------------


def random_mixers(batch: int, length: int, width: int, count: int) -> list[torch.Tensor]:
    """Tokens, every second half of longer rows as a network has them, and the seven kinds of weights."""
    taps, rank, states = 2, 1, 2
    shapes = [(width, taps), (width,), (rank + 2 * states, width), (width, rank), (width,)]
    shapes += [(width, states), (width,)]
    weights = [torch.randn(shape) for shape in shapes for _ in range(count)]
    for A in weights[5 * count : 6 * count]:
        A.copy_(-A.abs())
    x = torch.randn(batch, length, 2 * width).chunk(2, -1)[1]
    return [t.to(DEVICE) for t in (x, *weights)]


def gradients(function, tensors: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of a function of tensors."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


def largest_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(map(relative_error, found, expected))


def results(tensors: list[torch.Tensor], orders: Sequence[str], nslices: int, grad: torch.Tensor):
    """Output and gradients of the kernels, and of the compositions."""

    def fused(x, *weights):
        return triton_mixer.mixers(x, weights, ",".join(orders), nslices)

    def composed(x, *weights):
        kinds = [Weights(*weights[i :: len(orders)]) for i in range(len(orders))]
        mixed = (mamba_mixer(x, *each, nslices) for each in zip(kinds, orders, strict=True))
        return torch.stack([*mixed]).sum(0)

    wide = [t.double() for t in tensors]
    return gradients(fused, tensors, grad), gradients(composed, wide, grad)


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
    tensors, grad = random_mixers(*shape, len(orders)), torch.randn(shape, device=DEVICE)
    assert largest_error(*results(tensors, orders, nslices, grad)) < 5e-6


def test_orders_may_take_turns(monkeypatch):
    """As on large maps, where one order fills the GPU."""
    torch.manual_seed(1)
    given = random_mixers(1, 3, 2, 2), ("inter_slice", "forward"), 2
    grad = torch.randn(1, 3, 2, device=DEVICE)
    together, _ = results(*given, grad)
    monkeypatch.setattr(triton_mixer, "TOGETHER", 1)
    apart, again = (results(*given, grad)[0] for _ in range(2))
    assert largest_error(apart, together) < 1e-6
    assert all(map(torch.equal, apart, again))  # the same bits every time


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_precision_of_mixers_stays_within_its_rounding(dtype, error):
    torch.manual_seed(3)
    x, *weights = random_mixers(1, 4, 4, 1)
    grad = torch.randn(1, 4, 4, device=DEVICE)
    found, expected = results([x.to(dtype), *weights], ["reverse"], 1, grad)
    assert [t.dtype for t in found[:3]] == [dtype, dtype, torch.float32]
    assert largest_error(found, expected) < error


def test_gate_projection_rates_and_norm():
    torch.manual_seed(4)

    def compare(function, exact, *tensors):
        grad = torch.randn_like(function(*tensors))
        expected = gradients(exact, [t.double() for t in tensors], grad)
        assert largest_error(gradients(function, tensors, grad), expected) < 2e-6

    random = partial(torch.randn, device=DEVICE)
    z = random(2, 5, 6).chunk(2, -1)[0]
    compare(triton_mixer.silu_gate, lambda y, z: y * F.silu(z), random(2, 5, 3), z)
    compare(triton_mixer.project, lambda t, w: (t @ w.mT).mT, random(2, 5, 3), random(4, 3))
    compare(
        lambda *logs: triton_mixer.rates(logs[0], [*logs[1:]]),
        lambda *logs: -torch.stack(logs).exp(),
        random(3, 4),
        random(4, 3).mT,
        random(3, 4),
    )
    for x in (random(2, 3, 2, 5), random(2, 3, 2, 5).contiguous(memory_format=torch.channels_last)):
        compare(
            lambda x, w, b: triton_mixer.channel_norm(x.flatten(2), w, b, 1e-5, torch.float32),
            lambda x, w, b: F.layer_norm(x.flatten(2).mT, (3,), w, b, 1e-5),
            *(x, random(3), random(3)),
        )


def by_torch(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)


def upsampled(x: torch.Tensor, grad: torch.Tensor) -> tuple[list, list]:
    """Output and gradient of the kernel, and of torch on the CPU in float64."""
    expected = gradients(by_torch, [x.double().cpu()], grad.double().cpu())
    return gradients(triton_mixer.double, [x], grad), [t.to(DEVICE) for t in expected]


@pytest.mark.parametrize(
    ("rows", "sizes", "block"),
    [
        *((1, sizes, 128) for sizes in product(range(1, 6), repeat=3)),
        (6, (2, 5, 3), 16),  # two blocks a row, the second one not filled
        (6, (1, 4, 4), 8),
    ],
    ids=str,
)
def test_gradient_of_upsampling(monkeypatch, rows, sizes, block):
    monkeypatch.setattr(triton_mixer, "VOXELS", block)
    torch.manual_seed(5)
    x = torch.randn(-(-rows // 3), min(rows, 3), *sizes, device=DEVICE)
    found, expected = upsampled(x, torch.randn_like(by_torch(x)))
    assert torch.equal(found[0], by_torch(x))
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upsampling_rounds_its_gradient_once_and_takes_any_strides(dtype):
    torch.manual_seed(6)
    x = torch.randn(2, 3, 4, 3, 5, device=DEVICE, dtype=dtype).transpose(2, 4)
    grad = torch.randn(2, 3, 10, 6, 16, device=DEVICE, dtype=dtype)[..., ::2]
    (y, found), (_, expected) = upsampled(x, grad)
    assert y.dtype == found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        assert triton_mixer.double(x).dtype == by_torch(x).dtype  # on a GPU float32


def test_upsampling_is_known_to_torch_s_tools():
    x = torch.randn(2, 3, 2, 1, 3, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)
    torch.library.opcheck(torch.ops.srlib.double, (x.requires_grad_(), True))


def test_what_does_not_fit_is_named():
    x, *weights = random_mixers(1, 3, 2, 1)
    with pytest.raises(ValueError, match="weights"):
        triton_mixer.mixers(x, weights[:-1], "forward", 1)
    with pytest.raises(ValueError, match="order"):
        triton_mixer.mixers(x, weights, "backward", 1)


@triton.jit
def _places(cases, there, back, ROWS: tl.constexpr, STEPS: tl.constexpr):
    row, i = tl.arange(0, ROWS)[:, None], tl.arange(0, STEPS)[None, :]
    order, length = tl.load(cases + row * 3), tl.load(cases + row * 3 + 1)
    slice_length = tl.load(cases + row * 3 + 2)
    at = row * STEPS + i
    tl.store(there + at, visited(i, order, length, slice_length), i < length)
    tl.store(back + at, visit(i, order, length, slice_length), i < length)


def test_addresses_for_all_lengths_and_slices():
    """The token of every step and the step of every token, for every length to 40 and number of slices."""
    numbers, lengths = range(len(ORDERS)), range(1, 41)
    cases = [(n, length, s) for n in numbers for length in lengths for s in range(1, length + 2)]
    for some in (cases[i : i + 256] for i in range(0, len(cases), 256)):
        sizes = [(number, length, -(-length // nslices)) for number, length, nslices in some]
        sizes += [(0, 1, 1)] * (256 - len(sizes))
        there = torch.full((256, 64), -1, dtype=torch.int32, device=DEVICE)
        back = there.clone()
        given = torch.tensor(sizes, dtype=torch.int32, device=DEVICE), there, back
        _places[1,](*given, ROWS=256, STEPS=64)
        for case, row, inverse in zip(some, there.cpu(), back.cpu(), strict=False):
            number, length, nslices = case
            tokens = token_order(ORDERS[number], length, nslices)
            assert torch.equal(row[:length].long(), tokens)
            assert torch.equal(inverse[:length].long()[tokens], torch.arange(length))
