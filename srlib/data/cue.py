"""The diagnostic task `cue-004` to `cue-064`: a structure's class is set by a mark that lies far away.

A synthetic task, made to ask one question: over which distance does a network carry information? A volume holds
16 rows along its last axis, the one that the forward and the reverse scan follow. Each row has one target, a small
cube, the same for both classes, near one end of the volume; towards the middle, exactly `distance` voxels away, lies
the row's cue. A bright cue makes its target class A, a dark one class B. `cue-016-axis0` to `cue-064-axis2` are such
volumes, too, and more of them, turned so that the rows lie along that axis.

No shorter way leads to the class, by construction:

- target, place and noise know nothing of it: they are the same volumes for every distance, but for the cues' places;
- nor does a statistic of a whole map, as InstanceNorm's: every volume has as many bright cues as dark ones, also
  among the targets of either end, so that all volumes have the same histogram but for noise;
- nor does whatever lies nearer to the target than `distance - zone` along the row: no cue of a target at the same
  end does, and those of the other end's targets are drawn apart from it.

Cues of other rows lie about, so a cue's sign counts only when its row is kept apart (`nearest_mark`: what is to be had
without).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from srlib.data.virtual import write_task
from srlib.files import cached_folder

CLASSES = ("A", "B")
DISTANCES = (4, 8, 16, 32, 48, 64)
HELD_OUT = 32  # the last volumes


@dataclass(frozen=True)
class Recipe:
    """Everything a volume depends on besides its number. Lengths in voxels, background 0 +- `noise`."""

    distance: int
    volumes: int = 160
    shape: tuple[int, int, int] = (24, 24, 96)
    rows: int = 4  # along each of the first two axes
    margin: int = 4  # from the volume's end to the first place of a target
    zone: int = 12  # number of places that a target can have along its row
    target: float = 1.0
    cue: float = 2.0  # a bright one; a dark one is -2
    noise: float = 0.2
    seed: int = 301
    version: int = 1  # raise it when the code below changes what a volume looks like
    axis: int = 2  # of the volume, along which the rows lie; `shape` has them last

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels of a volume."""
        x, y, along = self.shape
        return ((along, x, y), (x, along, y), (x, y, along))[self.axis]


RECIPES = {f"cue-{distance:03d}": Recipe(distance) for distance in DISTANCES}
# More of them, so that the rule is easier to learn than the volumes by heart.
ALONG = {
    f"cue-{distance:03d}-axis{axis}": Recipe(distance, axis=axis, volumes=544)
    for axis, distance in product(range(3), (16, 32, 64))
}


class Rows(NamedTuple):
    """The rows of a volume, not turned, each array (rows^2,): place across, target's and cue's along, class 1 or 2."""

    x: NDArray[np.int64]
    y: NDArray[np.int64]
    target: NDArray[np.int64]
    cue: NDArray[np.int64]
    value: NDArray[np.int64]


def fingerprint(recipe: Recipe) -> str:
    """Short hash of the recipe."""
    parts = asdict(recipe)
    if recipe.axis == 2:  # those that were there before the others keep their names
        del parts["axis"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def draw_rows(rng: np.random.Generator, recipe: Recipe) -> Rows:
    """Places and classes. Half of the targets are near either end, half of these are of class A."""
    n, length = recipe.rows**2, recipe.shape[2]
    middles = [
        size // recipe.rows * (2 * np.arange(recipe.rows) + 1) // 2 for size in recipe.shape[:2]
    ]
    x, y = (grid.ravel() for grid in np.meshgrid(*middles, indexing="ij"))
    x, y = x + rng.integers(-1, 2, n), y + rng.integers(-1, 2, n)
    end_and_class = rng.permutation(n) % 4  # each combination equally often
    first_end, value = end_and_class < 2, 1 + end_and_class % 2
    from_end = recipe.margin + rng.integers(recipe.zone, size=n)
    target = np.where(first_end, from_end, length - 1 - from_end)
    cue = target + np.where(first_end, recipe.distance, -recipe.distance)
    return Rows(x, y, target, cue, value)


def rows_of(number: int, recipe: Recipe) -> Rows:
    """The rows of volume `number`."""
    return _draw(number, recipe)[1]


def _draw(number: int, recipe: Recipe) -> tuple[NDArray[np.float64], Rows]:
    """Noise of unit deviation (X, Y, Z) and rows; every random number of a volume is drawn here."""
    rng = np.random.default_rng([recipe.seed, number])
    return rng.standard_normal(recipe.shape), draw_rows(rng, recipe)


def make_volume(number: int, recipe: Recipe) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image and label map of volume `number`, (X, Y, Z) of `recipe.size`; the image in hundredths."""
    noise, rows = _draw(number, recipe)
    image, label = recipe.noise * noise, np.zeros(recipe.shape, np.uint8)
    for x, y, target, cue, value in zip(*rows, strict=True):
        across = slice(x - 1, x + 2), slice(y - 1, y + 2)
        label[*across, target - 1 : target + 2] = value
        image[*across, target - 1 : target + 2] += recipe.target
        # 5 voxels long: 8 x 45 cue voxels of either kind are more than the half percent that is clipped
        image[*across, cue - 2 : cue + 3] += recipe.cue if value == 1 else -recipe.cue
    hundredths = np.round(100 * image).astype(np.int16)
    return np.moveaxis(hundredths, 2, recipe.axis), np.moveaxis(label, 2, recipe.axis)


def nearest_mark(recipe: Recipe) -> float:
    """Share of targets whose nearest cue, of whatever row, has their class: a rule that knows no rows."""
    right = []
    for number in range(200):
        rows = rows_of(number, recipe)
        targets, cues = (np.stack([rows.x, rows.y, z], axis=1) for z in (rows.target, rows.cue))
        distance = np.linalg.norm(targets[:, None] - cues, axis=2)
        right.append(rows.value[distance.argmin(axis=1)] == rows.value)
    return float(np.mean(right))


def build(folder: Path, recipe: Recipe) -> Path:
    """Write the task to `folder` in the Medical Segmentation Decathlon's layout, once."""
    return cached_folder(folder, lambda partial: _write(partial, recipe))


def _write(folder: Path, recipe: Recipe) -> None:
    description = {
        "name": f"Synthetic diagnostic task: cue at {recipe.distance} voxels",
        "description": "Cubes in noise whose class a distant mark sets; no image of anything",
        "modality": {"0": "synthetic"},
        "recipe": asdict(recipe),
    }
    write_task(folder, "volume_{:03d}", _volumes(recipe), CLASSES, np.eye(4), description)


def _volumes(recipe: Recipe) -> Iterator[tuple[NDArray[np.int16], NDArray[np.uint8]]]:
    return (make_volume(number, recipe) for number in range(recipe.volumes))
