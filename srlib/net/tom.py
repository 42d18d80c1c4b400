"""Tri-oriented Mamba (ToM): three selective scans over the tokens of a 3D feature map.

The layer is the one of SegMamba (Xing et al., MICCAI 2024), which SegResMamba adopts (Das et al., MIDL 2025,
section 2): the feature map is flattened to a sequence, scanned in three orders, and the results are summed,

    ToM(z) = Mamba(z_f) + Mamba(z_r) + Mamba(z_s).

| paper | shape | here |
|---|---|---|
| tokens z | (B, L, C), L = D*H*W in row-major order | `tokens` |
| inner width E | expand * C | `d_inner` |
| state size N | 16 | `d_state` |
| width of the causal convolution | 4 | `d_conv` |
| rank of the step size | ceil(C / 16) | `dt_rank` |
| number of slices S | the depth of the feature map | `nslices` |
| z_f, z_r, z_s | the tokens in three orders | `"forward"`, `"reverse"`, `"inter_slice"` |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srlib.scan import ORDERS, Weights, channel_norm, gated, in_triton, mamba_mixers, project, rates
from srlib.scan.recompute import Recompute, recomputed

# Suffix of each order's own parameters in the published layout.
SUFFIXES = {"forward": "", "reverse": "_b", "inter_slice": "_s"}
FORGET = -1e30  # exp(delta * FORGET) is 0 for every step size, so nothing of the state is kept


class TriOrientedMamba(nn.Module):
    """Three Mamba mixers with shared input and output projections, in the published parameter layout.

    Each order has its own causal convolution, `x_proj`, `dt_proj`, `A_log` and `D`; the names end in `_b` for
    the reverse and `_s` for the inter-slice order. There is no LayerNorm and no residual in it.

    Args:
        d_model: channels C of the tokens.
        d_state: state size N of each channel.
        d_conv: width of the causal depthwise convolution.
        expand: inner width as a multiple of `d_model`.
        nslices: fixes the number of slices; `None` takes the depth of each feature map.
        scan_orders: the orders that run, a non-empty subset of forward, reverse and inter_slice.
        recurrence: False forgets the state at each token: a control with ToM's arithmetic and all of its
            parameters but A, for which nothing is left to do. What remains mixes `d_conv` neighbours.
        recompute, fused: how it is computed (`mamba_mixer`); the function is the same.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        nslices: int | None = None,
        scan_orders: Sequence[str] = ORDERS,
        recurrence: bool = True,
        recompute: Recompute = "auto",
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        if not scan_orders or len({*scan_orders} & {*ORDERS}) != len(scan_orders):
            raise ValueError(
                f"scan_orders must be a non-empty subset of {ORDERS}, got {tuple(scan_orders)}"
            )
        self.scan_orders, self.nslices = tuple(scan_orders), nslices
        self.recurrence, self.recompute, self.fused = recurrence, recompute, fused
        self.d_state, self.d_inner = d_state, expand * d_model
        self.dt_rank = math.ceil(d_model / 16)

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        for order in self.scan_orders:
            self._add_order(SUFFIXES[order], d_conv)

    def _add_order(self, suffix: str, d_conv: int) -> None:
        """Add one order's parameters, initialised as in Mamba (Gu and Dao 2023, section 3.6)."""
        width, rank = self.d_inner, self.dt_rank
        conv1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1)
        x_proj = nn.Linear(width, rank + 2 * self.d_state, bias=False)
        dt_proj = nn.Linear(rank, width)
        nn.init.uniform_(dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():  # softplus(bias) is log-uniform in [1e-3, 1e-1]
            step = torch.exp(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
            dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.add_module(f"conv1d{suffix}", conv1d)
        self.add_module(f"x_proj{suffix}", x_proj)
        self.add_module(f"dt_proj{suffix}", dt_proj)
        if self.recurrence:
            rates = torch.arange(1, self.d_state + 1, dtype=torch.float32).repeat(width, 1)
            A_log = nn.Parameter(torch.log(rates))
            A_log._no_weight_decay = True  # type: ignore[attr-defined]  # mamba-ssm's mark
            self.register_parameter(f"A{suffix}_log", A_log)
        self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(width)))

    def forward(self, tokens: Tensor, depth: int) -> Tensor:
        """Mix tokens (B, L, C) of a feature map with `depth` slices; returns (B, L, C)."""
        nslices = self.nslices or depth
        if self.fused is not False and in_triton(tokens):
            # One product for both is faster than computing z again is small.
            x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (B, L, 2 E) -> two of (B, L, E)
            gate = partial(self._gate, z)
        else:
            into_x, into_z = self.in_proj.weight.chunk(2)  # (2 E, C) -> two of (E, C)
            x = F.linear(tokens, into_x)  # (B, L, C) -> (B, L, E)
            gate = partial(self._gate_again, tokens, into_z)
        y = mamba_mixers(x, self.weights(), self.scan_orders, nslices, self.recompute, self.fused)
        # The gate acts token by token, so the three orders share it: it is applied once, to their sum.
        # It is cheaper to compute again in the backward pass than to keep.
        return recomputed(y, gate, recompute=self.recompute)

    def weights(self) -> list[Weights]:
        """Weights of each order's mixer; its A (E, N) is negative, the rate at which the state is forgotten."""
        get, suffixes = self.get_parameter, [SUFFIXES[order] for order in self.scan_orders]
        if self.recurrence:
            As = rates([get(f"A{s}_log") for s in suffixes], self.fused).unbind()
        else:
            D = get(f"D{suffixes[0]}")
            As = (D.new_full((self.d_inner, self.d_state), FORGET),) * len(suffixes)
        return [
            Weights(
                conv_weight=get(f"conv1d{s}.weight").squeeze(1),  # (E, 1, taps) -> (E, taps)
                conv_bias=get(f"conv1d{s}.bias"),
                x_proj=get(f"x_proj{s}.weight"),
                dt_proj=get(f"dt_proj{s}.weight"),
                dt_bias=get(f"dt_proj{s}.bias"),
                A=A,
                D=get(f"D{s}"),
            )
            for s, A in zip(suffixes, As, strict=True)
        ]

    def _gate(self, z: Tensor, y: Tensor) -> Tensor:
        return project(gated(y, z), self.out_proj).transpose(1, 2)  # (B, L, E) -> (B, L, C)

    def _gate_again(self, tokens: Tensor, into_z: Tensor, y: Tensor) -> Tensor:
        return self._gate(F.linear(tokens, into_z), y)


class ToMLayer(nn.Module):
    """LayerNorm on tokens, then `TriOrientedMamba`, from feature map to feature map.

    The paper's equation and figure 1 show no residual around the layer; SegMamba's layer adds its input.

    Args:
        channels: channels of the feature map.
        residual: add the input to the output, as SegMamba does.
        **mamba: passed on to `TriOrientedMamba`.
    """

    def __init__(self, channels: int, residual: bool = False, **mamba: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mamba = TriOrientedMamba(channels, **mamba)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, D, H, W) -> (B, C, D, H, W)."""
        tokens = channel_norm(x, self.norm)  # (B, C, D, H, W) -> (B, L, C)
        mixed = self.mamba(tokens, depth=x.shape[2])
        out = mixed.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, L, C) -> (B, C, D, H, W)
        return x + out if self.residual else out
