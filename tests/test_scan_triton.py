"""The Triton kernels against the definition in float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from srlib.scan import selective_scan, triton
from srlib.scan.inputs import Options, ScanInputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is not installed: it comes with torch's CUDA builds")


def inputs_of(
    batch: int, channels: int, length: int, states: int, dtype: torch.dtype = torch.float32,
    optional: tuple[str, ...] = ("D", "z", "delta_bias"), channels_last: bool = True,
) -> ScanInputs:  # fmt: skip
    """Random inputs from the current seed, sequences as (B, L, D) in memory or as (B, D, L)."""

    def sequence(width: int) -> torch.Tensor:
        if channels_last:
            return torch.randn(batch, length, width).to(DEVICE, dtype).transpose(1, 2)
        return torch.randn(batch, width, length).to(DEVICE, dtype)

    A = (-4 * torch.rand(channels, states) - 0.05).to(DEVICE)
    vectors = {"D": torch.randn(channels), "delta_bias": torch.randn(channels)}
    given = {name: vectors[name].to(DEVICE) for name in vectors if name in optional}
    z = sequence(channels) if "z" in optional else None
    return ScanInputs(
        sequence(channels), sequence(channels), A, sequence(states), sequence(states),
        given.get("D"), z, given.get("delta_bias"),
    )  # fmt: skip


def run(inputs: ScanInputs, options: Options, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of the kernels, every element of which has been written."""
    states = torch.full(triton.states_shape(inputs.u, inputs.A), torch.nan, device=DEVICE)
    y = triton.forward(inputs, options, states)
    return {"y": y, **triton.backward(inputs, options, states, grad)}


def definition(inputs: ScanInputs, options: Options, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same by the reference back end and autograd, in float64."""
    wide = {name: t.double().requires_grad_() for name, t in inputs.given().items()}
    delta_softplus, order, nslices = options
    y = selective_scan(
        **wide, delta_softplus=delta_softplus, order=order, nslices=nslices, backend="reference"
    )
    y.backward(grad.double())
    return {"y": y.detach(), **{name: t.grad for name, t in wide.items()}}


def assert_close(results: dict, expected: dict, tolerance: float) -> None:
    assert results.keys() == expected.keys()
    for name, value in results.items():
        error = (value.double() - expected[name]).norm()
        allowed = tolerance * expected[name].norm()
        assert error <= allowed, f"{name}: error {error:.2g}, allowed {allowed:.2g}"


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Several chunks of several tiles in sequences that the interpreter can walk."""
    monkeypatch.setattr(triton, "CHUNKS", (4, 4))
    monkeypatch.setattr(triton, "TILE", 2)


@pytest.mark.parametrize(
    ("order", "nslices"), [("forward", 1), ("reverse", 1), ("inter_slice", 4), ("inter_slice", 8)]
)
def test_orders(order, nslices):
    torch.manual_seed(0)
    inputs = inputs_of(
        1, 3, 11, 2
    )  # 11 tokens: 4 slices of 3, the last of 2; or 6 of 2, the last of 1
    grad = torch.randn_like(inputs.u)
    options = Options(True, order, nslices)
    assert_close(run(inputs, options, grad), definition(inputs, options, grad), 3e-6)


@pytest.mark.parametrize(
    ("optional", "softplus"), [((), False), (("D",), True), (("z",), True), (("delta_bias",), True)]
)
def test_optional_inputs(optional, softplus):
    torch.manual_seed(1)
    inputs = inputs_of(1, 3, 6, 2, optional=optional)
    if not softplus:
        inputs = inputs._replace(delta=inputs.delta.abs())
    grad = torch.randn_like(inputs.u)
    options = Options(softplus, "forward", 1)
    assert_close(run(inputs, options, grad), definition(inputs, options, grad), 3e-6)


def test_batches_blocks_of_channels_and_the_other_layout():
    torch.manual_seed(2)
    inputs = inputs_of(2, 33, 5, 1, channels_last=False)
    grad = torch.randn_like(inputs.u)
    options = Options(True, "reverse", 1)
    results = run(inputs, options, grad)
    assert_close(results, definition(inputs, options, grad), 3e-6)
    assert results["y"].stride() == inputs.u.stride()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_lengths_around_tiles_and_chunks(length):
    torch.manual_seed(length)
    inputs = inputs_of(1, 2, length, 1)
    grad = torch.randn_like(inputs.u)
    options = Options(True, "forward", 1)
    assert_close(run(inputs, options, grad), definition(inputs, options, grad), 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(3)
    inputs = inputs_of(1, 4, 6, 2, dtype)
    grad = torch.randn_like(inputs.u)
    options = Options(True, "forward", 1)
    results, expected = run(inputs, options, grad), definition(inputs, options, grad)
    assert {t.dtype for name, t in results.items() if name in ("y", "u", "B", "z")} == {dtype}
    assert_close(results, expected, 2 * torch.finfo(dtype).eps)


def test_step_sizes_from_tiny_to_huge():
    torch.manual_seed(4)
    inputs = inputs_of(1, 6, 8, 2, optional=())
    inputs = inputs._replace(delta=torch.linspace(-30, 40, 48, device=DEVICE).view(1, 6, 8))
    grad = torch.randn_like(inputs.u)
    options = Options(True, "forward", 1)
    assert_close(run(inputs, options, grad), definition(inputs, options, grad), 3e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("u", "inf"), ("delta", "nan"), ("B", "inf"), ("z", "nan")]
)
def test_what_is_not_finite_stays_so(name, value):
    torch.manual_seed(5)
    inputs = inputs_of(1, 3, 9, 1)
    inputs.given()[name][0, 0, 5] = float(value)
    options = Options(True, "forward", 1)
    grad = torch.randn_like(inputs.u)
    results, expected = run(inputs, options, grad), definition(inputs, options, grad)
    for key in results:
        not_finite = ~expected[key].isfinite()
        assert not results[key][not_finite].isfinite().any(), key


def test_same_bits_every_time():
    torch.manual_seed(6)
    inputs = inputs_of(1, 33, 3, 1)
    grad = torch.randn_like(inputs.u)
    options = Options(True, "forward", 1)
    first, second = run(inputs, options, grad), run(inputs, options, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_it_cannot_do_is_said():
    assert "CUDA tensors" in triton.refuses(torch.device("cpu"), torch.float32)
    assert "float64" in triton.refuses(torch.device("cuda"), torch.float64)
    assert not triton.refuses(torch.device("cuda"), torch.bfloat16)
    if DEVICE == "cpu":
        assert triton.unavailable() == "no CUDA device"
