"""Keeping less for the backward pass: what is cheap is computed again instead (Chen et al., arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(x: Tensor, *functions: Callable[[Tensor], Any]) -> Any:
    """Apply functions one after the other; of them all, only `x` is kept for the backward pass.

    That pass runs them again, up to the last tensor that a gradient needs. Where the last function is a convolution
    or a linear map this is its input, so it does not run twice: a normalisation and an activation in front of it
    cost little, and two maps less are kept. Function and gradients stay the same, bit for bit where the functions
    are deterministic; they must draw no random numbers.

    Args:
        x: what the first function takes.
        *functions: the last one may return anything, the others one tensor.

    Returns:
        What the last function returns.
    """
    return checkpoint(
        lambda start: reduce(lambda value, function: function(value), functions, start),
        x,
        use_reentrant=False,
        preserve_rng_state=False,
    )
