"""The tensors that an operator is given, scan or mixer, and the checks on them: kernels see only what fits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .definition import check_order, compute_dtype

Gradients = dict[str, Tensor]
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)


def _axes(**names: str) -> dict[str, tuple[str, ...]]:
    return {tensor: tuple(axes.split()) for tensor, axes in names.items()}


# Axes by name; an axis has one size wherever it comes, which the first tensor that has it says.
SCAN_AXES = _axes(
    u="B D L", delta="B D L", A="D N", B="B N L", C="B N L", D="D", z="B D L", delta_bias="D"
)
MIXER_AXES = _axes(
    x="B L E", conv_weight="E taps", conv_bias="E", dt_proj="E R", dt_bias="E", A="E N", D="E",
    x_proj="R+2N E",
)  # fmt: skip


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


class Options(NamedTuple):
    """The settings of a scan."""

    delta_softplus: bool
    order: str
    nslices: int


def check_scan(inputs: ScanInputs, options: Options) -> None:
    """Raise a ValueError that names the first argument of `selective_scan` that does not fit."""
    _check(SCAN_AXES, inputs.given(), wide=("A", "D", "delta_bias"))
    check_order(options.order, options.nslices)


def check_mixer(tensors: Sequence[Tensor], order: str, nslices: int, casts: bool = False) -> None:
    """Raise a ValueError that names the first argument of `mamba_mixer` that does not fit the others.

    Where the operator `casts`, as under autocast, all weights may be wider than x, else those that the scan takes.
    """
    x, conv_weight, conv_bias, x_proj, *others = tensors
    named = zip(MIXER_AXES, (x, conv_weight, conv_bias, *others, x_proj), strict=True)
    casts = casts or torch.is_autocast_enabled(x.device.type)
    _check(MIXER_AXES, dict(named), wide=tuple(MIXER_AXES) if casts else ("dt_bias", "A", "D"))
    check_order(order, nslices)


def _check(
    axes: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor], wide: Sequence[str]
) -> None:
    """Raise a ValueError that names the first tensor that does not fit those before it.

    All are on the first one's device and of its dtype; where that is one of 16 bits, `wide` ones may be float32.
    """
    first = next(iter(axes))
    like = tensors[first]
    sizes: dict[str, int] = {}
    for name in filter(tensors.__contains__, axes):
        t, names = tensors[name], axes[name]
        if "R+2N" in names:
            sizes["R+2N"] = sizes["R"] + 2 * sizes["N"]
        if t.ndim == len(names):
            sizes = dict(zip(names, t.shape, strict=True)) | sizes
        expected = [sizes.get(axis, axis) for axis in names]
        if list(t.shape) != expected or 0 in expected:
            known = ", ".join(map(str, expected))
            raise ValueError(
                f"{name}: expected shape ({', '.join(names)}) = ({known}), none of them 0, "
                f"got {tuple(t.shape)}; {first} has {tuple(like.shape)}"
            )
        if t.layout != torch.strided or t.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected a dense tensor of 16, 32 or 64 bit floats, got {t.dtype}, {t.layout}"
            )
        if t.device != like.device:
            raise ValueError(f"{name}: expected on {like.device} as {first} is, got {t.device}")
        if t.dtype != like.dtype and not (
            name in wide and like.dtype in HALF and t.dtype == torch.float32
        ):
            raise ValueError(f"{name}: expected {like.dtype} as {first} is, got {t.dtype}")


def check_gradient(grad: Tensor, states: Tensor, y: Tensor, states_shape: Sequence[int]) -> None:
    """Raise a ValueError unless `grad` is as the output y, and `states` what its forward pass keeps."""
    expected = {
        "grad": (grad, tuple(y.shape), y.dtype, y.device),
        "states": (states, tuple(states_shape), compute_dtype(y.dtype), y.device),
    }
    for name, (t, *wanted) in expected.items():
        if (found := [tuple(t.shape), t.dtype, t.device]) != wanted:
            raise ValueError(f"{name}: expected {wanted}, got {found}")
    if not states.is_contiguous():
        raise ValueError(f"states: expected contiguous memory, got strides {states.stride()}")


def unusable(load: Callable[[], object], message: str) -> str:
    """The `message` with the error of `load`, an import; empty where it works."""
    try:
        load()
    except Exception as error:  # a build against another torch or numpy fails in many ways
        return f"{message} ({type(error).__name__}: {error})"
    return ""


def refused_by_cuda(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The reason why the back end `name`, which computes in float32 on CUDA, cannot take such tensors."""
    if device.type != "cuda":
        return f"{name} needs CUDA tensors, got {device.type}"
    return f"{name} computes in float32, got float64 tensors" if dtype == torch.float64 else ""
