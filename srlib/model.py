"""SegResMamba (Das et al., MIDL 2025, section 2, figure 1 and algorithm 1), in reading order.

| paper | shape for input (B, C_in, D, H, W) | here |
|---|---|---|
| stage s = 0..3, channels C_s | (B, C_s, D/2^(s+1), H/2^(s+1), W/2^(s+1)) | `features[s]` |
| X, input of the mixed block | stage's resolution | `x` in `CMMB.forward` |
| F1..F4 | half the stage's resolution | `inner` |
| F5, F6 = F5 + X, F_out | stage's resolution | `CMMB.forward` |
| ToM | as its input | `srlib.tom.ToMLayer` |
| skip of stage s | as stage s | `skips[s]` |
| logits | (B, C_out, D, H, W) | result of `SegResMamba.forward` |

Sizes that two does not divide are rounded up at each halving (a map with an odd size is padded by repeating its
last plane), and the decoder crops what it upsamples to the skip's size; no voxel of the input is lost.

Between two convolutions one map is kept for the backward pass, the first one's output. Normalisation, activation and
the skips' MLP are computed again from it (`srlib.recompute`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import ResBlock
from torch import Tensor, nn

from srlib.recompute import recomputed
from srlib.scan import ORDERS
from srlib.segmamba import SegMambaBlock
from srlib.tom import ToMLayer

FEATURES: dict[str, tuple[int, ...]] = {
    "paper": (48, 96, 192, 384),
    "small": (16, 32, 64, 128),
    "tiny": (8, 16, 32, 64),
}
TOM = ("both", "inner", "outer", "none", "conv")
BLOCKS = ("cmmb", "segmamba")
VARIANTS = ("paper", "released")
MINIMUM_DIVISOR = (
    32  # resolution of the deepest map: four stages and the inner half of the last block
)


def float32_where_tiny(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a module's `forward` without CPU autocast when its map has an axis of four voxels or fewer.

    In bfloat16 the CPU's convolutions (oneDNN, seen with torch 2.13) leave parts of the weight
    gradient unset, NaN among them, when they produce maps of two voxels a side. Maps that small
    cost next to nothing in float32.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, x: Tensor, *others: Tensor) -> Tensor:
        affected = torch.is_autocast_enabled("cpu") and x.device.type == "cpu"
        if not affected or min(x.shape[2:]) > 4:
            return forward(self, x, *others)
        with torch.autocast("cpu", enabled=False):
            return forward(self, x.float(), *(other.float() for other in others))

    return wrapped


class ConvNormAct(nn.Sequential):
    """Convolution, InstanceNorm (no parameters), ReLU: the unit of the mixed block."""

    def __init__(self, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(channels, channels, kernel_size, stride, padding=kernel_size // 2),
            nn.InstanceNorm3d(channels),
            nn.ReLU(inplace=True),
        )

    def conv(self, x: Tensor) -> Tensor:
        """The unit's first half."""
        return self[0](x)

    def finish(self, x: Tensor) -> Tensor:
        """The unit's second half, on what `conv` yields."""
        return self[2](self[1](x))


class Restore(nn.Module):
    """F4 -> F5: transposed 5x5x5 convolution with stride 2 to the block's size, InstanceNorm, ReLU, in two halves.

    Args:
        channels: C.
        released: as in the authors' code, always restore an even size and then cut the *first* plane of an axis
            whose size is odd, which shifts F5 by one voxel against X there. The default restores the exact size.
    """

    def __init__(self, channels: int, released: bool = False) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(channels, channels, kernel_size=5, stride=2, padding=2)
        self.norm = nn.InstanceNorm3d(channels)
        self.released = released

    def upsample(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """X (B, C, ceil(d/2), ceil(h/2), ceil(w/2)) -> (B, C, d, h, w) for `size` = (d, h, w), or an even size."""
        even = [2 * n for n in x.shape[2:]]
        return self.conv(x, output_size=even if self.released else size)

    def finish(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """What `upsample` yields -> F5 (B, C, *size)."""
        depth, height, width = (n - wanted for n, wanted in zip(x.shape[2:], size, strict=True))
        return F.relu(self.norm(x), inplace=True)[..., depth:, height:, width:]


class CMMB(nn.Module):
    """Convolution-Mamba mixed block (algorithm 1): (B, C, d, h, w) -> (B, C, d, h, w).

    Args:
        channels: C.
        tom: which ToM layers run: `both`, `inner` (half resolution), `outer` (after the sum), `none`, or `conv`,
            a plain 3x3x3 convolution in the outer layer's place and no inner one, as in the released code.
        released: see `Restore`.
        **layer: passed on to `ToMLayer`.
    """

    def __init__(
        self, channels: int, tom: str = "both", released: bool = False, **layer: Any
    ) -> None:
        super().__init__()
        inner: list[nn.Module] = [ConvNormAct(channels, 5, stride=2), ConvNormAct(channels, 3)]
        if tom in ("both", "inner"):
            inner.append(ToMLayer(channels, **layer))
        self.inner = nn.Sequential(*inner, ConvNormAct(channels, 3))  # F1, F2, F3, F4
        self.restore = Restore(channels, released)  # F5
        self.outer: nn.Module = nn.Identity()
        if tom in ("both", "outer"):
            self.outer = ToMLayer(channels, **layer)
        elif tom == "conv":
            self.outer = nn.Conv3d(channels, channels, kernel_size=3, padding=1)

    @float32_where_tiny
    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, d, h, w) -> (B, C, d, h, w); restored to the same size, whatever it is."""
        first, second, last = (unit for unit in self.inner if isinstance(unit, ConvNormAct))
        tom = [layer for layer in self.inner if isinstance(layer, ToMLayer)]
        upsample = functools.partial(self.restore.upsample, size=x.shape[2:])
        finish = functools.partial(self.restore.finish, size=x.shape[2:])
        y = recomputed(first.conv(x), first.finish, second.conv)  # F1, and F2 but for its end
        if tom:
            f3 = tom[0](recomputed(y, second.finish))
            y = last.conv(f3)
        else:
            y = recomputed(y, second.finish, last.conv)
        f5 = recomputed(recomputed(y, last.finish, upsample), finish)  # F4, F5
        return self.outer(f5 + x)


class Downsample(nn.Module):
    """Between stages: an `extra` 3x3x3 convolution, then 2x2x2 with stride 2; C -> 2C, half the size."""

    def __init__(self, in_channels: int, out_channels: int, extra: bool = True) -> None:
        super().__init__()
        norm, conv = (
            nn.InstanceNorm3d(in_channels),
            nn.Conv3d(in_channels, in_channels, 3, padding=1),
        )
        self.extra = nn.Sequential(norm, conv) if extra else nn.Identity()
        self.norm = nn.InstanceNorm3d(in_channels)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=2, stride=2)

    @float32_where_tiny
    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, d, h, w) -> (B, 2C, ceil(d/2), ceil(h/2), ceil(w/2))."""
        return recomputed(recomputed(x, self.extra), self.norm, _even, self.conv)


def _even(x: Tensor) -> Tensor:
    """Repeat the last plane of each axis with an odd size, so that stride 2 does not drop it."""
    odd = [n % 2 for n in x.shape[2:]]
    return F.pad(x, (0, odd[2], 0, odd[1], 0, odd[0]), mode="replicate") if any(odd) else x


class Skip(nn.Sequential):
    """InstanceNorm, then a channel MLP with one hidden layer of 2C (1x1x1 convolutions, GELU)."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.InstanceNorm3d(channels),
            nn.Conv3d(channels, 2 * channels, kernel_size=1),
            nn.GELU(),
            nn.Conv3d(2 * channels, channels, kernel_size=1),
        )


class UpStage(nn.Module):
    """Decoder stage (Myronenko 2018): halve the channels, upsample, add the skip, one residual unit."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=1, bias=False)
        self.unit = ResBlock(3, out_channels, norm=("GROUP", {"num_groups": 8}))

    @float32_where_tiny
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """X (B, 2C, d, h, w), skip (B, C, D, H, W) with D = 2d or 2d - 1 -> (B, C, D, H, W)."""
        x = F.interpolate(self.conv(x), scale_factor=2, mode="trilinear", align_corners=False)
        depth, height, width = skip.shape[2:]
        x, unit = x[..., :depth, :height, :width] + skip, self.unit
        y = recomputed(x, unit.norm1, unit.act, unit.conv1)
        return x + recomputed(y, unit.norm2, unit.act, unit.conv2)


class SegResMamba(nn.Module):
    """SegResMamba: Mamba and convolution in the encoder, a summing SegResNet decoder.

    Args:
        in_channels: modalities of the image.
        out_channels: classes of the logits, background included.
        features: channels of the four stages; `FEATURES` names the paper's and two smaller ones. Each a multiple
            of 8, each twice the one before.
        d_state, d_conv, expand: sizes of the Mamba layers (`TriOrientedMamba`).
        nslices: fixes the number of slices of the inter-slice order; `None` takes each feature map's depth.
        tom: which ToM layers a block has (`CMMB`); `None` means `both`, or `conv` in the released variant.
        tom_residual: add its input to each ToM layer's output (SegMamba does, the paper's equation does not).
        scan_orders: non-empty subset of `forward`, `reverse`, `inter_slice`.
        recurrence: False forgets the state at each token (`TriOrientedMamba`).
        extra_conv: the additional convolution between stages (`Downsample`).
        block: `cmmb`, or `segmamba` for SegMamba's block in its place (`SegMambaBlock`; its ToM layers always
            add their input).
        variant: `paper` is the paper's text; `released` the authors' public code, in which no ToM layer is ever
            called and a convolution stands in the outer one's place. Only the latter takes their weights.

    Raises:
        ValueError: for arguments that do not fit these descriptions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = FEATURES["paper"],
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        nslices: int | None = None,
        tom: str | None = None,
        tom_residual: bool = False,
        scan_orders: Sequence[str] = ORDERS,
        recurrence: bool = True,
        extra_conv: bool = True,
        block: str = "cmmb",
        variant: str = "paper",
    ) -> None:
        super().__init__()
        tom = _check_arguments(features, tom, block, variant)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.features, self.variant = tuple(features), variant
        layer: dict[str, Any] = {
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "nslices": nslices,
            "scan_orders": tuple(scan_orders),
            "recurrence": recurrence,
        }

        pairs = list(pairwise(features))
        stem = nn.Conv3d(in_channels, features[0], kernel_size=7, stride=2, padding=3)
        self.downsamples = nn.ModuleList([stem, *(Downsample(c, d, extra_conv) for c, d in pairs)])
        if block == "cmmb":
            layer |= {"tom": tom, "released": variant == "released", "residual": tom_residual}
        make = CMMB if block == "cmmb" else SegMambaBlock
        self.blocks = nn.ModuleList(make(c, **layer) for c in features)
        self.skips = nn.ModuleList(Skip(c) for c in features)
        self.ups = nn.ModuleList(UpStage(d, c) for c, d in reversed(pairs))
        self.head = nn.ConvTranspose3d(features[0], out_channels, kernel_size=2, stride=2)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Image (B, C_in, D, H, W) -> the four skips, stage s at 1/2^(s+1) of the resolution."""
        self._check_input(x)
        skips = []
        for downsample, block, skip in zip(self.downsamples, self.blocks, self.skips, strict=True):
            x = block(downsample(x))
            skips.append(recomputed(x, skip))
        return skips

    def decode(self, skips: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The four skips -> logits (B, C_out, *size)."""
        *finer, x = skips
        for up, skip in zip(self.ups, reversed(finer), strict=True):
            x = up(x, skip)
        depth, height, width = size
        return self.head(x)[..., :depth, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C_in, D, H, W) -> logits (B, C_out, D, H, W).

        Raises:
            ValueError: when rank or channels are not those stated, or every axis is at most 32 voxels: the
                deepest map, at 1/32 of the resolution, needs at least two voxels for its InstanceNorm.
        """
        return self.decode(self.encode(x), x.shape[2:])

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 5 or not len(x) or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input must have rank 5 (B, C, D, H, W) with B > 0 and C = in_channels = {self.in_channels}, "
                f"got rank {x.dim()} with shape {tuple(x.shape)}"
            )
        if prod(-(-n // MINIMUM_DIVISOR) for n in x.shape[2:]) < 2:
            raise ValueError(
                f"input size {tuple(x.shape[2:])} is below the minimum: at least one axis must have "
                f"{MINIMUM_DIVISOR + 1} voxels or more"
            )


def _check_arguments(features: Sequence[int], tom: str | None, block: str, variant: str) -> str:
    """Validate what PyTorch would accept or refuse obscurely; returns the resolved `tom`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if tom is None:
        tom = "both" if variant == "paper" else "conv"
    if tom not in TOM:
        raise ValueError(f"tom must be one of {TOM}, got {tom!r}")
    if block not in BLOCKS or (block == "segmamba" and tom != "both"):
        raise ValueError(f"block must be one of {BLOCKS}, the latter with both ToM, got {block!r}")
    if variant == "released" and tom != "conv":
        raise ValueError(f"the released variant runs no ToM layer (tom='conv'), got tom={tom!r}")
    doubling = all(d == 2 * c for c, d in pairwise(features))
    if len(features) != 4 or features[0] % 8 or not doubling:
        raise ValueError(
            "features must be four numbers, multiples of 8, each twice the one before; "
            f"got {tuple(features)}"
        )
    return tom


def load_released_state_dict(model: SegResMamba, state: Mapping[str, Tensor]) -> list[str]:
    """Load weights of the authors' public code into a `released` model.

    Args:
        model: a `SegResMamba(..., variant="released")` with the weights' channels and features.
        state: state dict with the authors' key names (`vit.*`, `segresnet.*`, `out.*`); a `module.` prefix from
            DataParallel is taken off.

    Returns:
        The names left out, in order: parameters that the authors register and never use (their Mamba layers and
        a second, whole SegResNet encoder).

    Raises:
        ValueError: when the model is of another variant, a used name is missing, or a shape differs.
    """
    if model.variant != "released":
        raise ValueError(
            f"released weights need variant='released', this model is {model.variant!r}"
        )
    state = {name.removeprefix("module."): value for name, value in state.items()}
    names = {_released_name(name): name for name in model.state_dict()}
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the state dict lacks {len(missing)} names, the first is {missing[0]!r}")
    for theirs, ours in names.items():
        expected = model.get_parameter(ours).shape
        if state[theirs].shape != expected:
            raise ValueError(
                f"{theirs}: shape {tuple(state[theirs].shape)}, the model expects {tuple(expected)}"
            )
    model.load_state_dict({ours: state[theirs] for theirs, ours in names.items()})
    return [name for name in state if name not in names]


# Prefixes of the parameter names in this module and in the authors' code; the group is the stage.
RELEASED_NAMES = {
    r"downsamples\.0\.": r"vit.downsample_layers.0.0.",
    r"downsamples\.(\d)\.extra\.1\.": r"vit.downsample_layers.\1.1.",
    r"downsamples\.(\d)\.conv\.": r"vit.downsample_layers.\1.3.",
    r"blocks\.(\d)\.inner\.0\.0\.": r"vit.gscs.\1.proj.",
    r"blocks\.(\d)\.inner\.1\.0\.": r"vit.gscs.\1.proj3.",
    r"blocks\.(\d)\.inner\.2\.0\.": r"vit.gscs.\1.proj4.",
    r"blocks\.(\d)\.restore\.conv\.": r"vit.gscs.\1.proj5.",
    r"blocks\.(\d)\.outer\.": r"vit.stages.\1.0.",
    r"skips\.(\d)\.1\.": r"vit.mlps.\1.fc1.",
    r"skips\.(\d)\.3\.": r"vit.mlps.\1.fc2.",
    r"ups\.(\d)\.conv\.": r"segresnet.up_samples.\1.0.conv.",
    r"ups\.(\d)\.unit\.": r"segresnet.up_layers.\1.0.",
    r"head\.": r"out.",
}


def _released_name(name: str) -> str:
    """This module's parameter name -> the authors'."""
    for pattern, replacement in RELEASED_NAMES.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    raise KeyError(name)
