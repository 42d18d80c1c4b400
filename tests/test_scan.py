"""The selective scan: its definition, its operator and its back ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from srlib.scan import backends, operator, selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
RUNNING = [name for name, state in backends().items() if state.available]
ORACLE = np.load(Path(__file__).parent / "oracles" / "selective_scan.npz")


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("backend", RUNNING)
def test_values_and_gradients_are_the_oracles(backend):
    inputs = {name: torch.tensor(ORACLE[name], requires_grad=True) for name in NAMES}
    y = selective_scan(**inputs, backend=backend)
    y.backward(torch.tensor(ORACLE["dy"]))
    assert relative_error(y.detach(), torch.tensor(ORACLE["y"])) < 1e-9
    for name, t in inputs.items():
        assert relative_error(t.grad, torch.tensor(ORACLE[f"grad_{name}"])) < 1e-9, name


def random_inputs(
    batch: int, channels: int, length: int, states: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """All eight inputs, drawn from the current seed, each wanting a gradient."""
    sequence, weights = (batch, channels, length), (batch, states, length)
    inputs = {
        "u": torch.randn(sequence),
        "delta": torch.randn(sequence),
        "A": -4 * torch.rand(channels, states) - 0.05,
        "B": torch.randn(weights),
        "C": torch.randn(weights),
        "D": torch.randn(channels),
        "z": torch.randn(sequence),
        "delta_bias": torch.randn(channels),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}


@pytest.mark.parametrize("backend", [name for name in RUNNING if name != "reference"])
def test_operator_keeps_torchs_contract(backend):
    torch.manual_seed(0)
    inputs = random_inputs(2, 5, 19, 3)
    options = (True, "inter_slice", 4, backend)
    torch.library.opcheck(operator.scan, (*inputs.values(), *options, True))
    y, states = operator.scan(*inputs.values(), *options, True)
    tensors = [t.detach() for t in inputs.values()]
    torch.library.opcheck(operator.scan_backward, (torch.randn_like(y), states, *tensors, *options))


@pytest.mark.parametrize("backend", RUNNING)
def test_autocast_leaves_the_scan_in_float32(backend):
    torch.manual_seed(0)
    inputs = random_inputs(2, 5, 19, 3)
    inputs["delta"] = inputs["delta"].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(**inputs, backend=backend)
        y.sum().backward()
    inputs["delta"] = inputs["delta"].float()
    expected = selective_scan(**inputs, backend="reference")
    assert y.dtype == torch.float32
    assert relative_error(y, expected) < 1e-6
