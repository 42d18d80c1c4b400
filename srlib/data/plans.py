"""Plans: what the catalogue would say of a folder, found out from its cases, and the patch size for it.

| what | from |
|---|---|
| channels, classes | `dataset.json`; without it one channel a file, and a class for each label value that occurs |
| working voxel size | the median over the cases, along each axis after turning to RAS |
| normalisation | stated CT: clipped at percentiles 0.5 and 99.5 of the foreground, z-scores; else each scan alone |
| patch size | the median size of a case, made smaller until a training step fits the memory that is stated |
| mirroring | none: whether a mirrored case is a possible case cannot be seen in files |

A plan reads every labelled case once, held-out ones too, of which sizes and CT's four numbers are taken.
It is kept in the cache until a file of the folder or `srlib.files.RECIPE` changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from srlib import files
from srlib.data.catalog import Entry, check_classes, tuples
from srlib.data.folders import Case, Contents, standard
from srlib.data.labels import values_in
from srlib.data.scans import Window, orientation, read_case
from srlib.files import RECIPE, DataError, cache_dir, slug

T = TypeVar("T")
BATCH = 2  # patches of the training step that a patch size is planned for
SMALLEST_PATCH, STEP = 40, 8  # voxels; the network's minimum is 33 along one axis
FAR = 3.0  # times the median voxel size; a case beyond is named
VOXELS_A_CASE = 2_000  # of the foreground, that intensities are taken from
WATCHED = (".", "dataset.json", "imagesTr", "labelsTr", "images", "labels", "RawData/Training/img")


class Measured(NamedTuple):
    """Measurements of a case."""

    id: str
    shape: NDArray[np.int64]  # voxels along R, A, S
    spacing: NDArray[np.float64]  # mm along R, A, S
    values: list[int]  # that its label holds
    foreground: NDArray[np.float32]  # intensities (channels, n)


@dataclass(frozen=True)
class Plan:
    """A folder's entry, and what to say of how it came about."""

    entry: Entry
    summary: tuple[str, ...]


def load(folder: Path) -> Plan:
    """The folder's plan: the one in the cache while its files are as they were, else a new one.

    Within a process it is looked for again only when files came or left.

    Args:
        folder: in the layout `standard` of `srlib.data.folders`.

    Raises:
        DataError: one line for each fault of a case; fewer than two cases; a class that none has.
    """
    return _loaded(folder, changed(folder))


def changed(folder: Path) -> tuple[int, ...]:
    """Times at which files came into a folder or left it, or its `dataset.json` was written."""
    places = [folder / name for name in WATCHED]
    return tuple(place.stat().st_mtime_ns for place in places if place.exists())


@lru_cache(maxsize=8)
def _loaded(folder: Path, _changed: tuple[int, ...]) -> Plan:
    contents = standard(folder)
    kept = files.cached_json(_file(folder, contents), lambda: asdict(_made(folder, contents)))
    return Plan(Entry(**tuples(kept["entry"])), tuple(kept["summary"]))


def _made(folder: Path, contents: Contents) -> Plan:
    check_classes(str(folder), tuple(contents.classes), tuple(contents.classes.values()))
    if len(contents.cases) < 2:
        raise DataError(f"{folder}: expected two cases or more, one to train and one to test")
    channels = len(contents.modalities) or len(contents.cases[0].images)
    known = {v: name for name, of in contents.classes.items() for v in of} or None
    measured, faults = [], []
    for case in contents.cases:
        try:
            measured.append(_measure(case, channels, known))
        except DataError as error:
            faults += str(error).splitlines()
    if faults:
        raise DataError("\n".join([f"{folder}, {len(faults)} fault(s):", *faults]))
    return _plan(folder, contents, measured)


def _measure(case: Case, channels: int, known: dict[int, str] | None) -> Measured:
    scans, label = read_case(case.images, case.label, channels)
    values = values_in(case.label, label, known)
    axes = orientation(label.affine)[:, 0].astype(int)  # of each axis of the file
    shape, spacing = np.empty(3, np.int64), np.empty(3)
    shape[axes], spacing[axes] = label.array.shape, voxel_sizes(label.affine)
    inside = np.stack([scan.array[label.array > 0] for scan in scans])
    some = inside[:, :: max(1, inside.shape[1] // VOXELS_A_CASE)]
    return Measured(case.id, shape, spacing, values, some)


def _plan(folder: Path, contents: Contents, measured: list[Measured]) -> Plan:
    occurring = sorted({value for case in measured for value in case.values})
    classes = contents.classes or {f"label {value}": (value,) for value in occurring}
    absent = [name for name, of in classes.items() if not set(of) & set(occurring)]
    if absent or not classes:
        raise DataError(f"{folder}: no case has {', '.join(absent) or 'a label other than 0'}")
    foreground = np.concatenate([case.foreground for case in measured], axis=1)
    modalities = contents.modalities or tuple(f"channel {k}" for k in range(len(foreground)))
    median = np.median([case.spacing for case in measured], axis=0)
    spacing = _three(float(f"{size:.4g}") for size in median)
    size = np.median([case.shape * case.spacing for case in measured], axis=0) / spacing
    entry = Entry(
        name=str(folder),
        title=f"folder {folder.name}",
        task=", ".join(classes),
        modalities=modalities,
        classes=tuple(classes),
        spacing=spacing,
        licence="its owner's",
        citation="",
        source=str(folder),
        how_to_get=f"put it back at {folder}",
        flip_axes=(),
        nsd_tolerance=max(spacing),
        folder=str(folder),
        normalisation=tuple(
            _window(f"{folder}: channel {name}", values) if "CT" in name.upper().split() else "scan"
            for name, values in zip(modalities, foreground, strict=True)
        ),
        label_values=tuple(classes.values()),
        median_size=_three(size.tolist()),
    )
    voxels = f"working voxels of {_times(spacing)} mm, the median; a median case has {_times(size.round())}"
    return Plan(entry, (*_said(entry, measured), *_spread(measured, spacing), voxels))


def _spread(measured: list[Measured], median: Sequence[float]) -> list[str]:
    """Say how far the voxel sizes of the cases lie apart, and which cases are far from the others."""
    sizes = np.array([case.spacing for case in measured])
    if np.allclose(sizes, sizes[0], rtol=1e-3):
        return []
    ranges = zip(sizes.min(axis=0), sizes.max(axis=0), strict=True)
    lines = ["voxels in the files: " + " x ".join(f"{a:.4g} .. {b:.4g}" for a, b in ranges) + " mm"]
    far = np.abs(np.log(sizes / median)).max(axis=1) > np.log(FAR)
    if far.any():
        ids = [
            f"{case.id} ({_times(case.spacing.round(4))})"
            for case, yes in zip(measured, far, strict=True)
            if yes
        ]
        lines.append(
            f"{len(ids)} cases with voxels over {FAR:g} times larger or smaller than the median; are their units right?"
            f" {', '.join(ids[:5])}"
        )
    return lines


def _said(entry: Entry, measured: list[Measured]) -> list[str]:
    """Describe cases, channels and classes."""
    empty = [case.id for case in measured if not case.values]
    lines = [f"{len(measured)} labelled cases"]
    if empty:
        lines[0] += f", {len(empty)} of them without any class: {', '.join(empty[:5])}"
    for name, how in zip(entry.modalities, entry.normalisation, strict=True):
        said = "each scan on its own scale (not stated to be CT)"
        if not isinstance(how, str):
            low, high, mean, deviation = (f"{number:.4g}" for number in how)
            said = f"CT, clipped to {low} .. {high}, less {mean}, divided by {deviation}"
        lines.append(f"channel {name}: {said}")
    for name, of in zip(entry.classes, entry.label_values, strict=True):
        count = sum(bool(set(of) & set(case.values)) for case in measured)
        lines.append(f"class {name}: label {' or '.join(map(str, of))}, in {count} cases")
    return lines


def _window(where: str, values: NDArray[np.float32]) -> Window:
    """CT's normalisation from the foreground's intensities."""
    low, high = np.percentile(values, (0.5, 99.5))
    if low == high:
        low, high = values.min(), values.max()
    if low == high:
        raise DataError(
            f"{where}: is stated to be CT, but its labelled voxels all have the value {low:g}; expected intensities"
            " that differ, or another name of the channel"
        )
    clipped = np.clip(np.asarray(values, np.float64), low, high)
    return Window(float(low), float(high), float(clipped.mean()), float(clipped.std()))


def patch_size(
    size: Sequence[float], step_memory: tuple[float, float], memory: float
) -> tuple[tuple[int, int, int], float]:
    """Choose the patch whose training step fits a memory: the whole case, or what of it does.

    The axis that reaches furthest, for the size of a case, loses voxels first, as long as the network allows it.

    Args:
        size: of a case, voxels along each axis.
        step_memory: GiB of a training step, whatever the patch and for each of its voxels, as
            `srlib.net.costs.step_memory` counts them.
        memory: GiB that a step of `BATCH` patches may take.

    Returns:
        The patch (voxels) and what its step takes (GiB).

    Raises:
        ValueError: the memory does not suffice for the smallest patch.
    """
    fixed, each = step_memory
    reach = np.asarray(size)
    patch = np.maximum(np.ceil(reach / STEP).astype(int) * STEP, SMALLEST_PATCH)

    def needed() -> float:
        return fixed + each * BATCH * float(np.prod(patch, dtype=float))

    while needed() > memory:
        if (patch <= SMALLEST_PATCH).all():
            raise ValueError(
                f"a training step takes {needed():.2g} GiB or more, allowed are {memory:g}"
            )
        patch[np.argmax(np.where(patch > SMALLEST_PATCH, patch / reach, 0))] -= STEP
    return _three(patch.tolist()), needed()


def _three(numbers: Iterable[T]) -> tuple[T, T, T]:
    x, y, z = numbers
    return x, y, z


def _times(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _file(folder: Path, contents: Contents) -> Path:
    """Path of the plan in the cache, named by the folder and the state of its files."""
    index = folder / "dataset.json"
    files = [path for case in contents.cases for path in case.files]
    states = [
        (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in (index, *files) if p.exists()
    ]
    identity = hashlib.sha256(repr((RECIPE, states)).encode()).hexdigest()[:16]
    return cache_dir("plans") / f"{slug(str(folder))}-{identity}.json"
