"""The block of SegMamba (Xing et al., MICCAI 2024), for its network in `srlib.baselines` and for an ablation."""

from __future__ import annotations

from functools import partial
from typing import Any

from monai.networks.blocks.convolutions import Convolution
from torch import Tensor, nn

from srlib.tom import ToMLayer


class GSC(nn.Module):
    """SegMamba's gated spatial convolution: two 3x3x3 units beside one 1x1x1, summed, mixed, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        unit = partial(
            Convolution, 3, channels, channels, norm="INSTANCE", act="RELU", adn_ordering="NA"
        )
        self.wide = nn.Sequential(unit(kernel_size=3), unit(kernel_size=3))
        self.narrow = unit(kernel_size=1)
        self.mix = unit(kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, d, h, w) -> (B, C, d, h, w)."""
        return x + self.mix(self.wide(x) + self.narrow(x))


class SegMambaBlock(nn.Sequential):
    """Gated spatial convolution, then ToM layers that add their input: (B, C, d, h, w) -> (B, C, d, h, w).

    Args:
        channels: C.
        layers: ToM layers, one after the other.
        **layer: passed on to `ToMLayer`.
    """

    def __init__(self, channels: int, layers: int = 2, **layer: Any) -> None:
        tom = (ToMLayer(channels, residual=True, **layer) for _ in range(layers))
        super().__init__(GSC(channels), *tom)
