"""The selective scan of Mamba (Gu and Dao 2023, algorithm 2): one operator, several back ends.

| back end    | runs on             | is                                                    |
|-------------|---------------------|-------------------------------------------------------|
| `reference` | anything            | the definition, token by token, gradients by autograd |
| `chunked`   | anything            | plain torch with bounded memory                       |
| `mamba_ssm` | CUDA with mamba-ssm | its authors' CUDA kernel                              |

Only `reference`, which is used by name alone, keeps tokens x channels x states for the backward
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operator
from .choice import BackendState, backends
from .inputs import Options, ScanInputs
from .orders import ORDERS, token_order
from .reference import reference

__all__ = ["ORDERS", "BackendState", "backends", "selective_scan", "token_order"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    backend: str = "auto",
    *,
    order: str = "forward",
    nslices: int = 1,
) -> Tensor:
    """Selective scan of batch B, channels D, tokens L, states N, with shapes as in mamba-ssm.

    With `dt = softplus(delta + delta_bias)`, per channel d and state n, from h = 0:

        h[t, d, n] = exp(dt[t, d] A[d, n]) h[t-1, d, n] + dt[t, d] B[t, n] u[t, d]
        y[t, d]    = (sum_n C[t, n] h[t, d, n] + D[d] u[t, d]) silu(z[t, d])

    float32 and float64 are computed as they are, float16 and bfloat16 in float32. Tensors may be
    strided; transposed views of (B, L, D) memory are the fast layout on the CPU. Under autocast,
    sequences of different types are raised to the widest of them. Only `reference` can be
    differentiated twice.

    Args:
        u: input (B, D, L), real floating point.
        delta: step sizes (B, D, L), before the bias and softplus.
        A: decay rates (D, N), negative for a stable scan.
        B: input weights (B, N, L).
        C: output weights (B, N, L).
        D: weight (D,) of a direct path from input to output; none when None.
        z: gate (B, D, L); none when None.
        delta_bias: added to delta (D,) before softplus; none when None.
        delta_softplus: pass the step sizes through softplus.
        backend: `auto` for the fastest that can run here, or a name of `backends()`.
        order: in which the tokens are visited: `forward`, `reverse` or `inter_slice` (see
            `token_order`).
        nslices: number of slices of the inter-slice order.

    Returns:
        y (B, D, L) of u's dtype and memory layout.

    Raises:
        ValueError: shapes, dtypes or devices do not fit (the message names the argument), an
            unknown back end or order, or a back end that cannot take such tensors.
        RuntimeError: a back end that cannot run on this machine, with the reason.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    if torch.is_autocast_enabled(u.device.type):
        inputs = inputs.widened()
    options = Options(delta_softplus, order, nslices)
    inputs.check()
    options.check()
    if backend == "reference":
        return reference(*inputs, *options)
    keep_states = torch.is_grad_enabled() and any(t.requires_grad for t in inputs.given().values())
    return operator.selective_scan(*inputs, *options, backend, keep_states)[0]
