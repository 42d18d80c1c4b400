"""Problems for the scan's tests, as `benchmarks/scan_checks.py` draws them, and how far two results are apart."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

from srlib.files import ROOT
from srlib.scan import selective_scan

_spec = importlib.util.spec_from_file_location("scan_checks", ROOT / "benchmarks/scan_checks.py")
scan_checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scan_checks)
mixed, with_gradients = scan_checks.mixed, scan_checks.with_gradients

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def random_inputs(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    channels_last: bool = True,
) -> dict[str, torch.Tensor]:
    """Inputs of a scan of batch, channels, length, states, but those of `without`, each wanting a gradient.

    Sequences are views of (B, L, D) memory, as a network has them, or (B, D, L) as it stands.
    """
    drawn = scan_checks.scan_inputs(*sizes)
    given = {name: drawn[name].to(dtype) for name in NAMES if name not in without}
    return {
        name: (t if channels_last else t.contiguous()).requires_grad_() for name, t in given.items()
    }


def random_mixer(
    batch: int = 2,
    length: int = 200,
    width: int = 40,
    rank: int = 3,
    states: int = 16,
    taps: int = 4,
) -> dict[str, torch.Tensor]:
    """Tokens and weights of a mixer, each wanting a gradient."""
    drawn = scan_checks.mixer_inputs(batch, width, length, states, rank, taps)
    return {name: t.requires_grad_() for name, t in drawn.items()}


def detached(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs without their history."""
    return {name: t.detach() for name, t in inputs.items()}


def doubles(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs in float64."""
    return {name: t.double() for name, t in inputs.items()}


def definition(inputs: dict[str, torch.Tensor], grad: torch.Tensor, **options) -> dict:
    """Output and gradients of a scan by its definition and autograd, in float64."""
    scan = partial(selective_scan, **options, backend="reference")
    return with_gradients(scan, doubles(inputs), grad)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def assert_close(found: dict, expected: dict, bound: float) -> None:
    """Assert that both have the same names, with relative errors below the bound."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < bound, name
