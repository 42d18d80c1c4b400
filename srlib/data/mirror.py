"""The diagnostic task `mirror-008` to `mirror-048`: real anatomy, whose labels a mark sets that lies far away.

Half real: a volume holds four crops of the Decathlon's Hippocampus (CC BY-SA 4.0, and so are these volumes), each in
a lane of its own along the last axis, two at either end. The voxels of a hippocampus are of the classes A and B, and
which is which is a convention: A is anterior and B posterior, or the other way round. A mark in the crop's lane,
towards the middle of the volume, sets it: a bright one makes A anterior, a dark one posterior. The first voxel of the
mark lies exactly `distance` voxels from the last one of the hippocampus along the lane, and what the crop leaves
between them is noise. So the anatomy has to be told, and the mark's sign has to be carried. Voxels are of 2 mm, means
over 2 x 2 x 2 of the published ones, so that four crops and a distance fit into a volume that trains in seconds.

No shorter way leads to the convention, by construction (`srlib.data.cue` does the same with cubes):

- crops, places and noise know nothing of it;
- nor does a statistic of a whole map, as InstanceNorm's: every volume has two bright and two dark marks of one size and
  value, one of each for the crops at either end, so its histogram is the same whatever the conventions;
- nor does the nearest mark, of whatever lane: those of the crops at the other end are as near once `distance` is large.

The other mark of the same end says the opposite of the own one; it lies as far away, but for how much the crops differ
in length. The mean of a map says something only where a feature counts the marks of one lane and one end, which it has
to know by the volume's edges: of the 16 rows of `srlib.data.cue` that is hard, of four lanes less so.

Whatever knows nothing of the two marks of its end calls at most half of the voxels right in the mean: what is right
under one convention is wrong under the other, and both are equally likely. `srlib.study.statistics.cue_accuracy` gives
the share of the voxels called A or B that is called right. Those called so outside of a hippocampus are wrong, so no
network reaches 1.

The training volumes hold training cases of fold 1 of Hippocampus, the held-out volumes its held-out ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from srlib.data.virtual import write_task
from srlib.files import cached_folder

if TYPE_CHECKING:
    from srlib.data.cases import Dataset

SOURCE, FOLD = "hippocampus", 1
CLASSES = ("A", "B")
DISTANCES = (8, 24, 48)
SPACING = 2.0  # mm
HELD_OUT = 32  # the last volumes


@dataclass(frozen=True)
class Recipe:
    """Everything a volume depends on besides its number and the cases. Lengths in voxels, intensities as z-scores."""

    distance: int
    volumes: int = 544
    lane: tuple[int, int] = (24, 32)  # across; a crop has at most 22 x 30 x 24
    length: int = 80
    mark: tuple[int, int, int] = (4, 4, 4)
    value: float = 4.0  # of a bright mark; a dark one is -4
    noise: float = 0.2  # around the crops
    seed: int = 302
    version: int = 1  # raise it when the code below changes what a volume looks like
    axis = 2  # along which the lanes lie

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels of a volume: two lanes by two."""
        return 2 * self.lane[0], 2 * self.lane[1], self.length


RECIPES = {f"mirror-{distance:03d}": Recipe(distance) for distance in DISTANCES}
Crop = tuple[NDArray[np.float64], NDArray[np.uint8]]  # z-scores, labels 0 to 2, both (X, Y, Z)


class Lanes(NamedTuple):
    """What the four lanes of a volume hold, each array (4,): number of the crop, at the first end, mark is bright."""

    crop: NDArray[np.int64]
    first_end: NDArray[np.bool_]
    bright: NDArray[np.bool_]


def fingerprint(recipe: Recipe) -> str:
    """Short hash of the recipe and of Hippocampus.

    Raises:
        FileNotFoundError: Hippocampus is not here; says how to get it.
    """
    parts = [asdict(recipe), _source().fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _source() -> Dataset:
    from srlib import data  # which imports this module

    try:
        return data.open(SOURCE)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the task `mirror` is made from Hippocampus: {error}") from error


def lanes_of(number: int, recipe: Recipe, crops: int) -> Lanes:
    """The lanes of volume `number`, whose crops are drawn from so many."""
    return _draw(number, recipe, crops)[1]


def _draw(number: int, recipe: Recipe, crops: int) -> tuple[NDArray[np.float64], Lanes]:
    """Noise of unit deviation (X, Y, Z) and lanes; every random number of a volume is drawn here."""
    rng = np.random.default_rng([recipe.seed, number])
    noise = rng.standard_normal(recipe.size)
    end_and_mark = rng.permutation(4)  # each combination once
    chosen = rng.choice(crops, 4, replace=False)
    return noise, Lanes(chosen, end_and_mark < 2, end_and_mark % 2 == 0)


def make_volume(
    number: int, recipe: Recipe, crops: Sequence[Crop]
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image and label map (X, Y, Z) of volume `number`; the image in hundredths."""
    noise, lanes = _draw(number, recipe, len(crops))
    image, label = recipe.noise * noise, np.zeros(recipe.size, np.uint8)
    for lane, (crop, first_end, bright) in enumerate(zip(*lanes, strict=True)):
        scores, anatomy = crops[crop]
        middle = [(2 * at + 1) * n // 2 for n, at in zip(recipe.lane, divmod(lane, 2), strict=True)]
        begin = 0 if first_end else recipe.length - anatomy.shape[2]
        inside = _box(middle, begin, anatomy.shape)
        image[inside] = scores
        label[inside] = anatomy if bright else np.array([0, 2, 1], np.uint8)[anatomy]
        planes = begin + np.flatnonzero(anatomy.any(axis=(0, 1)))
        before, after = planes[0] - recipe.distance, planes[-1] + recipe.distance
        begin = after if first_end else before - recipe.mark[2] + 1
        image[_box(middle, begin, recipe.mark)] = recipe.value if bright else -recipe.value
    return np.round(100 * image).astype(np.int16), label


def _box(middle: Sequence[int], begin: int, size: Sequence[int]) -> tuple[slice, ...]:
    """The place of a box (X, Y, Z) with this middle across and this first plane."""
    first = [middle[0] - size[0] // 2, middle[1] - size[1] // 2, begin]
    return tuple(slice(b, b + n) for b, n in zip(first, size, strict=True))


def halve(scores: NDArray, labels: NDArray) -> Crop:
    """Image and labels (X, Y, Z) on voxels twice as large: the mean, and the most frequent label."""
    odd = [(0, size % 2) for size in labels.shape]
    blocks = [axis for size in labels.shape for axis in ((size + 1) // 2, 2)]

    def mean(array: NDArray) -> NDArray[np.float64]:
        padded = np.pad(array.astype(np.float64), odd, mode="edge")
        return padded.reshape(blocks).mean(axis=(1, 3, 5))

    shares = np.stack([mean(labels == value) for value in range(3)])
    return mean(scores), shares.argmax(axis=0).astype(np.uint8)


def build(folder: Path, recipe: Recipe) -> Path:
    """Write the task to `folder` in the Medical Segmentation Decathlon's layout, once."""
    return cached_folder(folder, lambda partial: _write(partial, recipe))


def _write(folder: Path, recipe: Recipe) -> None:
    source = _source()
    description = {
        "name": f"Diagnostic task: hippocampi whose labels a mark at {recipe.distance} voxels sets",
        "description": "Crops of MSD Task04 Hippocampus, halved in resolution, labels swapped in half of them",
        "reference": source.entry.citation,
        "licence": source.entry.licence,
        "modality": {"0": "MRI"},
        "recipe": asdict(recipe),
    }
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    write_task(folder, "volume_{:03d}", _volumes(source, recipe), CLASSES, affine, description)


def _volumes(
    source: Dataset, recipe: Recipe
) -> Iterator[tuple[NDArray[np.int16], NDArray[np.uint8]]]:
    training, held_out = ([_crop(source, i) for i in ids] for ids in source.split(FOLD))
    for number in range(recipe.volumes):
        yield make_volume(
            number, recipe, training if number < recipe.volumes - HELD_OUT else held_out
        )


def _crop(source: Dataset, case_id: str) -> Crop:
    case = source.load(case_id)
    return halve(case["image"][0].numpy(), case["label"][0].numpy())
