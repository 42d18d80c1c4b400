"""Keeping less for the backward pass: what is cheap is computed again instead (Chen et al., arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Recompute = Literal[True, False, "auto"]
MAPS = 200  # tensors of one size that a device holds when its memory is plentiful


def check_recompute(recompute: object) -> None:
    """Raise ValueError for anything but True, False and "auto"."""
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be True, False or 'auto', got {recompute!r}")


def recomputed(
    x: Tensor, *functions: Callable[[Tensor], Any], recompute: Recompute = "auto"
) -> Any:
    """Apply functions one after the other; of them all, only `x` is kept for the backward pass.

    That pass runs them again, up to the last tensor that a gradient needs. Where the last function is a convolution
    or a linear map this is its input, so it does not run twice: a normalisation and an activation in front of it
    cost little, and two maps less are kept. Function and gradients stay the same, bit for bit where the functions
    are deterministic; they must draw no random numbers. When x or a tensor that the functions hold is changed in
    place before that pass, it raises torch's RuntimeError, as they would compute something else.

    Args:
        x: input of the first function.
        *functions: modules, their methods, plain functions, or `partial`s of these that bind more tensors; the last
            one may return anything, the others one tensor.
        recompute: False keeps all that autograd keeps. "auto" does so where `x` lies on a CUDA device that has room
            for 200 tensors of its size: SegResMamba keeps the bytes of about 100 of its largest maps then.

    Returns:
        The result of the last function.

    Raises:
        TypeError: a function of another kind, whose tensors cannot be found.
    """

    def compute(start: Tensor, *_: Tensor) -> Any:
        return reduce(lambda value, function: function(value), functions, start)

    held = [*_held(functions)]
    if _fits(x) if recompute == "auto" else not recompute:
        return compute(x)
    if (
        not torch.is_grad_enabled()
    ):  # nothing is kept; checkpoint would import torch's compiler, which takes a second
        return compute(x)
    return checkpoint(compute, x, *held, use_reentrant=False, preserve_rng_state=False)


def _fits(x: Tensor) -> bool:
    """Tell by the tensor alone, so that a block that is itself computed again decides in the same way."""
    if not x.is_cuda:
        return False
    return x.nbytes * MAPS < torch.cuda.get_device_properties(x.device).total_memory


def _held(part: Any) -> Iterator[Tensor]:
    """The tensors in a function or its bound arguments."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, nn.Module):
        yield from part.parameters()
        yield from part.buffers()
    elif isinstance(part, partial):
        yield from _held((part.func, *part.args, *part.keywords.values()))
    elif isinstance(part, (tuple, list)):
        for one in part:
            yield from _held(one)
    elif isinstance(owner := getattr(part, "__self__", None), nn.Module):
        yield from _held(owner)
    elif getattr(part, "__closure__", None):
        raise TypeError(f"expected modules, methods of theirs or plain functions, got {part!r}")
