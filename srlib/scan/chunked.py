"""The selective scan in plain torch, chunk by chunk: runs on any device, with bounded memory.

Tokens are worked off in chunks short enough that a chunk's states (batch x channels x tokens x
states) fit in a fixed budget. The forward pass keeps the state at each chunk's start; the backward
pass walks the chunks from the end, computes a chunk's states again and runs the adjoint recurrence
over them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .definition import compute_dtype, token_order
from .inputs import Gradients, Options, ScanInputs

# Elements of one work array; a backward pass holds about five. A GPU needs long chunks to be busy.
CHUNK_ELEMENTS = {"cpu": 2**20}
CHUNK_ELEMENTS_ELSEWHERE = 2**24


def unavailable() -> str:
    """No reason why this back end cannot run here: plain torch always can."""
    return ""


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """No reason why this back end cannot take such tensors: it takes any."""
    return ""


def _chunk_length(u: Tensor, A: Tensor) -> int:
    """Tokens in a chunk, for `u` (B, D, L) and `A` (D, N)."""
    budget = CHUNK_ELEMENTS.get(u.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    return max(1, min(u.shape[2], budget // (u.shape[0] * A.numel())))


def states_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of what the forward pass keeps, the states before each chunk (chunks, B, D, N)."""
    return -(-u.shape[2] // _chunk_length(u, A)), u.shape[0], *A.shape


def recurrence_(decay: Tensor, x: Tensor) -> Tensor:
    """`x[t] += decay[t] * x[t - 1]` for t = 1, 2, ... in place; `decay` is overwritten too.

    Both are (T, ...). In two levels, so that T tokens take about 2 sqrt(T) steps: all groups of
    sqrt(T) tokens at once, token by token, while `decay` becomes its running product within a
    group; then group by group.
    """
    length = x.shape[0]
    group = math.isqrt(length - 1) + 1 if length > 1 else 1
    whole = length - length % group
    a, h = (t[:whole].unflatten(0, (-1, group)) for t in (decay, x))  # (groups, tokens, ...)
    for t in range(1, group):
        h[:, t].addcmul_(a[:, t], h[:, t - 1])
        a[:, t] *= a[:, t - 1]
    for g in range(1, whole // group):
        h[g].addcmul_(a[g], h[g - 1, -1])
    for t in range(whole, length):
        x[t].addcmul_(decay[t], x[t - 1])
    return x


class _Chunk:
    """One chunk as both passes need it, tokens first: (T, B, D) and (T, B, D, N)."""

    def __init__(self, inputs: ScanInputs, options: Options, tokens: Tensor) -> None:
        dtype = compute_dtype(inputs.u.dtype)

        def take(t: Tensor) -> Tensor:  # (B, ., L) -> (T, B, .)
            return t.index_select(2, tokens).permute(2, 0, 1).to(dtype)

        self.u, raw, self.B, self.C = map(take, (inputs.u, inputs.delta, inputs.B, inputs.C))
        self.z = None if inputs.z is None else take(inputs.z)
        self.A = inputs.A.to(dtype)
        if inputs.delta_bias is not None:
            raw = raw + inputs.delta_bias.to(dtype)
        self.raw = raw
        self.dt = F.softplus(raw) if options.delta_softplus else raw

    def decay(self) -> Tensor:
        return torch.exp(self.dt[..., None] * self.A)

    def states(self, decay: Tensor, start: Tensor) -> Tensor:
        """States after each token (T, B, D, N) from the `start` (B, D, N); spoils `decay`."""
        x = (self.dt * self.u)[..., None] * self.B[:, :, None]
        x[0].addcmul_(decay[0], start)
        return recurrence_(decay, x)

    def scan_output(self, h: Tensor, D: Tensor | None) -> Tensor:
        """The output before the gate (T, B, D)."""
        y = torch.einsum("tbdn,tbn->tbd", h, self.C)
        return y if D is None else y + D.to(y.dtype) * self.u


def _chunks(inputs: ScanInputs, options: Options) -> tuple[Tensor, ...]:
    length = inputs.u.shape[-1]
    tokens = token_order(options.order, length, options.nslices).to(inputs.u.device)
    return tokens.split(_chunk_length(inputs.u, inputs.A))


def forward(inputs: ScanInputs, options: Options, states: Tensor) -> Tensor:
    """The scan's output (B, D, L); fills `states` unless it is empty."""
    y = torch.empty_like(inputs.u)
    batch, channels, _ = y.shape
    h = y.new_zeros(batch, channels, inputs.A.shape[1], dtype=compute_dtype(y.dtype))
    for k, tokens in enumerate(_chunks(inputs, options)):
        if states.numel():
            states[k] = h
        chunk = _Chunk(inputs, options, tokens)
        hs = chunk.states(chunk.decay(), h)
        out = chunk.scan_output(hs, inputs.D)
        if chunk.z is not None:
            out = out * F.silu(chunk.z)
        y.index_copy_(2, tokens, out.permute(1, 2, 0).to(y.dtype))
        h = hs[-1].clone()
    return y


def backward(inputs: ScanInputs, options: Options, states: Tensor, grad: Tensor) -> Gradients:
    """Gradients of all inputs, from `grad` (B, D, L) and the states of the forward pass.

    With g = grad silu(z), h the states and q[t] the gradient of the loss by h[t]:

        q[t] = g[t] C[t] + decay[t+1] q[t+1]
        dB[t] = sum_d q dt u,   dC[t] = sum_d g h,   d(dt) = sum_n q (B u + A decay[t] h[t-1])
    """
    dtype = compute_dtype(inputs.u.dtype)
    sums = {name: torch.zeros_like(t, dtype=dtype) for name, t in inputs.parameters().items()}
    out = {name: torch.empty_like(t) for name, t in inputs.sequences().items()}
    carry = torch.zeros_like(states[0])  # decay[t+1] q[t+1], (B, D, N)
    for k, tokens in reversed(list(enumerate(_chunks(inputs, options)))):
        chunk = _Chunk(inputs, options, tokens)
        decay = chunk.decay()
        h = chunk.states(decay.clone(), states[k])
        g = grad.index_select(2, tokens).permute(2, 0, 1).to(dtype)  # (T, B, D)
        token_grads: dict[str, Tensor] = {}
        if chunk.z is not None:
            s = torch.sigmoid(chunk.z)
            ungated = chunk.scan_output(h, inputs.D)
            token_grads["z"] = g * ungated * s * (1 + chunk.z * (1 - s))
            g = g * chunk.z * s

        q = g[..., None] * chunk.C[:, :, None]
        q[-1] += carry
        backwards = decay.flip(0).roll(1, 0)  # step r visits token T-1-r, with decay[T-r]
        q = recurrence_(backwards, q.flip(0)).flip(0)
        carry = decay[0] * q[0]

        token_grads["C"] = torch.einsum("tbd,tbdn->tbn", g, h)
        token_grads["B"] = torch.einsum("tbdn,tbd->tbn", q, chunk.dt * chunk.u)
        through_input = torch.einsum("tbdn,tbn->tbd", q, chunk.B)
        previous = torch.cat([states[k : k + 1], h[:-1]])
        by_exponent = decay.mul_(q).mul_(previous)  # gradient by dt A, (T, B, D, N)
        by_dt = torch.einsum("tbdn,dn->tbd", by_exponent, chunk.A) + through_input * chunk.u
        sums["A"] += torch.einsum("tbdn,tbd->dn", by_exponent, chunk.dt)
        if options.delta_softplus:
            by_dt = by_dt * torch.sigmoid(chunk.raw)
        token_grads["delta"] = by_dt
        token_grads["u"] = chunk.dt * through_input
        if inputs.D is not None:
            token_grads["u"] += inputs.D.to(dtype) * g
            sums["D"] += (g * chunk.u).sum((0, 1))
        if inputs.delta_bias is not None:
            sums["delta_bias"] += by_dt.sum((0, 1))
        for name, value in token_grads.items():
            out[name].index_copy_(2, tokens, value.permute(1, 2, 0).to(out[name].dtype))
    return {**out, **{name: total.to(getattr(inputs, name).dtype) for name, total in sums.items()}}
