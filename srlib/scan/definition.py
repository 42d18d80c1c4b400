"""The selective scan by its definition: one token after the other, in plain torch.

Slow and hungry (autograd keeps every state), but short enough to be believed. Its gradients are
those of torch's autograd, which makes it the yardstick for back ends that write theirs by hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .orders import token_order


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
    """Selective scan token by token; arguments, shapes and result as in `selective_scan`.

    Here each sequence may have parameters of its own, A (B, D, N), D and delta_bias (B, D).

    With `dt = softplus(delta + delta_bias)`, per channel d and state n, from h = 0:

        h[t, d, n] = exp(dt[t, d] A[d, n]) h[t-1, d, n] + dt[t, d] B[t, n] u[t, d]
        y[t, d]    = (sum_n C[t, n] h[t, d, n] + D[d] u[t, d]) silu(z[t, d])
    """
    dtype = compute_dtype(u.dtype)
    tokens = token_order(order, u.shape[-1], nslices).to(u.device)
    x, dt, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    h = x.new_zeros(*x.shape[:2], A.shape[-1])  # (B, D, N)
    outputs: list[Tensor] = [h] * len(tokens)
    steps = [t.unbind(-1) for t in (dt, dt * x, B, C)]
    for t in tokens.tolist():
        step, added, into, out = (of_token[t] for of_token in steps)
        h = torch.exp(step[..., None] * A) * h + added[..., None] * into[:, None]
        outputs[t] = (h * out[:, None]).sum(-1)
    y = torch.stack(outputs, dim=-1)  # (B, D, L)
    if D is not None:
        y = y + D.to(dtype)[..., None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)
