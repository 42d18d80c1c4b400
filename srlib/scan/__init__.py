"""The selective scan of Mamba (Gu and Dao 2023, algorithm 2): one operator, several back ends.

| back end    | runs on             | is                                                    |
|-------------|---------------------|-------------------------------------------------------|
| `reference` | anything            | the definition, token by token, gradients by autograd |
| `chunked`   | anything            | plain torch with bounded memory                       |
| `cpu`       | CPU with numba      | fused kernels with vector instructions, float32       |
| `triton`    | CUDA with triton    | fused kernels in Triton's language                    |
| `mamba_ssm` | CUDA with mamba-ssm | its authors' CUDA kernel                              |

Only `reference`, which is used by name alone, keeps tokens x channels x states for the backward
pass.
"""

from __future__ import annotations

from .definition import ORDERS, token_order
from .mixer import (
    Weights,
    channel_norm,
    doubled,
    gated,
    in_triton,
    mamba_mixer,
    mamba_mixers,
    project,
    rates,
    scan_arguments,
)
from .operator import BackendState, backends, selective_scan

__all__ = [
    "ORDERS", "BackendState", "Weights", "backends", "channel_norm", "doubled", "gated", "in_triton", "mamba_mixer",
    "mamba_mixers", "project", "rates", "scan_arguments", "selective_scan", "token_order",
]  # fmt: skip
