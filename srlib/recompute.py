"""Keeping less for the backward pass: what is cheap is computed again instead (Chen et al., arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(x: Tensor, *functions: Callable[[Tensor], Any]) -> Any:
    """Apply functions one after the other; of them all, only `x` is kept for the backward pass.

    That pass runs them again, up to the last tensor that a gradient needs. Where the last function is a convolution
    or a linear map this is its input, so it does not run twice: a normalisation and an activation in front of it
    cost little, and two maps less are kept. Function and gradients stay the same, bit for bit where the functions
    are deterministic; they must draw no random numbers. When x or a tensor that the functions hold is changed in
    place before that pass, it raises torch's RuntimeError, as they would compute something else.

    Args:
        x: what the first function takes.
        *functions: modules, their methods, plain functions, or `partial`s of these that bind more tensors; the last
            one may return anything, the others one tensor.

    Returns:
        What the last function returns.

    Raises:
        TypeError: a function of another kind, whose tensors cannot be found.
    """
    return checkpoint(
        lambda start, *_: reduce(lambda value, function: function(value), functions, start),
        x,
        *_held(functions),
        use_reentrant=False,
        preserve_rng_state=False,
    )


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
