"""What a back end is given: the tensors of a scan, its options, and the checks on both."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .orders import check_order

Gradients = dict[str, Tensor]
HALF = (torch.float16, torch.bfloat16)


class ScanInputs(NamedTuple):
    """The tensors of a selective scan: batch B, channels D, tokens L, states N."""

    u: Tensor  # (B, D, L)
    delta: Tensor  # (B, D, L)
    A: Tensor  # (D, N)
    B: Tensor  # (B, N, L)
    C: Tensor  # (B, N, L)
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, D, L)
    delta_bias: Tensor | None  # (D,)

    def given(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: t for name, t in self._asdict().items() if t is not None}

    def parameters(self) -> dict[str, Tensor]:
        """Those without a token dimension; their gradients are sums over tokens."""
        return {name: t for name, t in self.given().items() if name in ("A", "D", "delta_bias")}

    def sequences(self) -> dict[str, Tensor]:
        """Those with a token dimension."""
        return {name: t for name, t in self.given().items() if name not in self.parameters()}

    def widened(self) -> ScanInputs:
        """The same with all sequences in the widest of their types."""
        sequences = self.sequences()
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in sequences.values()))
        return self._replace(**{name: t.to(dtype) for name, t in sequences.items()})

    def check(self) -> None:
        """Raise a ValueError that names the first argument that does not fit the others."""
        u, A = self.u, self.A
        if u.ndim != 3 or 0 in u.shape:
            raise ValueError(f"u: expected shape (B, D, L), none of them 0, got {tuple(u.shape)}")
        if A.ndim != 2 or A.shape[0] != u.shape[1] or A.shape[1] < 1:
            raise ValueError(
                f"A: expected shape (D, N) = ({u.shape[1]}, N) for u of shape {tuple(u.shape)}, "
                f"got {tuple(A.shape)}"
            )
        if not u.dtype.is_floating_point:
            raise ValueError(f"u: expected a real floating-point tensor, got {u.dtype}")
        batch, channels, length = u.shape
        states = (batch, A.shape[1], length)
        per_channel = (channels,)
        shapes = {"A": A.shape, "B": states, "C": states, "D": per_channel}
        shapes["delta_bias"] = per_channel
        for name, t in self.given().items():
            expected = tuple(shapes.get(name, u.shape))
            if tuple(t.shape) != expected:
                raise ValueError(
                    f"{name}: expected shape {expected} for u of shape {tuple(u.shape)} and A of "
                    f"shape {tuple(A.shape)}, got {tuple(t.shape)}"
                )
            if t.device != u.device:
                raise ValueError(f"{name}: expected on {u.device} as u is, got {t.device}")
        parameters = self.parameters()
        for name, t in self.given().items():
            wide = name in parameters and u.dtype in HALF and t.dtype == torch.float32
            if t.dtype != u.dtype and not wide:
                raise ValueError(f"{name}: expected {u.dtype} as u is, got {t.dtype}")


class Options(NamedTuple):
    """What a scan does with its tensors."""

    delta_softplus: bool
    order: str
    nslices: int

    def check(self) -> None:
        """Raise a ValueError for an unknown order or no slices."""
        check_order(self.order, self.nslices)
