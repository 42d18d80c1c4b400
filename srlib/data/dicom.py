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

from srlib.data.scans import is_dicom
from srlib.files import DataError

OFF_PLACE = 0.01  # mm that a slice may lie off its place in a regular grid
# Endings of what lies beside slices and is none; a file without one of them is a slice, or is refused.
OTHERS = {
    *(
        ".txt",
        ".md",
        ".csv",
        ".tsv",
        ".json",
        ".xml",
        ".html",
        ".htm",
        ".pdf",
        ".rtf",
        ".doc",
        ".docx",
    ),
    *(
        ".jpg",
        ".jpeg",
        ".png",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".db",
        ".ini",
        ".inf",
        ".exe",
        ".lnk",
    ),
}
MODALITY_LUT = b"\x28\x00\x00\x30SQ"  # its tag and type, which SimpleITK does not hand on
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
    kind: (
        str  # frame of reference, and whether voxels are rescaled: of one volume's slices the same
    )
    uid: str


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
            if one.kind != first.kind or not np.allclose(
                getattr(one, name), getattr(first, name), atol=1e-4
            ):
                raise DataError(
                    f"{folder}: {one.file.name} and {first.file.name} differ in size, voxels, direction, frame of"
                    " reference or rescaling; expected parallel slices of one kind"
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
        if not slices[0].thickness:
            logger.warning("%s: one slice of unknown thickness, which is taken as 1 mm", folder)
        return normal * (slices[0].thickness or 1.0)
    gaps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    if gaps.min() < OFF_PLACE:
        one, other = slices[k := int(gaps.argmin())], slices[k + 1]
        if one.uid and one.uid == other.uid:
            raise DataError(
                f"{folder}: {one.file.name} and {other.file.name} are the same slice; remove one of them"
            )
        raise DataError(
            f"{folder}: {one.file.name} and {other.file.name} lie at one place; expected one volume,"
            f" not several, as of a cine or of echoes{CONVERT}"
        )
    if np.ptp(gaps) > max(0.01 * gaps.max(), 2 * OFF_PLACE):
        raise DataError(
            f"{folder}: its slices are {gaps.min():.3g} to {gaps.max():.3g} mm apart; expected equal steps"
        )
    # A line through all, since places may be rounded to hundredths of a mm.
    step, start = np.polyfit(np.arange(len(places)), places, 1).round(9)
    expected = start + np.arange(len(places))[:, None] * step
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
        if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
            continue
        if path.is_dir():
            nested += [path] * any(is_dicom(inner) for inner in path.iterdir() if inner.is_file())
            continue
        try:
            slices.append(_slice(path))
        except DataError as error:
            faults.append(str(error))
        except (RuntimeError, ValueError):
            if path.suffix.lower() in OTHERS and not is_dicom(path):
                others.append(path.name)
                continue
            faults.append(
                f"{path}: no slice that can be read: damaged, packed, or an object without pixels as a report;"
                " mend it or move it away"
            )
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
        of = {one.series: one.file.name for one in slices}
        named = ", ".join(f"{of[uid]} and {n - 1} more" for uid, n in series.most_common(5))
        raise DataError(
            f"{folder}: expected the files of one DICOM series, got {len(series)}: {named}"
        )
    if others:
        logger.warning("%s: not DICOM and passed over: %s", folder, ", ".join(others[:5]))
    return slices


def _slice(path: Path) -> Slice:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    about: dict[str, str] = defaultdict(str)
    about |= {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
    if reader.GetDimension() > 2 and reader.GetSize()[2:] != (1,):
        raise DataError(f"{path}: multi-frame DICOM{CONVERT}")
    if about["0008|0016"].endswith((".2.1", ".4.1")):
        raise DataError(f"{path}: enhanced DICOM{CONVERT}")
    if "MOSAIC" in about["0008|0008"].upper():
        raise DataError(f"{path}: a mosaic of slices{CONVERT}")
    if about["0028|0004"] == "MONOCHROME1":  # how to show them; GDCM inverts the voxels themselves
        raise DataError(f"{path}: voxels that are shown inverted, MONOCHROME1{CONVERT}")
    with path.open("rb") as file:
        if MODALITY_LUT in file.read(1 << 16):
            raise DataError(f"{path}: voxels whose meaning stands in a table (0028,3000){CONVERT}")
    place, directions = (_numbers(about[tag]) for tag in ("0020|0032", "0020|0037"))
    if len(place) != 3 or len(directions) != 6:
        raise DataError(
            f"{path}: states neither place nor direction, as a photograph; expected slices of a scan"
        )
    axes, pixel = directions.reshape(2, 3), _numbers(about["0028|0030"])
    if not np.isfinite([*place, *directions]).all() or not np.allclose(
        axes @ axes.T, np.eye(2), atol=1e-2
    ):
        raise DataError(
            f"{path}: its place {place.tolist()} or direction {directions.tolist()} is none;"
            " expected numbers, and two perpendicular axes of length 1"
        )
    if len(pixel) != 2 or not (np.isfinite(pixel) & (pixel > 0)).all():
        raise DataError(f"{path}: states no size of its pixels (0028,0030){CONVERT}")
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    between = _numbers(about["0018|0088"])
    if len(between) and not between[0]:
        raise DataError(f"{path}: states 0 mm between slices (0018,0088), correct it{CONVERT}")
    thickness = [*between, *_numbers(about["0018|0050"]), 0.0][0]
    steps = axes.T * pixel[::-1]  # the space between rows comes first
    size = reader.GetSize()
    kind = f"{about['0020|0052']} {'0028|1053' in about}"
    series, uid = about["0020|000e"], about["0008|0018"]
    return Slice(path, series, place, steps, (size[0], size[1]), abs(thickness), kind, uid)


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
