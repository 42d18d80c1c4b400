"""Inputs of a selective scan for the tests, and how far two results are apart."""

from __future__ import annotations

import torch

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def random_inputs(
    batch: int,
    channels: int,
    length: int,
    states: int,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    channels_last: bool = True,
) -> dict[str, torch.Tensor]:
    """The inputs but those of `without`, from the current seed, each wanting a gradient.

    Sequences are views of (B, L, D) memory, as a network has them, or (B, D, L) as it stands.
    """

    def sequence(width: int) -> torch.Tensor:
        tokens = torch.randn(batch, length, width)
        return tokens.mT if channels_last else tokens.mT.contiguous()

    inputs = {
        "u": sequence(channels),
        "delta": sequence(channels),
        "A": -4 * torch.rand(channels, states) - 0.05,
        "B": sequence(states),
        "C": sequence(states),
        "D": torch.randn(channels),
        "z": sequence(channels),
        "delta_bias": torch.randn(channels),
    }
    given = {name: t.to(dtype) for name, t in inputs.items() if name not in without}
    return {name: t.requires_grad_() for name, t in given.items()}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    value, expected = value.detach().double(), expected.detach().double()
    largest = float(expected.abs().max())
    return float((value - expected).abs().max()) / (largest or 1.0)
