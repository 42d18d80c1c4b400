"""The orders in which a scan visits the tokens of a feature map.

Tokens lie in memory in row-major (D, H, W) order; token (s, i), the i-th of slice s, lies at
`s * slice_length + i`. The three orders of tri-oriented Mamba (SegMamba, Xing et al. 2024):

- `forward`: as they lie in memory;
- `reverse`: from the last to the first;
- `inter_slice`: i-major, s-minor - the first token of every slice, then the second of every slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = ("forward", "reverse", "inter_slice")


def token_order(
    order: str, length: int, nslices: int = 1, device: torch.device | None = None
) -> Tensor:
    """The tokens of a sequence in the order in which a scan visits them.

    Args:
        order: one of `ORDERS`.
        length: number of tokens L.
        nslices: number of slices S of the inter-slice order. When S does not divide L, slices have
            `ceil(L / S)` tokens and the last ones fewer or none; what does not exist is skipped.
        device: where the result is made, the default device when None.

    Returns:
        LongTensor (L,): entry t is the place in memory of the token visited at step t.
    """
    check_order(order, nslices)
    tokens = torch.arange(length, device=device)
    if order == "reverse":
        return tokens.flip(0)
    if order == "inter_slice":
        nslices = min(nslices, length)  # with more, too, each token is a slice of its own
        slice_length = -(-length // nslices)
        grid = torch.arange(nslices * slice_length, device=device).view(nslices, slice_length)
        visited = grid.T.flatten()  # (S, I) -> (I * S,)
        # A mask has no shape that fake tensors could know, so it is used only where slices are short.
        return visited if len(visited) == length else visited[visited < length]
    return tokens


def check_order(order: str, nslices: int) -> None:
    """Raise a ValueError unless `order` is known and `nslices` is at least 1."""
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    if nslices < 1:
        raise ValueError(f"nslices: expected at least 1 slice, got {nslices}")
