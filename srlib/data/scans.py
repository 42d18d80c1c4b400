"""Scans of any supported format, and what a network is given of them.

    file or folder --read--> Scan(array, affine) --prepare--> tensor (C, X, Y, Z) on the working grid

NIfTI is read by nibabel; NRRD, MetaImage and DICOM series by SimpleITK. Whatever the file says, an
affine here takes voxel indices to mm towards right, anterior and superior (RAS). Training and
prediction call the same `prepare`, so a network never sees a scan that was prepared otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from srlib.files import DataError

if TYPE_CHECKING:
    from torch import Tensor

# torch and SimpleITK are imported where they are needed: a list of data sets needs neither, nor a training on NIfTI
# on its working grid the second.

T = TypeVar("T")
NIFTI = (".nii.gz", ".nii")
ENDINGS = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM and ITK point left, posterior and superior
# How the headers of NRRD and of MetaImage name the file of their voxels; `LIST` begins a list of them.
DATA_FILE = re.compile(
    r"^\s*(?:data ?file|ElementDataFile)\s*[=:][ \t]*([^\r\n]*)", re.MULTILINE | re.IGNORECASE
)
MOST_HEADER = 1 << 20  # bytes of a header
SAME_GRID = 1e-3  # mm (of origins) and 1 (of directions): closer affines are one grid


class Scan(NamedTuple):
    """One channel, or a label map: voxels and where they are."""

    array: NDArray[np.float32]  # (X, Y, Z)
    affine: NDArray[np.float64]  # (4, 4), voxel indices to mm, RAS


class Window(NamedTuple):
    """Normalisation on a scale with units, as CT has: clip to low..high, subtract mean, divide by deviation."""

    low: float
    high: float
    mean: float
    deviation: float


# How a channel is normalised: each scan on its own scale, likewise over its voxels that are not 0, or by a window.
Normalisation = Literal["scan", "nonzero"] | Window


# --- Reading --------------------------------------------------------------------------------------


def stem(path: Path) -> str:
    """Name of a scan's file without its ending; empty when the format is not supported."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return ""


def read(path: Path, dimensions: int = 3) -> Scan:
    """Read a file of one of `ENDINGS`, or a folder that holds one DICOM series.

    Args:
        path: file or folder.
        dimensions: 3; 4 for a NIfTI file that holds all channels of a case, array (X, Y, Z, C).

    Raises:
        DataError: cannot be read (truncated, of another format, not there), other dimensions, voxel
            sizes that are not positive, a singular affine, voxels that are NaN or infinite.
    """
    path = Path(path)
    try:
        array, affine, spacing = _load(path)
    except DataError:
        raise
    except Exception as error:  # nibabel, ITK and the decompressors know many kinds of broken file
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {reason})") from error
    if array.ndim != dimensions:
        raise DataError(f"{path}: expected {dimensions} dimensions, got shape {array.shape}")
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise DataError(f"{path}: expected voxel sizes above 0 mm, got {spacing.tolist()}")
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 1e-9):
        raise DataError(f"{path}: its affine is singular or not finite")
    if bad := array.size - np.count_nonzero(np.isfinite(array)):
        raise DataError(f"{path}: {bad} voxels are NaN or infinite")
    return Scan(array, affine)


def read_channels(paths: Sequence[Path], channels: int) -> list[Scan]:
    """The channels of one case, on one grid: a file each, or one 4D NIfTI file that holds them all.

    Raises:
        DataError: as `read`; a number of channels, a shape or an affine that is not the first's.
    """
    if len(paths) == 1 and channels > 1:
        whole = read(paths[0], dimensions=4)
        if whole.array.shape[3] != channels:
            raise DataError(f"{paths[0]}: expected {channels} channels, got {whole.array.shape[3]}")
        return [Scan(whole.array[..., channel], whole.affine) for channel in range(channels)]
    if len(paths) != channels:
        raise DataError(f"{paths[0]}: expected {channels} channels, got {len(paths)} files")
    scans = [read(path) for path in paths]
    for path, scan in zip(paths, scans, strict=True):
        require_same_grid(path, scan, paths[0], scans[0])
    return scans


def read_case(images: Sequence[Path], label: Path, channels: int) -> tuple[list[Scan], Scan]:
    """Image and label of one case, on one grid.

    Raises:
        DataError: a line for each fault: what `read_channels` and `read` refuse, a grid of the label
            that is not the image's, a channel that is constant.
    """
    faults: list[str] = []

    def tried(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except DataError as error:
            faults.append(str(error))
            return None

    scans, labels = tried(lambda: read_channels(images, channels)), tried(lambda: read(label))
    if scans and labels:
        tried(lambda: require_same_grid(label, labels, images[0], scans[0]))
    for number, scan in enumerate(scans or []):
        if np.ptp(scan.array) == 0:
            faults.append(f"{images[number % len(images)]}: every voxel has the same value")
    if faults or scans is None or labels is None:
        raise DataError("\n".join(faults))
    return scans, labels


def require_same_grid(path: Path, scan: Scan, other_path: Path, other: Scan) -> None:
    """`DataError` when two scans of a case differ in shape or affine."""
    if scan.array.shape != other.array.shape:
        raise DataError(
            f"{path}: its shape is {scan.array.shape}, that of {other_path} {other.array.shape}"
        )
    if not np.allclose(scan.affine, other.affine, atol=SAME_GRID):
        raise DataError(f"{path}: its affine is not that of {other_path}")


def _load(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Voxels (scaled as the header says), affine and the voxel sizes (mm) that the header states."""
    if path.is_dir():
        return _from_itk(_dicom_series(path))
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not stem(path):
        known = ", ".join(ENDINGS)
        raise DataError(f"{path}: expected one of {known}, or a folder with a DICOM series")
    if not path.name.lower().endswith(NIFTI):
        import SimpleITK as sitk

        _refuse_data_elsewhere(path)
        return _from_itk(sitk.ReadImage(str(path)))
    image = nib.Nifti1Image.from_filename(path)
    if image.get_data_dtype().kind not in "biuf":
        raise DataError(f"{path}: expected one number a voxel, got {image.get_data_dtype()}")
    array = np.asarray(image.dataobj).astype(np.float32)
    with nib.openers.ImageOpener(str(path)) as file:  # nibabel mends wrong voxel sizes silently
        header = nib.Nifti1Header.from_fileobj(file, check=False)
    spacing = np.asarray(header["pixdim"][1:4], np.float64)
    return array, np.asarray(image.affine, np.float64), spacing


def _refuse_data_elsewhere(path: Path) -> None:
    """`DataError` when the header of an NRRD or MetaImage file names a file of voxels that is not beside it."""
    with path.open("rb") as file:
        header = file.read(MOST_HEADER).decode("latin-1")
    if path.suffix.lower() in (
        ".nrrd",
        ".nhdr",
    ):  # a blank line ends it; MetaImage goes on after one
        header = re.split(r"\r?\n\r?\n", header, maxsplit=1)[0]
    for found in DATA_FILE.finditer(header):
        names = (
            [found[1]] if found[1].split()[:1] != ["LIST"] else header[found.end() :].split("\n")
        )
        for name in names:
            place = os.path.normpath(path.parent / name.strip())
            if not Path(place).is_relative_to(os.path.normpath(path.parent)):
                raise DataError(
                    f"{path}: its voxels are in {name.strip()}; expected a file beside it"
                )


def _from_itk(
    image: Any,
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """As `_load`, of an image in ITK's coordinates."""
    import SimpleITK as sitk

    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"expected one number a voxel, got {image.GetPixelIDTypeAsString()}")
    array = sitk.GetArrayFromImage(sitk.Cast(image, sitk.sitkFloat32)).T  # (Z, Y, X) -> (X, Y, Z)
    size, spacing = image.GetDimension(), np.array(image.GetSpacing())
    affine = np.eye(4)
    if size == 3:
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * spacing
        affine[:3, 3] = image.GetOrigin()
    return array, LPS_TO_RAS @ affine, spacing


def _dicom_series(folder: Path) -> Any:
    """The one series of a folder, its slices in the order of their places."""
    import SimpleITK as sitk

    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise DataError(f"{folder}: expected the files of one DICOM series, got {len(series)}")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    places = np.array([_slice_place(file) for file in files])
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    if len(steps) and np.ptp(steps) > 0.01 * steps.max():
        raise DataError(
            f"{folder}: its slices are {steps.min():.3g} to {steps.max():.3g} mm apart; expected equal steps"
        )
    return sitk.ReadImage(files)


def _slice_place(file: str) -> tuple[float, ...]:
    """Where the first voxel of a slice is, mm."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader.GetOrigin()


# --- What the network is given --------------------------------------------------------------------


def prepare(
    channels: Sequence[Scan], spacing: Sequence[float], normalisation: Sequence[Normalisation]
) -> tuple[Tensor, NDArray[np.float64]]:
    """Channels of one case, on one grid, as a network is given them: RAS, working spacing, normalised.

    Args:
        channels: one scan a modality, as `read_channels` gives them.
        spacing: working voxel size, mm.
        normalisation: one a channel.

    Returns:
        Image float32 (C, X, Y, Z), and the affine (4, 4) of its grid.
    """
    import torch

    scans = [regrid(scan, spacing) for scan in channels]
    arrays = [normalise(s.array, how) for s, how in zip(scans, normalisation, strict=True)]
    return torch.from_numpy(np.stack(arrays)).contiguous(), scans[0].affine


def regrid(scan: Scan, spacing: Sequence[float], labels: bool = False) -> Scan:
    """The scan with its axes nearest to right, anterior, superior, and voxels of `spacing` mm.

    Voxels that have this size already are only reordered. Otherwise they are interpolated linearly
    (labels: the nearest is taken); the first voxel's centre stays, and beyond the last one's the
    border is repeated. Memory: some copies of input and output, no grid of coordinates.
    """
    turn = orientations.io_orientation(scan.affine)
    array = orientations.apply_orientation(scan.array, turn)
    affine = scan.affine @ orientations.inv_ornt_aff(turn, scan.array.shape)
    old, new = voxel_sizes(affine), np.asarray(spacing, np.float64)
    if np.allclose(old, new, rtol=SAME_GRID):
        return Scan(array, affine)
    import SimpleITK as sitk

    shape = np.round((np.array(array.shape) - 1) * old / new).astype(int) + 1
    beyond = [(0, int(np.ceil(step))) for step in new / old / 2]
    image = sitk.GetImageFromArray(
        np.pad(array, beyond, mode="edge")
    )  # ITK names the last axis first
    image.SetSpacing(old[::-1])
    resampled = sitk.Resample(
        image,
        shape[::-1].tolist(),
        interpolator=sitk.sitkNearestNeighbor if labels else sitk.sitkLinear,
        outputSpacing=new[::-1],
    )
    affine = np.column_stack([affine[:, :3] * (new / old), affine[:, 3]])
    return Scan(sitk.GetArrayFromImage(resampled), affine)


def normalise(image: NDArray[Any], how: Normalisation = "scan") -> NDArray[np.float32]:
    """One channel on the scale that networks are given.

    `scan`: robust z-scores, clipped at its 0.5 and 99.5 percentiles, mean 0, deviation 1. MRI
    scanners' units are arbitrary (maxima from 100 to 1.7 million in one data set), so each image is
    its own scale. `nonzero`: z-scores over the voxels that are not 0, which stay 0: for images whose
    surroundings were set to 0. `Window`: see there.

    numpy in float64, since the result must not depend on the number of threads.
    """
    check_normalisation(how)
    if not isinstance(how, str):
        low, high, mean, deviation = how
        clipped = np.clip(np.asarray(image, np.float32), low, high)
        clipped -= mean
        clipped /= deviation
        return clipped
    if how == "nonzero":
        scores = np.zeros(image.shape, np.float32)
        inside = image != 0
        scores[inside] = _z_scores(np.array(image[inside], np.float64))
        return scores
    low, high = np.percentile(image, (0.5, 99.5))
    return _z_scores(np.clip(np.asarray(image, np.float64), low, high)).astype(np.float32)


def check_normalisation(how: Normalisation) -> None:
    """`ValueError` for another normalisation than `normalise` knows."""
    if isinstance(how, str) and how in ("scan", "nonzero"):
        return
    if not isinstance(how, str) and len(how) == 4 and np.isfinite(how).all() and how[3] > 0:
        return
    raise ValueError(
        f"unknown normalisation {how!r}; expected 'scan', 'nonzero' or low, high, mean and deviation"
    )


def _z_scores(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviations from the mean, in place; 0 where all values are equal."""
    deviation = values.std() if values.size else 0
    values -= values.mean() if values.size else 0
    values /= deviation if deviation > 0 else 1
    return values
