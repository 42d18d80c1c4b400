"""DICOM series: every file of the folder accounted for, and every slice where the affine says that it is.

GDCM, within SimpleITK, decodes the slices one by one, so that each keeps its own rescale slope. Its series reader is
not used: that takes places from the first two slices and leaves out what it cannot read. Multi-frame files and
mosaics are refused with a word on dcm2niix, which converts both.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from srlib.files import DataError

OFF_PLACE = 0.01  # mm that a slice may lie off its place in a regular grid
CONVERT = "; convert it with dcm2niix first"
logger = logging.getLogger("srlib")


class Slice(NamedTuple):
    """Header of a slice; lengths in mm, towards left, posterior and superior."""

    file: Path
    series: str
    place: NDArray[np.float64]  # (3,), of the first voxel
    steps: NDArray[np.float64]  # (3, 2), from a voxel to the next along a row and along a column
    size: tuple[int, int]
    thickness: float


def read(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Read the one series of a folder.

    Returns:
        Voxels (X, Y, Z), rescaled as each slice's header says, and the affine (4, 4) in ITK's coordinates (LPS, mm).
        It is sheared for a tilted gantry.

    Raises:
        DataError: no slice; files that cannot be used; several series; slices that are no regular grid.
    """
    slices = _slices(folder)
    first = slices[0]
    for name in ("size", "steps"):
        for one in slices:
            if not np.allclose(getattr(one, name), getattr(first, name), atol=1e-4):
                raise DataError(
                    f"{folder}: {one.file.name} and {first.file.name} differ in size, voxels or direction;"
                    " expected parallel slices of one kind"
                )
    normal = np.cross(*first.steps.T)
    normal /= np.linalg.norm(normal)
    slices.sort(key=lambda one: float(one.place @ normal))
    step = _step(folder, slices, normal)
    affine = np.eye(4)
    affine[:3] = np.column_stack([slices[0].steps, step, slices[0].place])
    return np.stack([_voxels(one.file) for one in slices], axis=-1), affine


def _step(folder: Path, slices: list[Slice], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """From a slice to the next (3,); a single one is as thick as it says."""
    places = np.array([one.place for one in slices])
    if len(slices) == 1:
        return normal * (slices[0].thickness or 1.0)
    gaps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    if gaps.min() < OFF_PLACE:
        k = int(gaps.argmin())
        raise DataError(
            f"{folder}: {slices[k].file.name} and {slices[k + 1].file.name} lie at one place; expected one volume,"
            f" not several, as of a cine or of echoes{CONVERT}"
        )
    if np.ptp(gaps) > 0.01 * gaps.max():
        raise DataError(
            f"{folder}: its slices are {gaps.min():.3g} to {gaps.max():.3g} mm apart; expected equal steps"
        )
    step = (places[-1] - places[0]) / (len(places) - 1)
    expected = places[0] + np.arange(len(places))[:, None] * step
    off = np.linalg.norm(places - expected, axis=1)
    if off.max() > OFF_PLACE:
        raise DataError(
            f"{folder}: {slices[int(off.argmax())].file.name} lies {off.max():.3g} mm off its place among the others;"
            f" expected a regular grid, to {OFF_PLACE} mm"
        )
    return step


def _slices(folder: Path) -> list[Slice]:
    """Headers of all files; `DataError` with a line for each fault, a warning for what is no DICOM."""
    slices, faults, others, nested = [], [], [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "DICOMDIR":
            continue
        if path.is_dir():
            nested += [path] * any(_is_dicom(inner) for inner in path.iterdir() if inner.is_file())
            continue
        try:
            slices.append(_slice(path))
        except DataError as error:
            faults.append(str(error))
        except (RuntimeError, ValueError):
            if _is_dicom(path) or path.suffix.lower() in (".dcm", ".ima"):
                faults.append(
                    f"{path}: no slice that can be read: damaged, or an object without pixels as a report;"
                    " mend it or move it away"
                )
            else:
                others.append(path.name)
    if nested:
        names = ", ".join(path.name for path in nested[:5])
        faults.append(
            f"{folder}: DICOM files in the folders {names}; expected one series in one folder"
        )
    if faults:
        raise DataError("\n".join(faults))
    if not slices:
        raise DataError(f"{folder}: expected the files of one DICOM series, got 0")
    series = Counter(one.series for one in slices)
    if len(series) > 1:
        raise DataError(f"{folder}: expected the files of one DICOM series, got {len(series)}")
    if others:
        logger.warning("%s: not DICOM and passed over: %s", folder, ", ".join(others[:5]))
    return slices


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _slice(path: Path) -> Slice:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    about: dict[str, str] = defaultdict(str)
    about |= {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
    if reader.GetDimension() > 2 and reader.GetSize()[2:] != (1,):
        raise DataError(f"{path}: multi-frame DICOM{CONVERT}")
    if "MOSAIC" in about["0008|0008"].upper():
        raise DataError(f"{path}: a mosaic of slices{CONVERT}")
    place, directions = (_numbers(about[tag]) for tag in ("0020|0032", "0020|0037"))
    if len(place) != 3 or len(directions) != 6:
        raise DataError(
            f"{path}: states neither place nor direction, as a photograph; expected slices of a scan"
        )
    thickness = _numbers(about["0018|0088"] or about["0018|0050"])
    steps = directions.reshape(2, 3).T * reader.GetSpacing()[:2]
    size = reader.GetSize()
    known = float(thickness[0]) if len(thickness) else 0.0
    return Slice(path, about["0020|000e"], place, steps, (size[0], size[1]), known)


def _numbers(text: str) -> NDArray[np.float64]:
    return np.array([float(part) for part in text.split("\\") if part.strip()])


def _voxels(path: Path) -> NDArray[np.float32]:
    """Voxels (X, Y) of a slice."""
    image: Any = sitk.ReadImage(str(path), imageIO="GDCMImageIO")
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise DataError(
            f"{path}: expected one number a voxel, got {image.GetPixelIDTypeAsString()}"
        )
    return np.squeeze(array).T.astype(np.float32) if array.ndim > 2 else array.T.astype(np.float32)
