"""The selective scan by mamba-ssm's CUDA kernel, where the package `mamba_ssm` is installed.

The kernel knows no scan orders, so sequences are permuted here and the results permuted back; and
it keeps states in a layout of its own, so the backward pass runs the forward kernel again instead
of storing them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from .definition import token_order
from .inputs import Gradients, Options, ScanInputs, refused_by_cuda, unusable


def _kernel() -> ModuleType:
    return importlib.import_module("selective_scan_cuda")  # mamba_ssm's compiled extension


def unavailable() -> str:
    """The reason why this back end cannot run here: no CUDA device, or the kernel cannot be imported."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return unusable(_kernel, "mamba_ssm's CUDA kernel cannot be imported")


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """The reason why this back end cannot take such tensors."""
    return refused_by_cuda("mamba_ssm", device, dtype)


def states_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of what the forward pass keeps: nothing."""
    return (0,)


def _arguments(inputs: ScanInputs, options: Options) -> tuple[list[Tensor | None], Tensor]:
    """The kernel's arguments (float32 parameters, contiguous tokens, groups of B, C); the order."""
    tokens = token_order(options.order, inputs.u.shape[-1], options.nslices).to(inputs.u.device)

    def ready(name: str, t: Tensor | None) -> Tensor | None:
        if t is None or name in ("A", "D", "delta_bias"):
            return None if t is None else t.float().contiguous()
        t = t.contiguous() if options.order == "forward" else t.index_select(2, tokens)
        return t[:, None] if name in ("B", "C") else t

    return [ready(name, t) for name, t in inputs._asdict().items()], tokens


def _restore(t: Tensor, options: Options, tokens: Tensor, like: Tensor) -> Tensor:
    """`t` in the order, dtype and memory layout of `like`."""
    result = torch.empty_like(like)
    return result.copy_(t) if options.order == "forward" else result.index_copy_(2, tokens, t)


def forward(inputs: ScanInputs, options: Options, states: Tensor) -> Tensor:
    """The scan's output (B, D, L)."""
    arguments, tokens = _arguments(inputs, options)
    out, _, *gated = _kernel().fwd(*arguments, options.delta_softplus)
    return _restore(gated[0] if gated else out, options, tokens, inputs.u)


def backward(inputs: ScanInputs, options: Options, states: Tensor, grad: Tensor) -> Gradients:
    """Gradients of all inputs from `grad` (B, D, L)."""
    arguments, tokens = _arguments(inputs, options)
    out, kernel_states, *_ = _kernel().fwd(*arguments, options.delta_softplus)
    grad = grad.contiguous() if options.order == "forward" else grad.index_select(2, tokens)
    ungated = None if inputs.z is None else out
    u, delta, A, B, C, D, delta_bias, *z = _kernel().bwd(
        *arguments, grad, kernel_states, ungated, None, options.delta_softplus, False
    )
    B, C = B.squeeze(1), C.squeeze(1)
    sequences = {"u": u, "delta": delta, "B": B, "C": C, **({"z": z[0]} if z else {})}
    sums = {"A": A, "D": D, "delta_bias": delta_bias}
    return {
        name: sums[name].to(t.dtype)
        if name in sums
        else _restore(sequences[name], options, tokens, t)
        for name, t in inputs.given().items()
    }
