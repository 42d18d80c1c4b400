"""The selective scan by its definition: one token after the other, in plain torch; and the orders of tokens.

Slow and hungry (autograd keeps every state), but short enough to be believed. Its gradients are
those of torch's autograd, which makes it the yardstick for back ends that write theirs by hand.

Tokens lie in memory in row-major (D, H, W) order; token (s, i), the i-th of slice s, lies at
`s * slice_length + i`. The three orders of tri-oriented Mamba (SegMamba, Xing et al. 2024):

- `forward`: as they lie in memory;
- `reverse`: from the last to the first;
- `inter_slice`: i-major, s-minor - the first token of every slice, then the second of every slice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ORDERS = ("forward", "reverse", "inter_slice")


def check_order(order: str, nslices: int) -> None:
    """Raise a ValueError unless `order` is known and `nslices` is at least 1."""
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    if nslices < 1:
        raise ValueError(f"nslices: expected at least 1 slice, got {nslices}")


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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that decay and state are computed in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    order: str = "forward",
    nslices: int = 1,
) -> Tensor:
    """Selective scan token by token; arguments, shapes, equations and result as in `selective_scan`.

    Here each sequence may have parameters of its own, A (B, D, N), D and delta_bias (B, D).
    """
    dtype = compute_dtype(u.dtype)
    x, dt, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    h = x.new_zeros(*x.shape[:2], A.shape[-1])  # (B, D, N)
    outputs: list[Tensor] = [h] * u.shape[-1]
    steps = [t.unbind(-1) for t in (dt, dt * x, B, C)]
    for t in token_order(order, u.shape[-1], nslices, u.device).tolist():
        step, added, into, out = (of_token[t] for of_token in steps)
        h = torch.exp(step[..., None] * A) * h + added[..., None] * into[:, None]
        outputs[t] = (h * out[:, None]).sum(-1)
    y = torch.stack(outputs, dim=-1)  # (B, D, L)
    if D is not None:
        y = y + D.to(dtype)[..., None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)
