"""Masks of foreign scans: from a trained network's file alone, on each scan's own grid, in bounded memory.

    files --srlib.data.scans--> RAS, working spacing, normalised --scores_by_slab--> scores, slab by slab
          --interpolated on the scan's grid--> label map --> mask in the scan's orientation and format

The working grid differs from the scan's by a permutation and mirroring of axes and a scale along each, so
scores go from one to the other axis by axis, as soon as a slab of them is complete.

MONAI's `sliding_window_inference` holds the scores of the whole image, 8.8 GB for 14 classes of a CT with
512 x 512 x 600 voxels. Here it walks over one row of windows at a time, and the rows are blended along the remaining
axis as it blends within them. The weight of a window is a Gaussian along each axis (standard deviation an eighth of
the window), so the weights of a row factor out.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import compress, product
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from srlib import data
from srlib.data import labels, scans
from srlib.files import REFERENCE, atomic_path
from srlib.machine import device
from srlib.run.train import load_trained, network_file, restore

WHOLE = -1  # the file has no such ending
FORMATS = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}  # scan -> mask
PLANES = 8  # of the scan's grid that are interpolated at a time
# Windows: torch's fast 3D convolution on a CPU is for more than one small sample; a window takes half of the time.
AT_ONCE = 2
OVERLAP = 0.5  # of neighbouring windows, as a share of their length
Predictor = Callable[[Tensor], Tensor]


class Mask(NamedTuple):
    """A label map in the order of its scan's voxels."""

    array: NDArray[np.unsignedinteger]  # (X, Y, Z), values as in the training's files
    affine: NDArray[np.float64]  # (4, 4), voxel indices to mm, RAS


class Segmenter(NamedTuple):
    """A trained network and what it was trained for."""

    model: nn.Module
    entry: data.Entry
    patch_size: tuple[int, int, int]


def load(checkpoint: Path) -> Segmenter:
    """The trained network of a file `model.safetensors`, or of the folder of its run, on this machine's device."""
    trained = load_trained(file := network_file(checkpoint))
    return Segmenter(restore(trained, file), trained.entry, trained.config.patch_size)


def provided(dataset: str) -> Path:
    """Path of the repository's trained network `tiny` for a data set, which need not exist; `tiny.md` is its card."""
    return REFERENCE / dataset / "tiny.safetensors"


# --- What is to be segmented ----------------------------------------------------------------------


def find_cases(inputs: Sequence[Path], channels: int) -> dict[str, tuple[Path, ...]]:
    """Cases among files and folders: name -> one file a channel, or one file or DICOM folder for all.

    A folder is a DICOM series when none of its files has an ending of `srlib.data.scans.ENDINGS`. Several
    channels of a case are files that end in `_0000`, `_0001`, ... as nnU-Net's, or one 4D NIfTI file. For
    a network of one channel, a number is part of the name where no file of that name ends in `_0000`. Hidden
    files, as macOS's `._scan.nii.gz`, are passed over.

    Raises:
        srlib.files.DataError: nothing there, a channel too many or too few, two cases of one name, a folder of DICOM
            and other scans.
    """
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    named = {path: _name_and_channel(path) for path in _files(inputs)}
    known = set(named.values())
    for path, (name, number) in named.items():
        str(path).encode()  # a name that is not UTF-8 ends it here, not after hours
        if channels == 1 and number > 0 and (name, 0) not in known:
            name, number = f"{name}_{number:04d}", WHOLE
        if number in found[name]:
            raise data.DataError(f"{path} and {found[name][number]} would give one mask, {name!r}")
        found[name][number] = path
    for name, of_case in found.items():
        if sorted(of_case) not in ([WHOLE], [*range(channels)]):
            got = ", ".join(file.name for file in of_case.values())
            raise data.DataError(
                f"{name}: expected {channels} channel(s), {name}_0000 on; got {got}"
                " (four digits at the end of a name count channels)"
            )
    return {name: tuple(of[k] for k in sorted(of)) for name, of in sorted(found.items())}


def _name_and_channel(path: Path) -> tuple[str, int]:
    name = scans.stem(path) or path.resolve().name  # `.` has none
    channel = scans.CHANNEL.search(name)
    return (name[: channel.start()], int(channel[1])) if channel else (name, WHOLE)


def _files(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if not path.exists():
            raise data.DataError(f"{path}: no such file or folder")
        inside = sorted(path.iterdir()) if path.is_dir() else []
        found = [p for p in inside if scans.stem(p) and not p.name.startswith(".")]
        if found and any(scans.is_dicom(p) for p in inside if p.is_file()):
            raise data.DataError(
                f"{path}: holds DICOM files beside {found[0].name}; move one or the other away"
            )
        yield from found or [path]


def targets(
    out: Path, cases: Mapping[str, Sequence[Path]], overwrite: bool = False
) -> dict[str, Path]:
    """Path of the mask of each case: NRRD and MetaImage keep their format, all others give NIfTI.

    Args:
        out: folder.
        cases: as `find_cases` gives them.
        overwrite: masks that are there may be replaced.

    Raises:
        srlib.files.DataError: the masks would lie among the scans, or where a data set has their labels, also by
            way of a link; a mask would be one of the scans' files, or is there and may not be replaced.
    """
    found = {}
    for name, files in cases.items():
        places = [place for file in files for place in (file, file.resolve())]
        folders = {(place if place.is_dir() else place.parent).resolve() for place in places}
        folders |= {f.parent / f.name.replace("images", "labels") for f in folders}
        if out.is_dir() and out.resolve() in folders:
            raise data.DataError(f"{out}: holds the scans or their labels; choose another folder")
        suffix = files[0].suffix.lower() if files[0].is_file() else ""
        path = found[name] = out / (name + FORMATS.get(suffix, ".nii.gz"))
        # a link, or another case of its name
        if path.exists() and any(path.samefile(file) for file in files):
            raise data.DataError(f"{path}: is the scan itself; choose another folder")
    there = [str(path) for path in found.values() if os.path.lexists(path)]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise data.DataError(f"{there[0]}{more}: is there already; --overwrite replaces it")
    return found


# --- Segmenting -----------------------------------------------------------------------------------


def segment(
    segmenter: Segmenter,
    files: Sequence[Path],
    overlap: float = OVERLAP,
    flips: bool = False,
    progress: bool | None = None,
) -> Mask:
    """The label map of one case on its own grid.

    Args:
        segmenter: as `load` gives it.
        files: of the case, as `find_cases` gives them.
        overlap: of neighbouring windows.
        flips: average over all mirrorings along the axes that the data set allows.
        progress: show a bar of windows; `None` shows it in a terminal only.

    Raises:
        ValueError: mirroring is asked for, and the data set allows none.
        srlib.files.DataError: a file that cannot be used.
    """
    entry, patch_size = segmenter.entry, segmenter.patch_size
    if flips and not entry.flip_axes:
        raise ValueError(f"{entry.title}: states no axis along which cases may be mirrored")
    channels = scans.read_channels(files, entry.in_channels)
    shape, affine = channels[0].array.shape, channels[0].affine
    one_by_one = (channels.pop(0) for _ in range(len(channels)))
    image, working_affine = scans.prepare(one_by_one, entry.spacing, entry.normalisation)
    grid = OwnGrid.of(shape, np.linalg.inv(working_affine) @ affine)
    size = image.shape[1:]
    axis = int(np.argmax(size))  # the longest: the slabs across it are smallest
    bar = tqdm(
        total=window_count(size, patch_size, overlap),
        desc=files[0].name[:40],
        leave=False,
        disable=None if progress is None else not progress,
    )
    model = mirrored(segmenter.model, entry.flip_axes) if flips else segmenter.model

    def counted(windows: Tensor) -> Tensor:
        bar.update(len(windows))
        return model(windows)

    slabs = scores_by_slab(counted, image, patch_size, device(), axis, overlap)
    with bar, closing(slabs):
        found = grid.in_file_order(label_map(slabs, size, axis, grid))
    return Mask(labels.decode(found, entry), affine)


class OwnGrid(NamedTuple):
    """A scan's grid with its axes in the order and direction of the working grid's.

    Attributes:
        turn: nibabel's orientation array: for each axis of the file the working axis, and its direction.
        positions: for each working axis, where along it the scan's voxels lie, in working voxels.
    """

    turn: NDArray[np.float64]
    positions: tuple[Tensor, ...]

    @classmethod
    def of(cls, shape: Sequence[int], to_working: NDArray[np.float64]) -> OwnGrid:
        """The grid from the map (4, 4) of the file's voxel indices to working ones, one axis to one axis."""
        axes = np.abs(to_working[:3, :3]).argmax(axis=0)  # working axis of each of the file's
        steps, origin = to_working[axes, range(3)], to_working[axes, 3]
        along = {
            axis: np.sort(start + step * np.arange(n))
            for axis, step, start, n in zip(axes, steps, origin, shape, strict=True)
        }
        # Rounded, since two ways to write one grid differ in the last digits.
        positions = tuple(torch.from_numpy(along[axis].round(6)) for axis in range(3))
        return cls(np.column_stack([axes, np.sign(steps)]), positions)

    def in_file_order(self, labels: Tensor) -> NDArray[np.uint8]:
        """Labels (X, Y, Z) with axes as in the working grid -> in the order of the file's voxels."""
        axes, directions = self.turn[:, 0].astype(int), self.turn[:, 1]
        backwards = [slice(None, None, int(direction)) for direction in directions]
        return np.ascontiguousarray(labels.numpy().transpose(axes)[tuple(backwards)])


def label_map(slabs: Iterable[Tensor], size: Sequence[int], axis: int, grid: OwnGrid) -> Tensor:
    """Labels on a scan's grid (axes as in the working grid), from scores that come in slabs.

    Args:
        slabs: scores (K, X, Y, Z) in order along `axis`.
        size: of the working grid, voxels.
        axis: that the slabs follow.
        grid: the scan's.

    Returns:
        uint8 (X, Y, Z), on the CPU.
    """
    labels = torch.empty([len(along) for along in grid.positions], dtype=torch.uint8)
    across = [k for k in range(3) if k != axis]
    first = done = 0  # working plane that `held` begins with; planes of the scan that are done
    held: Tensor | None = None
    for slab in slabs:
        held = slab if held is None else torch.cat([held, slab], dim=1 + axis)
        del slab  # and with it, the memory that it shares with what is not complete yet
        last = first + held.shape[1 + axis] - 1
        complete = last == size[axis] - 1
        within = grid.positions[axis] <= last
        ready = len(within) if complete else int(within.sum())
        for start in range(done, ready, PLANES):
            planes = slice(start, min(start + PLANES, ready))
            scores = interpolate(held, axis, grid.positions[axis][planes] - first)
            for k in across:
                scores = interpolate(scores, k, grid.positions[k])
            # The indices of `argmax`, which takes three to fifteen times as long on a CPU.
            found = scores.max(0).indices
            labels.narrow(axis, start, scores.shape[1 + axis]).copy_(found)
        done, first = ready, last
        held = held.narrow(1 + axis, -1, 1).clone()  # may be needed below the next slab's first
    return labels


def interpolate(scores: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Scores (K, X, Y, Z) at positions along a spatial axis, linearly; beyond the ends the border's.

    Args:
        scores: on any device.
        axis: 0 to 2.
        positions: (n,), in voxels, on the CPU, in ascending order.
    """
    size = scores.shape[1 + axis]
    positions = positions.clamp(0, size - 1)
    lower = positions.floor().long().clamp(max=max(size - 2, 0))
    share = (positions - lower).to(scores.device, scores.dtype)
    if not share.any() and torch.equal(lower, lower[0] + torch.arange(len(lower))):
        return scores.narrow(1 + axis, int(lower[0]), len(lower))
    lower = lower.to(scores.device)
    upper = (lower + 1).clamp(max=size - 1)
    share = share.view([-1 if k == axis else 1 for k in range(3)])
    below, above = (scores.index_select(1 + axis, i) for i in (lower, upper))
    return torch.lerp(below, above, share)


# --- Windows -------------------------------------------------------------------------------------


def window_starts(size: int, window: int, overlap: float = OVERLAP) -> list[int]:
    """First voxels of the windows along an axis: evenly spaced, the last one ends with the axis."""
    last = max(size - window, 0)
    return [*range(0, last, max(int(window * (1 - overlap)), 1)), last]


def window_count(size: Sequence[int], patch_size: Sequence[int], overlap: float = OVERLAP) -> int:
    """Number of windows on an image of that size."""
    return prod(
        len(window_starts(n, window, overlap)) for n, window in zip(size, patch_size, strict=True)
    )


def scores_by_slab(
    predictor: Predictor,
    image: Tensor,
    patch_size: Sequence[int],
    device: torch.device | str = "cpu",
    axis: int = 0,
    overlap: float = OVERLAP,
) -> Generator[Tensor, None, None]:
    """Blended scores of an image, in consecutive slabs that together make up the whole.

    Memory: the scores of two slabs of one window's length, wherever `image` lies.

    Args:
        predictor: n windows (n, C, *patch_size) -> scores (n, K, *patch_size), on `device`; n is at most `AT_ONCE`.
        image: (C, X, Y, Z), float; where it is smaller than the window it is padded with zeros, its
            mean after normalisation.
        patch_size: of the window, voxels.
        device: where windows and scores are.
        axis: spatial axis (0 to 2) that is walked along.
        overlap: of neighbouring windows, from 0 to below 1.

    Yields:
        Scores (K, X, Y, Z) with as many planes along `axis` as are complete, on `device`.
    """
    size, window = image.shape[1 + axis], min(patch_size[axis], image.shape[1 + axis])
    lengths = [window if k == axis else n for k, n in enumerate(patch_size)]
    weights = [
        _gaussian(n).view([-1 if j == k else 1 for j in range(3)]).to(device)
        for k, n in enumerate(lengths)
    ]
    along = weights.pop(axis)
    within_row = prod(weights, start=torch.ones((), device=device)).expand(*patch_size)[None, None]

    first = window_starts(size, window, overlap)
    rest = rest_weights = None
    for start, following in zip(first, [*first[1:], size], strict=True):
        with torch.inference_mode():
            row = image.narrow(1 + axis, start, window)[None].to(device)
            scores = sliding_window_inference(
                row, tuple(patch_size), AT_ONCE, predictor, overlap, roi_weight_map=within_row
            )[0]
            scores *= along
            total = along.clone()
            if rest is not None and rest_weights is not None:
                scores.narrow(1 + axis, 0, rest.shape[1 + axis]).add_(rest)
                total.narrow(axis, 0, rest.shape[1 + axis]).add_(rest_weights)
            done = following - start
            rest = scores.narrow(1 + axis, done, window - done).clone()
            rest_weights = total.narrow(axis, done, window - done)
            complete = scores.narrow(1 + axis, 0, done).div_(total.narrow(axis, 0, done))
        del scores
        yield complete
        del complete


def mirrored(predictor: Predictor, axes: Sequence[int]) -> Predictor:
    """The mean of a predictor's scores over all mirrorings along spatial axes (0 to 2)."""
    choices = product((False, True), repeat=len(axes))
    subsets = [[2 + axis for axis in compress(axes, choice)] for choice in choices]

    def mean_of_mirrorings(windows: Tensor) -> Tensor:
        scores = (predictor(windows.flip(dims)).flip(dims) for dims in subsets)
        return sum(scores, start=torch.zeros((), device=windows.device)) / len(subsets)

    return mean_of_mirrorings


def _gaussian(length: int) -> Tensor:
    """Weights along a window's axis, (length,)."""
    offsets = torch.arange(length) - (length - 1) / 2
    return torch.exp(-0.5 * (offsets / (length / 8)) ** 2)


# --- Writing --------------------------------------------------------------------------------------


def write_mask(mask: Mask, like: Path, path: Path, overwrite: bool = False) -> None:
    """Write a label map with the grid of the scan `like`, in the format that `path` ends with.

    Raises:
        FileExistsError: there is such a file, perhaps only since the case was begun, and it may not be replaced.
    """
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: is there already; --overwrite replaces it")
    with atomic_path(path) as temporary:
        scans.write_labels(mask.array, mask.affine, like, temporary)
