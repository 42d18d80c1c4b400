"""The systems of the paper's tables by name, from libraries, in the sizes that its table 7 prints.

nnFormer and 3D UX-Net stand here by their published numbers only: no library holds them. SegResNet, where the
decoder comes from, and nnU-Net's residual encoder are not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets import UNETR, DynUNet, SegResNet, SwinUNETR, UNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srlib.net.model import FEATURES, SegMambaBlock, SegResMamba, Skip
from srlib.scan.recompute import Recompute


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
        recompute, fused: see `SegResMamba`; here of the ToM layers alone.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = FEATURES["paper"],
        hidden: int = 768,
        layers: int = 2,
        recompute: Recompute = "auto",
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        stem = nn.Conv3d(in_channels, features[0], kernel_size=7, stride=2, padding=3)
        halve = [
            nn.Sequential(nn.InstanceNorm3d(c), nn.Conv3d(c, d, kernel_size=2, stride=2))
            for c, d in pairwise(features)
        ]
        self.downsamples = nn.ModuleList([stem, *halve])
        self.stages = nn.ModuleList(
            SegMambaBlock(c, layers, recompute=recompute, fused=fused) for c in features
        )
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
        padding = [p for n in (width, height, depth) for p in (0, -n % self.divisor)]
        if any(padding):
            x = F.pad(x, padding)  # starts at the last axis
        return self.network(x)[..., :depth, :height, :width]


def nnunet_resenc(in_channels: int, out_channels: int) -> nn.Module:
    """nnU-Net's residual encoder, preset L, from an optional package."""
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


@dataclass(frozen=True)
class Peer:
    """A system of the comparison.

    Attributes:
        title: its name in the paper's tables.
        parameters: number of those that receive a gradient, for 1 channel in, 14 classes, 128^3.
        divisor: of the sizes that the network takes; others are padded (`Padded`).
        network: makes it from `in_channels`, `out_channels` and the settings.
        settings: its other arguments.
    """

    title: str
    parameters: int
    divisor: int
    network: Callable[..., nn.Module]
    settings: Mapping[str, Any]


def _unet(*widths: int) -> dict[str, Any]:
    return {"spatial_dims": 3, "channels": widths, "strides": (2, 2, 2, 2), "num_res_units": 2}


def _dynunet(strides: Sequence[int], *widths: int) -> dict[str, Any]:
    """Settings of nnU-Net's plain network: kernels of 3 voxels, a stride and a width for each stage."""
    stages = {"kernel_size": [3] * len(strides), "strides": strides, "filters": widths}
    return {"spatial_dims": 3, "upsample_kernel_size": strides[1:], **stages}


def _segresnet(width: int, **norm: Any) -> dict[str, Any]:
    blocks = {"blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1)}
    return {"spatial_dims": 3, "init_filters": width, **blocks, **norm}


# Their memory is what these are there for: layers that can compute again do.
_LEAN = {"recompute": True}
_RELEASED = {"variant": "released", **_LEAN}
_NNUNET = _dynunet([1, 2, 2, 2, 2, 2], 32, 64, 128, 256, 320, 320)
PEERS: dict[str, Peer] = {
    "unetr": Peer("UNETR", 93_011_374, 16, UNETR, {}),
    "swin_unetr": Peer("SwinUNETR", 62_187_296, 32, SwinUNETR, {"feature_size": 48}),
    "unet": Peer("UNET", 4_822_057, 16, UNet, _unet(16, 32, 64, 128, 256)),
    "nnunet": Peer("nnUNet", 31_189_806, 32, DynUNet, _NNUNET),
    "segmamba": Peer("SegMamba", 67_363_262, 16, SegMamba, _LEAN),
    "segresmamba": Peer("SegResMamba", 68_259_950, 1, SegResMamba, _LEAN),
    "segresmamba_released": Peer("SegResMamba, released", 70_426_430, 1, SegResMamba, _RELEASED),
    "segresnet": Peer("SegResNet", 18_796_398, 8, SegResNet, _segresnet(32)),
    "nnunet_resenc": Peer("nnU-Net ResEnc L", 102_348_622, 32, nnunet_resenc, {}),
}

# For trainings on a CPU: as many MACs as SegResMamba `small`, within 10 %, for an image of 48x64x48 voxels. Only
# SwinUNETR cannot be made that small: MONAI takes no feature size below 12, at which it has four times as many.
_UNETR = {"feature_size": 6, "hidden_size": 192, "mlp_dim": 768, "num_heads": 6}
_SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
_DYNUNET = _dynunet([1, 2, 2, 2], 7, 14, 28, 56)  # as often halved as nnU-Net does at this size
_SEGMAMBA = {"features": (5, 10, 20, 40), "hidden": 80, "layers": 3}
_SEGRESNET = _segresnet(6, norm=("GROUP", {"num_groups": 2}))
SMALL: dict[str, Peer] = {
    "unetr": Peer("UNETR", 6_740_402, 16, UNETR, _UNETR),
    "swin_unetr": Peer("SwinUNETR", 3_764_225, 32, SwinUNETR, _SWIN),
    "unet": Peer("UNET", 8_296_872, 16, UNet, _unet(21, 42, 84, 168, 336)),
    "nnunet": Peer("U-Net of nnU-Net's shape", 268_751, 8, DynUNet, _DYNUNET),
    "segmamba": Peer("SegMamba", 818_589, 16, SegMamba, _SEGMAMBA),
    "segresnet": Peer("SegResNet", 662_048, 8, SegResNet, _SEGRESNET),
}


def build(
    name: str,
    in_channels: int,
    out_channels: int,
    spatial_size: Sequence[int] | int,
    peers: Mapping[str, Peer] = PEERS,
    **settings: Any,
) -> nn.Module:
    """Make the network of a peer, with random weights.

    Args:
        name: a key of `peers`.
        in_channels: modalities of the image.
        out_channels: classes of the logits, background included.
        spatial_size: voxels (D, H, W) of the images, or one number for a cube. UNETR's position embedding fits
            this size alone; the others take any.
        peers: `PEERS`, the paper's sizes, or `SMALL`.
        **settings: replace single ones of the peer's.

    Raises:
        ValueError: an unknown name, which the message answers with the known ones.
        ImportError: the library of that peer is not installed.
    """
    if name not in peers:
        raise ValueError(f"peer {name!r} is not one of {', '.join(peers)}")
    peer = peers[name]
    size = (spatial_size,) * 3 if isinstance(spatial_size, int) else tuple(spatial_size)
    settings = {**peer.settings, **settings}
    if peer.network is UNETR:
        settings["img_size"] = tuple(n + -n % peer.divisor for n in size)
    network = peer.network(in_channels=in_channels, out_channels=out_channels, **settings)
    return network if peer.divisor == 1 else Padded(network, peer.divisor)


# Classes of blocks by name, since one library may not be installed: of the peers' libraries, SegMamba, SegResMamba.
CHECKPOINTED = {
    *("TransformerBlock", "SwinTransformerBlock", "UnetrBasicBlock", "UnetrPrUpBlock"),
    *("UnetrUpBlock", "UnetBasicBlock", "UnetUpBlock", "ResidualUnit", "ResBlock"),
    *("BasicBlockD", "StackedConvBlocks", "GSC", "ToMLayer"),
    *("CMMB", "Downsample", "Skip", "UpStage"),
}


def with_checkpoints(network: nn.Module) -> nn.Module:
    """Let each of a network's blocks keep its inputs only and compute the rest again, in place.

    The outermost module that is a block is one piece. Function and gradients stay the same.
    """
    for child in network.children():
        if type(child).__name__ in CHECKPOINTED:
            child.forward = partial(checkpoint, child.forward, use_reentrant=False)
        else:
            with_checkpoints(child)
    return network
