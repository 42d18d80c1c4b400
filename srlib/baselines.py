"""The systems of the paper's tables by name, from libraries, in the sizes that its table 7 prints.

Parameters that receive a gradient, for 1 channel in, 14 classes and 128^3 voxels, as table 7 has them:

| name | from | here | table 7 |
|---|---|---|---|
| `unetr` | MONAI's UNETR, its defaults | 93.01 M | 93.01 M |
| `swin_unetr` | MONAI's SwinUNETR, feature size 48 | 62.19 M | 62.19 M |
| `unet` | MONAI's UNet, 16 to 256 channels, two residual units | 4.82 M | 4.89 M |
| `nnunet` | MONAI's DynUNet, 32 to 320 channels | 31.19 M | 31.19 M |
| `segmamba` | `SegMamba` below, on `srlib.tom` | 67.36 M | 67.36 M |
| `segresmamba` | `srlib.model`, the paper's text | 68.26 M | 119.98 M |
| `segresmamba_released` | `srlib.model`, what the authors' code runs | 70.43 M | 119.98 M |
| `segresnet` | MONAI's SegResNet, 32 channels, where the decoder comes from | 18.80 M | - |
| `nnunet_resenc` | dynamic-network-architectures: nnU-Net's residual encoder, preset L | 102.35 M | - |

The last two are not in the paper. nnFormer and 3D UX-Net are, and stand here by their published numbers only:
no library holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from monai.networks.blocks import TransformerBlock, UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.blocks.convolutions import ResidualUnit
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetUpBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.blocks.unetr_block import UnetrPrUpBlock
from monai.networks.nets import UNETR, DynUNet, SegResNet, SwinUNETR, UNet
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srlib.model import CMMB, FEATURES, Downsample, SegResMamba, Skip, UpStage
from srlib.segmamba import GSC, SegMambaBlock
from srlib.tom import ToMLayer


class SegMamba(nn.Module):
    """SegMamba (Xing et al., MICCAI 2024): Mamba in the encoder, UNETR's residual blocks in skips and decoder.

    Its ToM layers add their input and have as many slices as the feature map is deep: 64, 32, 16 and 8 for 128
    voxels, the numbers that its authors fix.

    Args:
        in_channels: modalities of the image.
        out_channels: classes of the logits, background included.
        features: channels of the four stages.
        hidden: channels of the deepest skip.
        layers: ToM layers in a stage.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = FEATURES["paper"],
        hidden: int = 768,
        layers: int = 2,
    ) -> None:
        super().__init__()
        stem = nn.Conv3d(in_channels, features[0], kernel_size=7, stride=2, padding=3)
        halve = [
            nn.Sequential(nn.InstanceNorm3d(c), nn.Conv3d(c, d, kernel_size=2, stride=2))
            for c, d in pairwise(features)
        ]
        self.downsamples = nn.ModuleList([stem, *halve])
        self.stages = nn.ModuleList(SegMambaBlock(c, layers) for c in features)
        self.mlps = nn.ModuleList(Skip(c) for c in features)
        block: dict[str, Any] = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
        widths = [in_channels, *features, hidden]
        self.skips = nn.ModuleList(
            UnetrBasicBlock(3, c, d, stride=1, **block) for c, d in pairwise(widths)
        )
        self.ups = nn.ModuleList(
            UnetrUpBlock(3, d, c, upsample_kernel_size=2, **block)
            for c, d in reversed(list(pairwise(widths[1:])))
        )
        self.last = UnetrBasicBlock(3, features[0], features[0], stride=1, **block)
        self.head = UnetOutBlock(3, features[0], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C_in, D, H, W) -> logits (B, C_out, D, H, W); 16 divides D, H and W."""
        maps = [x]  # the image, then the four stages' maps at 1/2 to 1/16 of the resolution
        for downsample, stage, mlp in zip(self.downsamples, self.stages, self.mlps, strict=True):
            x = stage(downsample(x))
            maps.append(mlp(x))
        *skips, x = (skip(m) for skip, m in zip(self.skips, maps, strict=True))
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return self.head(self.last(x))


class Padded(nn.Module):
    """A network for any size: the image is padded at its far ends to a multiple, the logits are cropped.

    Args:
        network: maps (B, C, D, H, W) to (B, C_out, D, H, W) where `divisor` divides D, H and W.
        divisor: of the sizes that it takes.
    """

    def __init__(self, network: nn.Module, divisor: int) -> None:
        super().__init__()
        self.network, self.divisor = network, divisor

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, D, H, W) -> logits (B, C_out, D, H, W)."""
        depth, height, width = x.shape[2:]
        padding = [
            -n % self.divisor for n in (width, height, depth)
        ]  # F.pad starts at the last axis
        if any(padding):
            x = F.pad(x, [p for n in padding for p in (0, n)])
        return self.network(x)[..., :depth, :height, :width]


Maker = Callable[[int, int, tuple[int, ...]], nn.Module]


@dataclass(frozen=True)
class Peer:
    """A system of the comparison.

    Attributes:
        title: its name in the paper's tables.
        make: (channels in, classes, size (D, H, W)) -> network.
        divisor: of the sizes that the network takes; others are padded (`Padded`).
        parameters: those that receive a gradient, for 1 channel in, 14 classes, 128^3.
    """

    title: str
    make: Maker
    divisor: int
    parameters: int


def _any_size(network: Callable[..., nn.Module], **settings: Any) -> Maker:
    """What makes networks of these settings, whatever the size of the images."""
    return lambda in_channels, out_channels, _size: network(
        in_channels=in_channels, out_channels=out_channels, **settings
    )


def _nnunet_resenc(in_channels: int, out_channels: int, _size: Sequence[int]) -> nn.Module:
    try:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    except ImportError as error:
        raise ImportError(
            "the peer 'nnunet_resenc' needs a package: pip install --no-deps dynamic-network-architectures"
        ) from error
    return ResidualEncoderUNet(
        in_channels,
        n_stages=6,
        features_per_stage=(32, 64, 128, 256, 320, 320),
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=(1, 2, 2, 2, 2, 2),
        n_blocks_per_stage=(1, 3, 4, 6, 6, 6),
        num_classes=out_channels,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def _unet(*widths: int) -> Maker:
    return _any_size(UNet, spatial_dims=3, channels=widths, strides=(2, 2, 2, 2), num_res_units=2)


def _nnunet(strides: Sequence[int], *widths: int) -> Maker:
    """Kernels of 3 voxels, a stride and a width for each stage."""
    stages: dict[str, Any] = {"kernel_size": [3] * len(strides), "strides": strides}
    stages |= {"upsample_kernel_size": strides[1:], "filters": widths}
    return _any_size(DynUNet, spatial_dims=3, **stages)


def _segresnet(width: int, **norm: Any) -> Maker:
    blocks: dict[str, Any] = {"blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1)}
    return _any_size(SegResNet, spatial_dims=3, init_filters=width, **blocks, **norm)


_full_nnunet = _nnunet([1, 2, 2, 2, 2, 2], 32, 64, 128, 256, 320, 320)
_released = _any_size(SegResMamba, variant="released")
PEERS: dict[str, Peer] = {
    "unetr": Peer("UNETR", UNETR, 16, 93_011_374),
    "swin_unetr": Peer("SwinUNETR", _any_size(SwinUNETR, feature_size=48), 32, 62_187_296),
    "unet": Peer("UNET", _unet(16, 32, 64, 128, 256), 16, 4_822_057),
    "nnunet": Peer("nnUNet", _full_nnunet, 32, 31_189_806),
    "segmamba": Peer("SegMamba", _any_size(SegMamba), 16, 67_363_262),
    "segresmamba": Peer("SegResMamba", _any_size(SegResMamba), 1, 68_259_950),
    "segresmamba_released": Peer("SegResMamba, released", _released, 1, 70_426_430),
    "segresnet": Peer("SegResNet", _segresnet(32), 8, 18_796_398),
    "nnunet_resenc": Peer("nnU-Net ResEnc L", _nnunet_resenc, 32, 102_348_622),
}


def _small_unetr(in_channels: int, out_channels: int, size: Sequence[int]) -> nn.Module:
    width: dict[str, Any] = {"hidden_size": 192, "mlp_dim": 768, "num_heads": 6}
    return UNETR(in_channels, out_channels, size, feature_size=6, **width)


_small_swin = _any_size(SwinUNETR, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
_small_nnunet = _nnunet([1, 2, 2, 2], 7, 14, 28, 56)  # as often halved as nnU-Net does at this size
_small_segmamba = _any_size(SegMamba, features=(5, 10, 20, 40), hidden=80, layers=3)
_small_segresnet = _segresnet(6, norm=("GROUP", {"num_groups": 2}))

# For trainings on a CPU: as many MACs as SegResMamba `small`, within 10 %, for an image of 48x64x48 voxels. Only
# SwinUNETR cannot be made that small: MONAI takes no feature size below 12, at which it has four times as many.
SMALL: dict[str, Peer] = {
    "unetr": Peer("UNETR", _small_unetr, 16, 6_740_402),
    "swin_unetr": Peer("SwinUNETR", _small_swin, 32, 3_764_225),
    "unet": Peer("UNET", _unet(21, 42, 84, 168, 336), 16, 8_296_872),
    "nnunet": Peer("nnUNet", _small_nnunet, 8, 268_751),
    "segmamba": Peer("SegMamba", _small_segmamba, 16, 818_589),
    "segresnet": Peer("SegResNet", _small_segresnet, 8, 662_048),
}


def build(
    name: str,
    in_channels: int,
    out_channels: int,
    spatial_size: Sequence[int] | int,
    peers: Mapping[str, Peer] = PEERS,
) -> nn.Module:
    """The network of a peer, with random weights.

    Args:
        name: a key of `peers`.
        in_channels: modalities of the image.
        out_channels: classes of the logits, background included.
        spatial_size: voxels (D, H, W) of the images, or one number for a cube. UNETR's position embedding fits
            this size alone; the others take any.
        peers: `PEERS`, the paper's sizes, or `SMALL`.

    Raises:
        ValueError: an unknown name, which the message answers with the known ones.
        ImportError: the library of that peer is not installed.
    """
    if name not in peers:
        raise ValueError(f"peer {name!r} is not one of {', '.join(peers)}")
    peer = peers[name]
    size = (spatial_size,) * 3 if isinstance(spatial_size, int) else tuple(spatial_size)
    padded = tuple(n + -n % peer.divisor for n in size)
    network = peer.make(in_channels, out_channels, padded)
    return network if peer.divisor == 1 else Padded(network, peer.divisor)


# What checkpointing takes as one piece: the blocks of the peers' libraries, of SegMamba and of SegResMamba.
BLOCKS = (
    *(TransformerBlock, SwinTransformerBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock),
    *(UnetBasicBlock, UnetUpBlock, ResidualUnit, ResBlock, GSC, ToMLayer),
    *(CMMB, Downsample, Skip, UpStage),
)
BLOCKS_BY_NAME = ("BasicBlockD", "StackedConvBlocks")  # of a library that may not be installed


def with_checkpoints(network: nn.Module) -> nn.Module:
    """Let each of a network's blocks keep its inputs only and compute the rest again, in place.

    The outermost module that is a block is one piece. Function and gradients stay the same.
    """
    for child in network.children():
        if isinstance(child, BLOCKS) or type(child).__name__ in BLOCKS_BY_NAME:
            child.forward = partial(checkpoint, child.forward, use_reentrant=False)
        else:
            with_checkpoints(child)
    return network
