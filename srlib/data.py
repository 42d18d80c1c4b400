"""From a data set's files to the network: checks, cached preprocessing, seeded random samples.

    files --check--> trusted files --load_case--> RAS, working spacing, z-scores, kept on disk
          --TrainingSamples--> patches, each a pure function of (seed, step, index)

Arrays are (C, X, Y, Z), the axes pointing right, anterior and superior; where the network says
(D, H, W) it is given X, Y, Z. The registry is in `srlib.registry`; all of it can be imported here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import radians
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.utils import create_rotate, create_scale
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from srlib import checksums, images, labels
from srlib.datasets import (
    Split,
    case_ids,
    cases,
    download,
    find,
    get,
    present,
    recipe_fingerprint,
    split,
)
from srlib.images import DataError, normalise
from srlib.layouts import Case
from srlib.paths import cache_dir, slug, source_hash
from srlib.registry import REGISTRY, Dataset

__all__ = [
    "REGISTRY",
    "Case",
    "DataError",
    "Dataset",
    "Split",
    "TrainingSamples",
    "case_ids",
    "cases",
    "check",
    "download",
    "file_states",
    "find",
    "fingerprint",
    "get",
    "load_case",
    "normalise",
    "present",
    "split",
    "summary",
]

# What decides the checks, summaries and preprocessed cases that are cached here, beside the files.
CACHED_BY = ("data.py", "images.py", "labels.py", "registry.py")


# --- Facts about a whole data set, remembered until one of its files changes --------------------


def _identity(name: str, paths: Sequence[Path]) -> str:
    """Short hash of files' places, sizes and times of change, of what is expected of them and of `CACHED_BY`."""
    entry = get(name)
    parts = [f"{source_hash(CACHED_BY)} {name} {entry.classes} {entry.spacing}"]
    parts.append(f"{entry.normalisation} {entry.label_values}")
    parts += [f"{path} {_state(path)}" for path in paths]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _memory(name: str, what: str) -> Path:
    """Where a fact about the data set, as its files are now, is kept."""
    paths = [path for case in cases(name) for path in case.files]
    return cache_dir("facts") / f"{slug(name)}-{what}-{_identity(name, paths)}"


def file_states(name: str) -> dict[Path, str]:
    """Size and time of change of every file of the data set's cases."""
    return {path: _state(path) for case in cases(name) for path in case.files}


def _state(path: Path) -> str:
    state = path.stat() if path.is_file() else None
    return f"{state.st_size} {state.st_mtime_ns}" if state else "missing"


def check(name: str, fold: int | None = None) -> None:
    """Hold every case against the data set's entry, before hours are spent on it.

    Readable files of three dimensions, all of a case on one grid (shape and affine) that is regular,
    finite and not constant intensities, label values that the entry knows, each class in some case.

    Args:
        name: data set.
        fold: look for each class in this fold's training cases only.

    Raises:
        DataError: one line for each fault, naming the file and what was expected.
    """
    entry = get(name)
    found = checksums.cached_json(_memory(name, "checked"), lambda: _labels_found(name))
    ids = found if fold is None else split(name, fold).train
    seen = {label for case_id in ids for label in found[case_id]}
    absent = [c for c, of in zip(entry.classes, entry.members, strict=True) if not seen & set(of)]
    if absent:
        where = "case" if fold is None else f"training case of fold {fold}"
        raise DataError(
            f"data set {name!r}: no {where} has {', '.join(absent)}; expected each class"
        )


def _labels_found(name: str) -> dict[str, list[int]]:
    """The labels, as this library numbers them, of every case; `DataError` with a line for each fault."""
    found, faults, entry = {}, [], get(name)
    for case in cases(name):
        try:
            _, label = _read(case, entry)
            values = labels.values_in(case.label, label, labels.known_values(entry))
            found[case.id] = [entry.values.index(value) + 1 for value in values]
        except DataError as error:
            faults += str(error).splitlines()
    if faults:
        raise DataError("\n".join([f"data set {name!r}, {len(faults)} fault(s):", *faults]))
    return found


def _read(case: Case, entry: Dataset) -> tuple[list[images.Scan], images.Scan]:
    """The files of a case."""
    return images.read_case(case.images, case.label, entry.in_channels)


def fingerprint(name: str) -> str:
    """Short hash that names the data: of the decoded arrays; of a virtual one, its recipe."""
    if get(name).virtual:
        return recipe_fingerprint(name)
    return checksums.cached_json(_memory(name, "fingerprint"), lambda: _hash_arrays(name))


def _hash_arrays(name: str) -> str:
    digest, entry = hashlib.sha256(), get(name)
    for case in cases(name):
        scans, label = _read(case, entry)
        digest.update(f"{case.id} {scans[0].array.shape}".encode())
        parts: list[tuple[NDArray[Any], str]] = [(scan.array, "<f4") for scan in scans]
        parts += [(labels.encode(label.array, entry), "u1"), (scans[0].affine, "<f8")]
        for array, kind in parts:
            digest.update(array.astype(kind).tobytes())
    return digest.hexdigest()[:16]


def summary(name: str) -> pd.DataFrame:
    """One row a case: voxels and voxel size (mm) along each axis, intensities (of the first channel), volumes (ml)."""
    rows = checksums.cached_json(
        _memory(name, "summary"), lambda: [_row(case, get(name)) for case in cases(name)]
    )
    return pd.DataFrame(rows)


def _row(case: Case, entry: Dataset) -> dict[str, object]:
    scans, label = _read(case, entry)
    image, affine = scans[0]
    masks = labels.class_masks(_label_map(label, entry)[None], entry.members)[0]
    size = nib.affines.voxel_sizes(affine)
    row: dict[str, object] = {"case": case.id}
    row |= {f"voxels_{axis}": n for axis, n in zip("xyz", image.shape, strict=True)}
    row |= {f"spacing_{axis}_mm": float(s) for axis, s in zip("xyz", size, strict=True)}
    row |= {"intensity_min": float(image.min()), "intensity_max": float(image.max())}
    for of_class, mask in zip(entry.classes, masks, strict=True):
        row[f"{of_class} (ml)"] = int(mask.sum()) * float(size.prod()) / 1000
    return row


# --- The deterministic part, once a case --------------------------------------------------------


def _place(name: str, case: Case) -> Path:
    """Where a case is kept as it was preprocessed: safetensors, which can be read without running code."""
    folder = cache_dir("cases", slug(name))
    return folder / f"{case.id}-{_identity(name, case.files)}.safetensors"


def _preprocessed(name: str, case: Case, place: Path) -> dict[str, Tensor]:
    """The preprocessed case from its place, put there first where it is missing or broken.

    Raises:
        DataError: a file of the case is not the one any more that the place was named for.
    """

    def make() -> dict[str, Tensor]:
        if place != _place(name, case):
            raise DataError(f"{case.image}: it or its label has changed since this process began")
        return _prepare(case, get(name))

    tensors, _ = checksums.cached(place, make, checksums.save_tensors, checksums.load_tensors)
    return tensors


def _prepare(case: Case, entry: Dataset) -> dict[str, Tensor]:
    scans, label = _read(case, entry)
    image, affine = images.prepare(scans, entry.spacing, entry.normalisation)
    return {
        "image": image,  # (C, X, Y, Z)
        "label": _label_map(images.regrid(label, entry.spacing, labels=True), entry),
        "affine": torch.from_numpy(affine),  # (4, 4)
    }


def _label_map(label: images.Scan, entry: Dataset) -> Tensor:
    """Labels of a file as this library numbers them, uint8 (1, X, Y, Z)."""
    return torch.from_numpy(labels.encode(label.array, entry))[None]


def load_case(name: str, case_id: str) -> dict[str, Any]:
    """One preprocessed case, from the cache when its files have not changed.

    Returns:
        `image` float32 (C, X, Y, Z), robust z-scores, axes RAS, the entry's spacing; `label` int64
        (1, X, Y, Z); `affine` (4, 4) of this grid, voxels to mm; `spacing` in mm; `id`.
    """
    for case in cases(name):
        if case.id == case_id:
            tensors = _preprocessed(name, case, _place(name, case))
            spacing = tuple(map(float, nib.affines.voxel_sizes(tensors["affine"].numpy())))
            label = tensors["label"].long()
            return {**tensors, "label": label, "spacing": spacing, "id": case_id}
    raise ValueError(f"data set {name!r} has no case {case_id!r}")


# --- The random part, once a sample -------------------------------------------------------------


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
        name: data set.
        case_ids: cases to draw from, such as `split(name).train`.
        patch_size: voxels, (X, Y, Z).
        batch_size: samples a step.
        steps: number of steps; the length is `steps * batch_size`.
        seed: non-negative integer.
        augment: False for plain crops.
        first_step: step that item 0 belongs to.

    Returns:
        Each item: `image` float32 (C, *patch_size), `label` int64 (1, *patch_size).
    """

    def __init__(
        self,
        name: str,
        case_ids: Sequence[str],
        patch_size: Sequence[int],
        batch_size: int,
        steps: int,
        seed: int,
        augment: bool = True,
        first_step: int = 0,
    ) -> None:
        if not case_ids or len(patch_size) != 3:
            raise ValueError(f"expected cases and 3 patch sizes, got {case_ids!r}, {patch_size!r}")
        known = {case.id: case for case in cases(name)}
        if unknown := [i for i in case_ids if i not in known]:
            raise ValueError(f"data set {name!r} has no case {', '.join(unknown[:5])}")
        self.cases = [(name, known[i], _place(name, known[i])) for i in case_ids]
        for case in self.cases:
            if not case[-1].is_file():
                _preprocessed(*case)
        self.checked: set[Path] = (
            set()
        )  # by this process; each time would take longer than a sample
        self.patch_size = tuple(patch_size)
        self.batch_size, self.steps, self.first_step = batch_size, steps, first_step
        self.seed, self.augment, self.flip_axes = seed, augment, get(name).flip_axes
        self.intensity = Compose(
            [
                RandScaleIntensityd("image", factors=0.15, prob=0.5),
                RandShiftIntensityd("image", offsets=0.15, prob=0.5),
                RandAdjustContrastd("image", gamma=(0.7, 1.5), prob=0.3),
                RandGaussianNoised("image", std=0.1, prob=0.3),
            ]
        )

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        number = self.first_step * self.batch_size + item
        epoch, position = divmod(number, len(self.cases))
        order = _random_state(self.seed, 0, epoch).permutation(len(self.cases))
        random = _random_state(self.seed, 1, *divmod(number, self.batch_size))

        place = self.cases[order[position]][-1]
        if place not in self.checked:
            _preprocessed(*self.cases[order[position]])
            self.checked.add(place)
        case = load_file(place)
        image, label = case["image"], case["label"]
        corner = _corner(label[0], self.patch_size, random)
        if self.augment and random.rand() < 0.5:
            image, label = _turned_patch(image, label, corner, self.patch_size, random)
        else:
            image, label = (_patch(array, corner, self.patch_size) for array in (image, label))
        if self.augment:
            flips = [axis + 1 for axis in self.flip_axes if random.rand() < 0.5]  # 0 is the channel
            image, label = image.flip(flips), label.flip(flips)
            self.intensity.set_random_state(state=random)
            image = self.intensity({"image": image})["image"].as_tensor()
        return {"image": image, "label": label.long()}


def _random_state(*key: int) -> np.random.RandomState:
    """MONAI's kind of generator, seeded with a tuple of integers."""
    return np.random.RandomState(np.random.SeedSequence(key).generate_state(4))


def _corner(
    label: Tensor, patch: tuple[int, ...], random: np.random.RandomState
) -> NDArray[np.int64]:
    """First voxel of the patch in a case (X, Y, Z); negative where the case is the smaller one."""
    room = np.array(label.shape) - patch
    corner = random.randint(np.minimum(room, 0), np.maximum(room, 0) + 1)
    foreground = np.flatnonzero(label.numpy())
    if random.rand() < 2 / 3 and len(foreground):
        voxel = np.unravel_index(foreground[random.randint(len(foreground))], label.shape)
        centred = np.clip(np.array(voxel) - np.array(patch) // 2, 0, np.maximum(room, 0))
        corner = np.where(room > 0, centred, corner)
    return corner


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
    random: np.random.RandomState,
) -> tuple[Tensor, Tensor]:
    """`_patch` of a randomly rotated and scaled case; only the patch's voxels are resampled."""
    angles = [radians(random.uniform(-15, 15)) for _ in range(3)]
    factors = [random.uniform(0.85, 1.15) for _ in range(3)]
    turn = np.asarray(create_rotate(3, angles) @ create_scale(3, factors))[:3, :3]
    # Voxel x among n has torch's coordinate (2x + 1) / n - 1, and the axes come in reverse order.
    sizes, middle = np.array(image.shape[1:]), corner + (np.array(patch) - 1) / 2
    linear = turn * patch / sizes[:, None]
    theta = np.column_stack([linear[:, ::-1], (2 * middle + 1) / sizes - 1])[::-1].copy()
    grid = F.affine_grid(torch.from_numpy(theta)[None].float(), [1, 1, *patch], align_corners=False)
    turned = F.grid_sample(image[None], grid, align_corners=False)[0]
    labels = F.grid_sample(label[None].float(), grid, mode="nearest", align_corners=False)[0]
    return turned, labels
