"""The training step that is counted and measured."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from srlib.baselines import build, with_checkpoints

loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)


@dataclass(frozen=True)
class Workload:
    """A training step with one image: forward, loss (Dice and cross-entropy), backward, Adam.

    Attributes:
        peer: name in `srlib.baselines.PEERS`.
        size: voxels along each edge of the image.
        in_channels, out_channels: modalities and classes; the defaults are BTCV's.
        precision: `fp32`, or `bf16` under autocast.
        checkpointing: keep only the inputs of the network's blocks and compute the rest again.
        settings: (name, value) of arguments that replace single ones of the peer's network.
    """

    peer: str
    size: int = 128
    in_channels: int = 1
    out_channels: int = 14
    precision: str = "fp32"
    checkpointing: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")

    def network(self) -> nn.Module:
        """Make the network with random weights."""
        channels = self.in_channels, self.out_channels
        network = build(self.peer, *channels, self.size, **dict(self.settings))
        return with_checkpoints(network) if self.checkpointing else network

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """Draw a random image (1, C_in, D, H, W) and label (1, 1, D, H, W)."""
        cube = (self.size,) * 3
        image = torch.randn(1, self.in_channels, *cube, device=device)
        return image, torch.randint(self.out_channels, (1, 1, *cube), device=device)

    def autocast(self, device: str) -> AbstractContextManager:
        """Make the context of forward pass and loss."""
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")


# Levers on SegResMamba's memory by title, each beside those before it: arguments of `Workload`.
LEVERS: dict[str, dict[str, Any]] = {
    "straightforward": {"settings": (("recompute", False), ("fused", False))},
    "mixers fused (CPU, fp32)": {"settings": (("recompute", False),)},
    "cheap steps computed again": {},
    "each block checkpointed": {"checkpointing": True},
}
