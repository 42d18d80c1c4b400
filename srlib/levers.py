"""What each lever on SegResMamba's memory is worth: pulled one after the other, counted or measured.

All arrangements compute the same function and the same gradients. They start from the straightforward one, in which
ToM is written as in its definition - each order permutes its own copies of x and z, and scans with a gate - and
autograd keeps whatever each layer asks for. Even there the scan is one operator: no tensor of tokens x channels x
states is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, cast
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor, nn

from srlib.baselines import with_checkpoints
from srlib.model import FEATURES, SegResMamba
from srlib.profiling import count
from srlib.recompute import recomputed
from srlib.scan import selective_scan, token_order
from srlib.scan.mixer import scan_arguments, torch_conv
from srlib.tom import TriOrientedMamba
from srlib.workload import Workload

LEVERS = {
    "tom": "ToM: one gate for three orders, inner tensors again",
    "copies": "ToM fused, no permuted or padded copies (CPU, fp32)",
    "norms": "normalisation and activation computed again",
    "loss": "head and loss in slabs",
    "blocks": "each block checkpointed",
}
OURS = ("tom", "copies", "norms")  # how `srlib.model` computes


@dataclass(frozen=True)
class Arrangement(Workload):
    """A training step of the paper's SegResMamba with some levers pulled.

    Attributes:
        levers: names in `LEVERS`. `copies` shows only with `tom`.
    """

    peer: str = "segresmamba"
    levers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.levers) - set(LEVERS):
            raise ValueError(f"levers must be among {', '.join(LEVERS)}, got {sorted(unknown)}")

    def network(self) -> nn.Module:
        """The network with random weights; without its head, where this is left to the loss."""
        network = super().network()
        if "blocks" in self.levers:
            with_checkpoints(network)
        return HeadApart(network) if "loss" in self.levers else network

    def loss(self, network: nn.Module, output: Tensor, label: Tensor) -> Tensor:
        """The loss of what the network gave."""
        if isinstance(network, HeadApart):
            return slab_loss(network.head, output, label)
        return super().loss(network, output, label)

    def setting(self) -> AbstractContextManager:
        """The levers that are not pulled are undone meanwhile."""
        return arranged(self.levers)


@contextmanager
def arranged(levers: Sequence[str]) -> Iterator[None]:
    """A context in which `srlib.model` and `srlib.tom` compute with no other levers than these."""
    undone: dict[str, list[tuple[str, Any]]] = {
        "tom": [("srlib.tom.TriOrientedMamba.forward", tom_by_definition)],
        "copies": [
            (f"srlib.scan.mixer.{name}", lambda *_: False) for name in ("_can_fuse", "in_triton")
        ],
        "norms": [("srlib.model.recomputed", kept)],
    }
    with ExitStack() as stack:
        for lever, replacements in undone.items():
            if lever not in levers:
                for target, replacement in replacements:
                    stack.enter_context(patch(target, replacement))
        yield


def kept(x: Any, *functions: Any) -> Any:
    """As `recomputed`, but autograd keeps what it likes."""
    return reduce(lambda value, function: function(value), functions, x)


def tom_by_definition(self: TriOrientedMamba, tokens: Tensor, depth: int) -> Tensor:
    """ToM(z) = Mamba(z_f) + Mamba(z_r) + Mamba(z_s), each with its gate: tokens (B, L, C) -> (B, L, C)."""
    x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (B, L, E)
    with patch("srlib.tom.mamba_mixer", partial(_gated_mixer, z)):
        mixed = [self._mix(x, order, self.nslices or depth) for order in self.scan_orders]
    return self.out_proj(reduce(torch.add, mixed))


def _gated_mixer(
    z: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: str,
    nslices: int,
) -> Tensor:
    """Mamba's mixer with its gate z (B, L, E), over copies in the order of visit (`mamba_mixer` has the rest)."""
    tokens = token_order(order, x.shape[1], nslices, x.device)
    visited, gate = (t[:, tokens].transpose(1, 2) for t in (x, z))  # (B, L, E) -> (B, E, L)
    u = torch_conv(visited, conv_weight, conv_bias)
    delta, B, C = scan_arguments(u, x_proj, dt_proj, A)
    y = selective_scan(u, delta, A, B, C, D, gate, dt_bias)
    return y.new_empty(x.shape).index_copy(1, tokens, y.transpose(1, 2))


class HeadApart(nn.Module):
    """A SegResMamba that ends before its head: image (B, C_in, D, H, W) -> (B, C_0, D/2, H/2, W/2), rounded up."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.head = cast(nn.Module, network.head)
        network.head = nn.Identity()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """What the head would be given."""
        return self.network(x)


def slab_loss(head: nn.Module, features: Tensor, label: Tensor, planes: int = 8) -> Tensor:
    """Dice and cross-entropy of `head(features)` as `srlib.workload.loss_function`, a slab at a time.

    No map of all classes at full resolution ever exists: Dice and cross-entropy need sums over voxels, and a slab's
    logits are computed again in the backward pass.

    Args:
        head: doubles the resolution, (B, C, d, h, w) -> logits (B, K, 2d, 2h, 2w).
        features: (B, C, ceil(D/2), ceil(H/2), ceil(W/2)).
        label: classes (B, 1, D, H, W), the background is 0.
        planes: of the features in a slab.

    Returns:
        The mean over images and foreground classes of 1 - Dice, plus the voxels' mean cross-entropy.
    """
    slabs = zip(features.split(planes, 2), label.split(2 * planes, 2), strict=True)
    parts = [recomputed(x, partial(_sums, head, y)) for x, y in slabs]
    overlap, predicted, true, entropy = (
        torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)
    )
    dice = (2 * overlap + 1e-5) / (true + predicted + 1e-5)  # (B, K)
    return (1 - dice[:, 1:]).mean() + entropy / label.numel()


def _sums(head: nn.Module, label: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    """A slab's sums of p in the true class, of p, of the truth, each (B, K), and of the cross-entropy."""
    depth, height, width = label.shape[2:]
    # No hooks: the memory tracker takes one call of a module a step.
    logits = head.forward(features)
    log_p = logits[..., :depth, :height, :width].log_softmax(1)  # (B, K, D, H, W)
    classes = torch.arange(log_p.shape[1], device=label.device).view(1, -1, 1, 1, 1)
    p, true = log_p.exp(), label == classes
    entropy = -(log_p * true).sum()
    return *((t.sum((2, 3, 4))) for t in (p * true, p, true)), entropy


def gradients(levers: Sequence[str], size: int = 48) -> dict[str, Tensor]:
    """Loss and gradients of a tiny network with random weights, the same for all levers, by parameters' names."""
    work = Arrangement(size=size, out_channels=4, levers=tuple(levers))
    with torch.random.fork_rng(), work.setting():
        torch.manual_seed(0)
        network: nn.Module = SegResMamba(1, 4, FEATURES["tiny"])
        names = {parameter: name for name, parameter in network.named_parameters()}
        image, label = work.batch("cpu")
        with patch("srlib.workload.build", lambda *_: network):
            network = work.network()
        loss = work.loss(network, network(image), label)
        loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for p, n in names.items() if p.grad is not None}


def deviation(levers: Sequence[str], size: int = 48) -> float:
    """How far a gradient is from the straightforward one's at most, as a part of the largest gradient."""
    expected, found = gradients((), size), gradients(levers, size)
    scale = max(float(g.abs().max()) for g in expected.values())
    return max(float((found[n] - g).abs().max()) for n, g in expected.items()) / scale


def steps(precisions: Sequence[str] = ("fp32", "bf16"), size: int = 128) -> dict[Arrangement, str]:
    """The arrangements of the table, each with one lever more than the one before -> what is new in it."""
    found = {}
    for precision in precisions:
        for k, title in enumerate(["straightforward", *LEVERS.values()]):
            levers = tuple(LEVERS)[:k]
            found[Arrangement(size=size, precision=precision, levers=levers)] = title
    return found


def table(precisions: Sequence[str] = ("fp32", "bf16"), size: int = 128) -> pd.DataFrame:
    """Count the arrangements of `steps`.

    Returns:
        A row each: `precision`, `lever`, in GiB `activations` after the loss and the `peak` of everything, `share` of
        the straightforward fp32 activations, `arithmetic` as a multiple of the straightforward step's.
    """
    rows = []
    for work, title in steps(precisions, size).items():
        totals = count(work).totals
        row: dict[str, Any] = {"precision": work.precision, "lever": title}
        row |= {"activations": totals["kept"] + totals["kept_by_loss"], "peak": totals["peak"]}
        rows.append(row | {"arithmetic": totals["step_gmacs"]})
    found = pd.DataFrame(rows)
    first = found.iloc[0]
    found["arithmetic"] /= first["arithmetic"]
    found.insert(4, "share", found["activations"] / first["activations"])
    return found
