"""The training step that is counted and measured: which network, on what, with which loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
    """

    peer: str
    size: int = 128
    in_channels: int = 1
    out_channels: int = 14
    precision: str = "fp32"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")

    def network(self) -> nn.Module:
        """The network with random weights."""
        network = build(self.peer, self.in_channels, self.out_channels, self.size)
        return with_checkpoints(network) if self.checkpointing else network

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """A random image (1, C_in, D, H, W) and label (1, 1, D, H, W)."""
        cube = (self.size,) * 3
        image = torch.randn(1, self.in_channels, *cube, device=device)
        return image, torch.randint(self.out_channels, (1, 1, *cube), device=device)

    def loss(self, network: nn.Module, output: Tensor, label: Tensor) -> Tensor:
        """The loss of what the network gave."""
        return loss_function(output, label)

    def setting(self) -> AbstractContextManager:
        """What has to be in place while the network is built and trained: nothing."""
        return nullcontext()

    def autocast(self, device: str) -> AbstractContextManager:
        """The context of forward pass and loss."""
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")
