"""SegResMamba (Das et al., MIDL 2025, section 2, figure 1 and algorithm 1), in reading order.

| paper | shape for input (B, C_in, D, H, W) | here |
|---|---|---|
| stage s = 0..3, channels C_s | (B, C_s, D/2^(s+1), H/2^(s+1), W/2^(s+1)) | `features[s]` |
| X, input of the mixed block | stage's resolution | `x` in `CMMB.forward` |
| F1, F2, F3 = ToM(F2), F4 | half the stage's resolution | results of `f1` to `f4` in `CMMB` |
| F5, F6 = F5 + X, F_out = ToM(F6) | stage's resolution | results of `f5`, the sum and `tom` in `CMMB` |
| ToM | as its input | `srlib.net.tom.ToMLayer` |
| skip of stage s | as stage s | `skips[s]` |
| logits | (B, C_out, D, H, W) | result of `SegResMamba.forward` |

Sizes that two does not divide are rounded up at each halving (a map with an odd size is padded by repeating its
last plane), and the decoder crops what it upsamples to the skip's size; no voxel of the input is lost.

With `recompute` one map is kept for the backward pass between two convolutions, the first one's output. Normalisation,
activation and the skips' MLP are computed again from it (`srlib.scan.recompute`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution, ResBlock
from torch import Tensor, nn

from srlib.files import load_tensors, read_json
from srlib.net.tom import ToMLayer
from srlib.scan import ORDERS, doubled
from srlib.scan.recompute import Recompute, check_recompute, recomputed

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

    @wraps(forward)
    def wrapped(self: nn.Module, x: Tensor, *others: Tensor) -> Tensor:
        affected = torch.is_autocast_enabled("cpu") and x.device.type == "cpu"
        if not affected or min(x.shape[2:]) > 4:
            return forward(self, x, *others)
        with torch.autocast("cpu", enabled=False):
            return forward(self, x.float(), *(other.float() for other in others))

    return wrapped


class ConvNormAct(nn.Sequential):
    """Convolution, InstanceNorm (no parameters), ReLU: the unit of the mixed block, callable in two halves."""

    def __init__(self, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(channels, channels, kernel_size, stride, padding=kernel_size // 2),
            nn.InstanceNorm3d(channels),
            nn.ReLU(inplace=True),
        )

    def conv(self, x: Tensor) -> Tensor:
        """X (B, C, d, h, w) -> (B, C, d, h, w), or half as large, rounded up, with stride 2."""
        return self[0](x)

    def finish(self, x: Tensor) -> Tensor:
        """Normalise and rectify a result of `conv`; the shape stays."""
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
        """Normalise and rectify a result of `upsample` -> F5 (B, C, *size)."""
        depth, height, width = (n - wanted for n, wanted in zip(x.shape[2:], size, strict=True))
        return F.relu(self.norm(x), inplace=True)[..., depth:, height:, width:]


class CMMB(nn.Module):
    """Convolution-Mamba mixed block (algorithm 1): (B, C, d, h, w) -> (B, C, d, h, w).

    Args:
        channels: C.
        tom: ToM layers that run: `both`, `inner` (half resolution), `outer` (after the sum), `none`, or `conv`,
            a plain 3x3x3 convolution in the outer layer's place and no inner one, as in the released code.
        released: see `Restore`.
        recompute: see `SegResMamba`.
        **layer: passed on to `ToMLayer`.
    """

    def __init__(
        self,
        channels: int,
        tom: str = "both",
        released: bool = False,
        recompute: Recompute = "auto",
        **layer: Any,
    ) -> None:
        super().__init__()
        self.again = partial(recomputed, recompute=recompute)
        make_tom = partial(ToMLayer, channels, recompute=recompute, **layer)
        self.f1 = ConvNormAct(channels, 5, stride=2)
        self.f2 = ConvNormAct(channels, 3)
        self.f3 = make_tom() if tom in ("both", "inner") else None
        self.f4 = ConvNormAct(channels, 3)
        self.f5 = Restore(channels, released)
        self.tom: nn.Module = nn.Identity()
        if tom in ("both", "outer"):
            self.tom = make_tom()
        elif tom == "conv":
            self.tom = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        self.register_load_state_dict_pre_hook(_take_old_names)

    @float32_where_tiny
    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, d, h, w) -> (B, C, d, h, w); restored to the same size, whatever it is."""
        size = x.shape[2:]
        y = self.again(self.f1.conv(x), self.f1.finish, self.f2.conv)  # F1, and F2 but for its end
        if self.f3 is None:
            y = self.again(y, self.f2.finish, self.f4.conv)
        else:
            y = self.f4.conv(self.f3(self.again(y, self.f2.finish)))
        y = self.again(y, self.f4.finish, partial(self.f5.upsample, size=size))
        f5 = self.again(y, partial(self.f5.finish, size=size))
        return self.tom(f5 + x)


# Names in a CMMB until the layers got the paper's: state dicts that hold them load as well.
OLD_NAMES = {
    r"inner\.0\.": "f1.",
    r"inner\.1\.": "f2.",
    r"inner\.2\.(?=norm|mamba)": "f3.",
    r"inner\.[23]\.": "f4.",
    r"restore\.": "f5.",
    r"outer\.": "tom.",
}


def _take_old_names(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename a CMMB's entries of a state dict that is about to be loaded."""
    for name in list(state):
        if name.startswith(prefix):
            new = _renamed(name.removeprefix(prefix), OLD_NAMES)
            if new is not None:
                state[prefix + new] = state.pop(name)


def _renamed(name: str, patterns: Mapping[str, str]) -> str | None:
    """Replace the first of the patterns that the name begins with; `None` when it begins with none."""
    for pattern, replacement in patterns.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return None


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
    """The block of SegMamba (Xing et al., MICCAI 2024): (B, C, d, h, w) -> (B, C, d, h, w).

    Gated spatial convolution, then ToM layers that add their input.

    Args:
        channels: C.
        layers: number of ToM layers, one after the other.
        **layer: passed on to `ToMLayer`.
    """

    def __init__(self, channels: int, layers: int = 2, **layer: Any) -> None:
        tom = (ToMLayer(channels, residual=True, **layer) for _ in range(layers))
        super().__init__(GSC(channels), *tom)


class Downsample(nn.Module):
    """Between stages: an `extra` 3x3x3 convolution, then 2x2x2 with stride 2; C -> 2C, half the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        extra: bool = True,
        recompute: Recompute = "auto",
    ) -> None:
        super().__init__()
        self.again = partial(recomputed, recompute=recompute)
        norm = nn.InstanceNorm3d(in_channels)
        conv = nn.Conv3d(in_channels, in_channels, kernel_size=3, padding=1)
        self.extra = nn.Sequential(norm, conv) if extra else nn.Identity()
        self.norm = nn.InstanceNorm3d(in_channels)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=2, stride=2)

    @float32_where_tiny
    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, d, h, w) -> (B, 2C, ceil(d/2), ceil(h/2), ceil(w/2))."""
        return self.again(self.again(x, self.extra), self.norm, _even, self.conv)


def _even(x: Tensor) -> Tensor:
    """Repeat the last plane of each axis with an odd size, so that stride 2 does not drop it.

    Not by `F.pad`, whose gradient adds in any order on a GPU.
    """
    for axis in (2, 3, 4):
        if x.shape[axis] % 2:
            x = torch.cat((x, x.narrow(axis, x.shape[axis] - 1, 1)), axis)
    return x


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

    def __init__(self, in_channels: int, out_channels: int, recompute: Recompute = "auto") -> None:
        super().__init__()
        self.again = partial(recomputed, recompute=recompute)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=1, bias=False)
        self.unit = ResBlock(3, out_channels, norm=("GROUP", {"num_groups": 8}))

    @float32_where_tiny
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """X (B, 2C, d, h, w), skip (B, C, D, H, W) with D = 2d or 2d - 1 -> (B, C, D, H, W)."""
        x = doubled(self.conv(x))
        depth, height, width = skip.shape[2:]
        x, unit = x[..., :depth, :height, :width] + skip, self.unit
        y = self.again(x, unit.norm1, unit.act, unit.conv1)
        return x + self.again(y, unit.norm2, unit.act, unit.conv2)


class SegResMamba(nn.Module):
    """SegResMamba: Mamba and convolution in the encoder, a summing SegResNet decoder.

    Args:
        in_channels: modalities of the image.
        out_channels: classes of the logits, background included.
        features: channels of the four stages; `FEATURES` names the paper's and two smaller ones. Each a multiple
            of 8, each twice the one before.
        d_state, d_conv, expand: sizes of the Mamba layers (`TriOrientedMamba`).
        nslices: fixes the number of slices of the inter-slice order; `None` takes each feature map's size along
            `slice_axis`.
        slice_axis: spatial axis, 0 to 2, along which the slices of a scan lie: the slowest of its row-major order.
        tom: ToM layers of a block (`CMMB`); `None` means `both`, or `conv` in the released variant.
        tom_residual: add its input to each ToM layer's output (SegMamba does, the paper's equation does not).
        scan_orders: non-empty subset of `forward`, `reverse`, `inter_slice`.
        recurrence: False forgets the state at each token (`TriOrientedMamba`).
        extra_conv: the additional convolution between stages (`Downsample`).
        block: `cmmb`, or `segmamba` for SegMamba's block in its place (`SegMambaBlock`; its ToM layers always
            add their input).
        variant: `paper` is the paper's text; `released` the authors' public code, in which no ToM layer is ever
            called and a convolution stands in the outer one's place. Only the latter takes their weights.
        recompute: True computes what is cheap again in the backward pass instead of keeping it. Outputs and gradients
            are the same, bit for bit on the CPU; memory is saved for time. "auto" does so everywhere but on a CUDA
            device that has room for 200 tensors of a map's size, where memory is plentiful (`recomputed`).
        fused: operator of the Mamba mixers (`mamba_mixer`); `None` takes the fused one where it can run.

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
        slice_axis: int = 0,
        tom: str | None = None,
        tom_residual: bool = False,
        scan_orders: Sequence[str] = ORDERS,
        recurrence: bool = True,
        extra_conv: bool = True,
        block: str = "cmmb",
        variant: str = "paper",
        recompute: Recompute = "auto",
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        tom = _check_arguments(features, tom, block, variant)
        check_recompute(recompute)
        if slice_axis not in range(3):
            raise ValueError(f"slice_axis must be 0, 1 or 2, got {slice_axis!r}")
        self.slice_axis = slice_axis
        self.again = partial(recomputed, recompute=recompute)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.features, self.variant = tuple(features), variant
        layer: dict[str, Any] = {
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "nslices": nslices,
            "scan_orders": tuple(scan_orders),
            "recurrence": recurrence,
            "recompute": recompute,
            "fused": fused,
        }

        pairs = list(pairwise(features))
        stem = nn.Conv3d(in_channels, features[0], kernel_size=7, stride=2, padding=3)
        halve = (Downsample(c, d, extra_conv, recompute) for c, d in pairs)
        self.downsamples = nn.ModuleList([stem, *halve])
        if block == "cmmb":
            layer |= {"tom": tom, "released": variant == "released", "residual": tom_residual}
        make = CMMB if block == "cmmb" else SegMambaBlock
        self.blocks = nn.ModuleList(make(c, **layer) for c in features)
        self.skips = nn.ModuleList(Skip(c) for c in features)
        self.ups = nn.ModuleList(UpStage(d, c, recompute) for c, d in reversed(pairs))
        self.head = nn.ConvTranspose3d(features[0], out_channels, kernel_size=2, stride=2)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SegResMamba:
        """Network of a folder that `python -m srlib export RUN FOLDER --to hub` wrote, in eval mode, on the CPU.

        Args:
            folder: holds `config.json`, the arguments of this class, and `model.safetensors`.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: a file that is broken, weights that are not those of the configuration or no finite numbers;
                names it.
        """
        config, weights = (Path(folder) / name for name in ("config.json", "model.safetensors"))
        about = "arguments of SegResMamba"
        arguments = read_json(config, about, in_channels=int, out_channels=int, features=list)
        state, known = load_tensors(weights)
        trained = (known or {}).get("config", {})
        for name in arguments.keys() & trained:  # some change the function and no weight's shape
            if json.dumps(arguments[name]) != json.dumps(trained[name]):
                said = f"{name} is {arguments[name]!r}, was {trained[name]!r} in training"
                raise ValueError(f"{config}: {said}")
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{weights}: {broken[0]} holds NaN or infinity")
        try:
            with torch.device("meta"):  # takes no memory: other weights are told before
                network = cls(**arguments)
            full = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
            network.load_state_dict(full, assign=True)
        except (TypeError, RuntimeError) as error:  # an argument that is not known; other weights
            said = str(error).splitlines()[-1].strip()
            raise ValueError(f"{weights}: does not fit {config}: {said:.200}") from error
        return network.eval()

    def encode(self, x: Tensor) -> list[Tensor]:
        """Image (B, C_in, D, H, W) -> the four skips, stage s at 1/2^(s+1) of the resolution."""
        self._check_input(x)
        # Kernels are cubes and every axis is halved alike, so only the scans see which axis comes first.
        x = x.movedim(2 + self.slice_axis, 2)
        skips = []
        for downsample, block, skip in zip(self.downsamples, self.blocks, self.skips, strict=True):
            x = block(downsample(x))
            skips.append(self.again(x, skip).movedim(2, 2 + self.slice_axis))
        return skips

    def decode(self, skips: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The four skips -> logits (B, C_out, *size)."""
        *finer, x = (skip.movedim(2 + self.slice_axis, 2) for skip in skips)
        for up, skip in zip(self.ups, reversed(finer), strict=True):
            x = up(x, skip)
        depth, height, width = size
        return self.head(x).movedim(2, 2 + self.slice_axis)[..., :depth, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C_in, D, H, W) -> logits (B, C_out, D, H, W).

        Raises:
            ValueError: when rank or channels are not those stated, or every axis is at most 32 voxels: the
                deepest map, at 1/32 of the resolution, needs at least two voxels for its InstanceNorm.
        """
        return self.decode(self.encode(x), x.shape[2:])

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 5 or x.shape[0] < 1 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input must have rank 5 (B, C, D, H, W) with B > 0 and C = in_channels = {self.in_channels}, "
                f"got rank {x.dim()} with shape {tuple(x.shape)}"
            )
        if prod([-(-n // MINIMUM_DIVISOR) for n in x.shape[2:]]) < 2:  # a list, for torch.compile
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
    names = {str(_renamed(name, RELEASED_NAMES)): name for name in model.state_dict()}
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
    r"blocks\.(\d)\.f1\.0\.": r"vit.gscs.\1.proj.",
    r"blocks\.(\d)\.f2\.0\.": r"vit.gscs.\1.proj3.",
    r"blocks\.(\d)\.f4\.0\.": r"vit.gscs.\1.proj4.",
    r"blocks\.(\d)\.f5\.conv\.": r"vit.gscs.\1.proj5.",
    r"blocks\.(\d)\.tom\.": r"vit.stages.\1.0.",
    r"skips\.(\d)\.1\.": r"vit.mlps.\1.fc1.",
    r"skips\.(\d)\.3\.": r"vit.mlps.\1.fc2.",
    r"ups\.(\d)\.conv\.": r"segresnet.up_samples.\1.0.conv.",
    r"ups\.(\d)\.unit\.": r"segresnet.up_layers.\1.0.",
    r"head\.": r"out.",
}
