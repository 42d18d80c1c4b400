"""Random training patches: what is drawn for a sample, and the patch that it makes of a case, on any device.

Arrays are (C, X, Y, Z), as in `srlib.data.cases`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import radians
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms.utils import create_rotate, create_scale
from numpy.random import RandomState, SeedSequence
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from srlib.data.cases import Dataset

STAYING = 2 << 30  # bytes
FOREGROUND = 2 / 3  # of the patches are centred on a labelled voxel
TURNED = 0.5  # of the samples are rotated and scaled
DEGREES, FACTORS = 15, (0.85, 1.15)
# How often an intensity is changed, and the range of the change.
INTENSITIES = {
    "scale": (0.5, -0.15, 0.15),  # (1 + scale) times
    "shift": (0.5, -0.15, 0.15),
    "gamma": (0.3, 0.7, 1.5),  # exponent, of intensities from 0 to 1
    "noise": (0.3, 0.0, 0.1),  # standard deviation
}


class Augmentation(NamedTuple):
    """What is changed at random: the share of samples that are rotated and scaled, and intensities as `INTENSITIES`."""

    turned: float
    intensities: Mapping[str, tuple[float, float, float]]


OURS = Augmentation(TURNED, INTENSITIES)
# Of the paper's authors, whose script takes MONAI's RandScaleIntensityd and RandShiftIntensityd with prob=1.
AUTHORS = Augmentation(0.0, {"scale": (1.0, -0.1, 0.1), "shift": (1.0, -0.1, 0.1)})


class Draw(NamedTuple):
    """What chance decides of one sample.

    Attributes:
        corner: first voxel of the patch in the case, (X, Y, Z); negative where the case is the smaller one.
        turn: (3, 3), of voxels, rotation times scaling in mm about the patch's centre; `None` for a plain crop.
        flips: spatial axes that are mirrored.
        changes: of intensities, of those in `INTENSITIES` that happen.
        noise: the generator of the noise.
    """

    corner: NDArray[np.int64]
    turn: NDArray[np.float64] | None
    flips: tuple[int, ...]
    changes: dict[str, float]
    noise: RandomState


class _Prepared(NamedTuple):
    """A case: image float32 (C, X, Y, Z), label uint8 (1, X, Y, Z), flat places of labelled voxels."""

    image: Tensor
    label: Tensor
    foreground: NDArray[np.int64]


class TrainingSamples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random training patches, item `i` being a pure function of (seed, step, index in the batch).

    Item `i` belongs to step `first_step + i // batch_size`, so a run resumed at a step goes on with
    the samples that the uninterrupted run would have seen. Cases come in a new random order each
    time all have been seen. Two patches of three are centred on a random foreground voxel, as far
    as the case reaches; a case smaller than the patch lies anywhere in it. What is outside of the
    scan is 0, the mean of z-scores (and where CT's windows from 0 to 1 begin), as in MONAI's
    sliding-window inference.

    With `augment`: rotation up to 15 degrees about each axis and scaling by 0.85 to 1.15 (half of
    the samples, in one resampling), mirroring along the entry's `flip_axes`, and intensity scale,
    shift, gamma and noise.

    Args:
        dataset: its cases.
        case_ids: those to draw from, such as `dataset.split(0).train`.
        patch_size: voxels, (X, Y, Z).
        batch_size: samples a step.
        steps: number of steps; the length is `steps * batch_size`.
        seed: non-negative integer.
        augment: False for plain crops.
        augmentation: what `augment` changes besides mirroring.
        first_step: step that item 0 belongs to.
        device: where all cases stay and samples are made, if the cases take less than `STAYING`. Else, and with
            `None`, samples are made on the CPU and a case is read when its turn comes. A GPU draws the noise itself:
            the same standard deviation, other values.

    Attributes:
        staying: the cases on the device; `None` where none stays.

    Returns:
        Each item: `image` float32 (C, *patch_size), `label` int64 (1, *patch_size).
    """

    def __init__(
        self,
        dataset: Dataset,
        case_ids: Sequence[str],
        patch_size: Sequence[int],
        batch_size: int,
        steps: int,
        seed: int,
        augment: bool = True,
        first_step: int = 0,
        device: torch.device | None = None,
        augmentation: Augmentation = OURS,
    ) -> None:
        if not case_ids or len(patch_size) != 3:
            raise ValueError(f"expected cases and 3 patch sizes, got {case_ids!r}, {patch_size!r}")
        self.dataset = dataset
        self.cases = [
            (case, dataset.prepared_at(case)) for case in map(dataset.__getitem__, case_ids)
        ]
        for case, place in self.cases:
            if not place.is_file():
                dataset.prepare(case, place)
        self.checked: set[Path] = set()  # by this process; each time would outlast a sample
        self.patch_size = tuple(patch_size)
        self.batch_size, self.steps, self.first_step = batch_size, steps, first_step
        self.seed = seed
        self.augmentation = augmentation if augment else None
        # Generators of MONAI's kind, seeded for each sample: to make one takes ten times as long.
        self.random, self.stream = RandomState(0), RandomState(0)
        self.device, self.staying = None, None
        if device and sum(place.stat().st_size for _, place in self.cases) < STAYING:
            self.device = device
            self.staying = [self._read(index) for index in range(len(self.cases))]

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        number = self.first_step * self.batch_size + item
        epoch, position = divmod(number, len(self.cases))
        index = _order(self.seed, epoch, len(self.cases))[position]
        case = self.staying[index] if self.staying else self._read(index)
        self.random.seed(_key(self.seed, 1, *divmod(number, self.batch_size)))
        entry = self.dataset.entry
        about = (self.patch_size, entry.flip_axes, entry.spacing, self.augmentation)
        draw = _draw(case, *about, self.random, self.stream)
        image, label = _make(case, draw, self.patch_size)
        return {"image": image, "label": label.long()}

    def _read(self, index: int) -> _Prepared:
        case, place = self.cases[index]
        if place not in self.checked:
            self.dataset.prepare(case, place)
            self.checked.add(place)
        arrays = load_file(place)
        foreground = np.flatnonzero(arrays["label"].numpy())
        return _Prepared(
            arrays["image"].to(self.device), arrays["label"].to(self.device), foreground
        )


def _key(*key: int) -> NDArray[np.unsignedinteger]:
    """A seed for a `RandomState` from a tuple of integers."""
    return SeedSequence(key).generate_state(4)


@lru_cache(4)
def _order(seed: int, epoch: int, number: int) -> NDArray[np.int64]:
    """The cases in the order in which an epoch sees them."""
    return RandomState(_key(seed, 0, epoch)).permutation(number)


# --- Drawing --------------------------------------------------------------------------------------


def _draw(
    case: _Prepared,
    patch: tuple[int, ...],
    flip_axes: Sequence[int],
    spacing: Sequence[float],
    augmentation: Augmentation | None,
    random: RandomState,
    stream: RandomState,
) -> Draw:
    """Draw a sample of a case; the numbers are those of MONAI's random transforms in one `Compose`.

    `random` is used up, `stream` is seeded anew and becomes the generator of the noise.
    """
    corner = _corner(case, patch, random)
    if not augmentation:
        return Draw(corner, None, (), {}, stream)
    turn = _turn(random, spacing) if random.rand() < augmentation.turned else None
    flips = tuple(axis for axis in flip_axes if random.rand() < 0.5)
    changes = {}
    for name, (probability, low, high) in augmentation.intensities.items():
        stream.seed(random.randint(1 << 32, dtype="uint32"))
        if stream.rand() < probability:
            changes[name] = stream.uniform(low, high)
    return Draw(corner, turn, flips, changes, stream)


def _corner(case: _Prepared, patch: tuple[int, ...], random: RandomState) -> NDArray[np.int64]:
    shape = case.label.shape[1:]
    room = np.array(shape) - patch
    corner = random.randint(np.minimum(room, 0), np.maximum(room, 0) + 1)
    if random.rand() < FOREGROUND and len(case.foreground):
        voxel = np.unravel_index(
            case.foreground[random.randint(len(case.foreground))], tuple(shape)
        )
        centred = np.clip(np.array(voxel) - np.array(patch) // 2, 0, np.maximum(room, 0))
        corner = np.where(room > 0, centred, corner)
    return corner


def _turn(random: RandomState, spacing: Sequence[float]) -> NDArray[np.float64]:
    """Rotation times scaling in mm, as a map of voxels of this spacing (mm)."""
    angles = [radians(random.uniform(-DEGREES, DEGREES)) for _ in range(3)]
    factors = [random.uniform(*FACTORS) for _ in range(3)]
    turn = np.asarray(create_rotate(3, angles) @ create_scale(3, factors))[:3, :3]
    return turn * np.divide.outer(spacing, spacing).T  # equal ones leave every bit


# --- Making, which waits for nothing on a GPU -----------------------------------------------------


def _make(case: _Prepared, draw: Draw, patch: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Image (C, *patch) and label (1, *patch) of a sample, on the case's device."""
    if draw.turn is None:
        image, label = (_patch(array, draw.corner, patch) for array in case[:2])
    else:
        image, label = _turned_patch(case.image, case.label, draw.corner, patch, draw.turn)
    flips = [axis + 1 for axis in draw.flips]  # 0 is the channel
    image, label = image.flip(flips), label.flip(flips)
    if (scale := draw.changes.get("scale")) is not None:
        image = image * (1 + scale)
    if (shift := draw.changes.get("shift")) is not None:
        image = image + shift
    if (gamma := draw.changes.get("gamma")) is not None:
        low = image.min()
        extent = image.max() - low
        image = ((image - low) / (extent + 1e-7)) ** gamma * extent + low
    if (deviation := draw.changes.get("noise")) is not None:
        image = image + _noise(image, deviation, draw.noise)
    return image, label


def _noise(image: Tensor, deviation: float, random: RandomState) -> Tensor:
    if image.device.type == "cpu":
        return torch.from_numpy(random.normal(0, deviation, image.shape)).to(image.dtype)
    generator = torch.Generator(image.device).manual_seed(int(random.randint(1 << 31)))
    return deviation * torch.randn(image.shape, generator=generator, device=image.device)


def _patch(array: Tensor, corner: NDArray[np.int64], patch: tuple[int, ...]) -> Tensor:
    """(C, X, Y, Z) -> (C, *patch) from `corner` on, 0 outside of the case."""
    after = corner + patch - array.shape[1:]
    pads = np.stack([-corner, after], axis=1)[::-1]  # torch names the last axis first; < 0 crops
    return F.pad(array, pads.flatten().tolist())


def _turned_patch(
    image: Tensor,
    label: Tensor,
    corner: NDArray[np.int64],
    patch: tuple[int, ...],
    turn: NDArray[np.float64],
) -> tuple[Tensor, Tensor]:
    """`_patch` of a rotated and scaled case; only the patch's voxels are resampled."""
    # Voxel x among n has torch's coordinate (2x + 1) / n - 1, and the axes come in reverse order.
    sizes, middle = np.array(image.shape[1:]), corner + (np.array(patch) - 1) / 2
    linear = turn * patch / sizes[:, None]
    theta = np.column_stack([linear[:, ::-1], (2 * middle + 1) / sizes - 1])[::-1].copy()
    there = torch.from_numpy(theta)[None].float().to(image.device, non_blocking=True)
    grid = F.affine_grid(there, [1, 1, *patch], align_corners=False)
    turned = F.grid_sample(image[None], grid, align_corners=False)[0]
    labels = F.grid_sample(label[None].float(), grid, mode="nearest", align_corners=False)[0]
    return turned, labels
