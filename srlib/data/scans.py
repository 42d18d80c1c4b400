"""Scans of any supported format, and what a network is given of them.

    file or folder --read--> Scan(array, affine) --prepare--> tensor (C, X, Y, Z) on the working grid

NIfTI is read by nibabel; NRRD, MetaImage and DICOM series (`srlib.data.dicom`) by SimpleITK. Whatever
the file says, an affine here takes voxel indices to mm towards right, anterior and superior (RAS).
Training and prediction call the same `prepare`, so a network never sees a scan that was prepared otherwise.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.affines import apply_affine, voxel_sizes
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
# Of their headers: what states the size of a voxel, and what right, anterior and superior are.
SIZES = re.compile(
    r"^\s*(?:spacings:(?!.*nan)|space directions:|ElementSpacing|ElementSize)",
    re.MULTILINE | re.IGNORECASE,
)
SIDES = re.compile(
    r"^\s*(?:space: *(?:(?:left|right)-|[lr][ap]s)|TransformMatrix|Orientation|Rotation)",
    re.MULTILINE | re.IGNORECASE,
)
MOST_HEADER = 1 << 20  # bytes of a header
SAME_GRID = 1e-3  # mm (of origins) and 1 (of directions): closer affines are one grid
SAME_SIZE = 1e-2  # share by which two statements of a voxel's size may differ
UNITS = {
    0: 1.0,
    1: 1e3,
    2: 1.0,
    3: 1e-3,
}  # mm in a unit of NIfTI: not stated (as mm), m, mm, micrometre
CHANNEL = re.compile(r"_(\d{4})$")  # the number at the end of a file's name, as nnU-Net's
UNKNOWN_SIDES = "%s: states no orientation (%s): left and right may be exchanged, and other axes"
METAIMAGE_BYTES = {  # of a voxel
    **dict.fromkeys(("CHAR", "UCHAR"), 1),
    **dict.fromkeys(("SHORT", "USHORT"), 2),
    **dict.fromkeys(("INT", "UINT", "LONG", "ULONG", "FLOAT"), 4),
    **dict.fromkeys(("LONG_LONG", "ULONG_LONG", "DOUBLE"), 8),
}
SCALING = (("Slope", 1), ("Offset", 0))  # that MetaImage may state, and what does nothing
GEOMETRY = (  # of a NIfTI header
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
logger = logging.getLogger("srlib")


class Scan(NamedTuple):
    """One channel, or a label map: voxels and where they are."""

    array: NDArray[Any]  # (X, Y, Z); float32, of labels as they are stored
    affine: NDArray[np.float64]  # (4, 4), voxel indices to mm, RAS


class Window(NamedTuple):
    """Normalisation on a scale with units, as CT has: clip to low..high, subtract mean, divide by deviation."""

    low: float
    high: float
    mean: float
    deviation: float


# Normalisation of a channel: each scan on its own scale, the same over its voxels that are not 0, or by a window.
Normalisation = Literal["scan", "nonzero"] | Window


# --- Reading --------------------------------------------------------------------------------------


def stem(path: Path) -> str:
    """Name of a scan's file without its ending; empty when the format is not supported."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return ""


def is_dicom(path: Path) -> bool:
    """Tell a DICOM file by its preamble."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read(path: Path, dimensions: int = 3, labels: bool = False) -> Scan:
    """Read a file of one of `ENDINGS`, or a folder that holds one DICOM series.

    Args:
        path: file or folder.
        dimensions: 3; 4 for a NIfTI file that holds all channels of a case, array (X, Y, Z, C). Further axes of
            length 1 are dropped.
        labels: keep the type of the voxels, so that no label value is rounded.

    Raises:
        DataError: cannot be read (truncated, of another format, not there), other dimensions, no voxels, voxel
            sizes that are not positive or that contradict the affine, a singular affine, voxels that are NaN or
            infinite.
    """
    path = Path(path)
    try:
        array, affine, spacing = _load(path)
    except DataError:
        raise
    except Exception as error:  # nibabel, ITK and the decompressors know many kinds of broken file
        said = [line for line in str(error).splitlines() if not line.startswith("Reason:")]
        reason = (said or ["no reason given"])[-1].strip()
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {reason})") from error
    while array.ndim > dimensions and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != dimensions:
        raise DataError(f"{path}: expected {dimensions} dimensions, got shape {array.shape}")
    if not array.size:
        raise DataError(f"{path}: holds no voxel, its shape is {array.shape}")
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise DataError(f"{path}: expected voxel sizes above 0 mm, got {spacing.tolist()}")
    sizes = voxel_sizes(affine)
    if not (np.isfinite(affine).all() and sizes.all()):
        raise DataError(f"{path}: its affine is singular or not finite")
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise DataError(f"{path}: its affine is singular or not finite")
    if not np.allclose(sizes, spacing, rtol=SAME_SIZE):
        named = " (sform or qform)" if path.name.lower().endswith(NIFTI) else ""
        stated, of_affine = (" x ".join(f"{x:.5g}" for x in xs) for xs in (spacing, sizes))
        raise DataError(
            f"{path}: states voxels of {stated} mm, but its affine{named} has {of_affine} mm;"
            " correct the one that is wrong"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # ITK takes no other
    if not labels:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is told below
            array = np.asarray(array, np.float32)
    if bad := array.size - np.count_nonzero(np.isfinite(array)):
        raise DataError(f"{path}: {bad} voxels are NaN or infinite")
    return Scan(array, affine)


def read_channels(paths: Sequence[Path], channels: int) -> list[Scan]:
    """The channels of one case, on one grid: a file each, or one 4D NIfTI file that holds them all.

    Raises:
        DataError: as `read`; a number of channels, a shape or an affine that is not the first's.
    """
    if len(paths) != channels and (missing := _missing(paths, channels)):
        raise DataError(f"{paths[0]}: expected {channels} channels; {', '.join(missing)} missing")
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
    return _on_one_grid(scans)


def _missing(paths: Sequence[Path], channels: int) -> list[str]:
    """Names of the channels' files that are not there, where those that are have numbers."""
    found = [CHANNEL.search(stem(path)) for path in paths]
    if not all(found) or len(paths) > channels:
        return []
    here = {int(number[1]) for number in found if number}
    name = CHANNEL.sub("", stem(paths[0]))
    return [f"{name}_{k:04d}" for k in range(channels) if k not in here]


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

    scans, labels = (
        tried(lambda: read_channels(images, channels)),
        tried(lambda: read(label, labels=True)),
    )
    if scans and labels:
        tried(lambda: require_same_grid(label, labels, images[0], scans[0]))
    for number, scan in enumerate(scans or []):
        if np.ptp(scan.array) == 0:
            faults.append(f"{images[number % len(images)]}: every voxel has the same value")
    if faults or scans is None or labels is None:
        raise DataError("\n".join(faults))
    on_one_grid = _on_one_grid([*scans, labels])
    return on_one_grid[:-1], on_one_grid[-1]


def _on_one_grid(scans: Sequence[Scan]) -> list[Scan]:
    """Scans of one grid with the first one's affine; by its own last digits each could be turned another way."""
    return [Scan(scan.array, scans[0].affine) for scan in scans]


def require_same_grid(path: Path, scan: Scan, other_path: Path, other: Scan) -> None:
    """`DataError` when two scans of a case differ in shape or affine."""
    if scan.array.shape != other.array.shape:
        raise DataError(
            f"{path}: its shape is {scan.array.shape}, that of {other_path} {other.array.shape}"
        )
    if not np.allclose(scan.affine, other.affine, atol=SAME_GRID):
        off = apart(scan.array.shape, scan.affine, other.affine)
        raise DataError(
            f"{path}: its affine is not that of {other_path}: voxels lie up to {off:.3g} mm apart"
        )


def apart(shape: Sequence[int], affine: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Greatest distance (mm) between the places that two affines give one voxel of a grid of this shape."""
    corners = np.array(list(itertools.product(*[(0, n - 1) for n in shape[:3]])))
    distances = apply_affine(affine, corners) - apply_affine(other, corners)
    return float(np.linalg.norm(distances, axis=1).max())


def _load(path: Path) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """Voxels (scaled as the header says), affine and the voxel sizes (mm) that the header states."""
    if path.is_dir():
        from srlib.data import dicom

        slices, affine = dicom.read(path)
        return slices, LPS_TO_RAS @ affine, voxel_sizes(affine)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not stem(path):
        known = ", ".join(ENDINGS)
        raise DataError(f"{path}: expected one of {known}, or a folder with a DICOM series")
    if path.name.lower().endswith(NIFTI):
        return _from_nifti(path)
    import SimpleITK as sitk

    _check_header(path)
    return _from_itk(sitk.ReadImage(str(path), imageIO=_itk_reader(path)))


def _itk_reader(path: Path) -> str:
    """Name of ITK's reader, which by itself knows no ending in capitals."""
    return "NrrdImageIO" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImageIO"


def _from_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """Load NIfTI-1 or NIfTI-2, compressed or not, whatever the ending says; returns as `_load`."""
    with _opened(path) as file:
        image = _nifti_class(file).from_stream(file)
        if image.get_data_dtype().kind not in "biuf":
            raise DataError(f"{path}: expected one number a voxel, got {image.get_data_dtype()}")
        array = np.asarray(image.dataobj)
        expected = image.dataobj.offset + prod(image.shape) * image.get_data_dtype().itemsize
        found = file.seek(0, os.SEEK_END)  # where gzip compares its checksum
        if found != expected and array.size:
            raise DataError(
                f"{path}: its voxels are not whole; expected {expected} bytes in all, found {found}"
            )
        file.seek(0)
        header = type(image.header).from_fileobj(file, check=False)  # nibabel mends sizes silently
    unit = UNITS.get(int(header["xyzt_units"]) & 7)
    if unit is None:
        raise DataError(f"{path}: an unknown unit of length, xyzt_units {header['xyzt_units']}")
    affine = np.asarray(image.affine, np.float64)
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if sform and qform and not header.get_sform().any(axis=1)[:3].all():
        affine = np.asarray(image.get_qform(), np.float64)  # the other one is empty
    elif sform and qform and header["sform_code"] == header["qform_code"]:
        with suppress(ValueError):  # a qform that is no rotation says nothing
            off = unit * apart(array.shape, header.get_sform(), image.get_qform())
            if off > unit * voxel_sizes(affine).min() / 2:
                logger.warning(
                    "%s: its qform lies up to %.3g mm off its sform, which is taken", path, off
                )
    elif not (sform or qform):
        logger.warning(UNKNOWN_SIDES, path, "sform_code and qform_code are 0")
    spacing = np.asarray(header["pixdim"][1:4], np.float64)
    return array, np.diag([unit, unit, unit, 1]) @ affine, unit * spacing


def _opened(path: Path) -> Any:
    """A file of NIfTI for reading, compressed or not."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


def _nifti_class(file: Any) -> Any:
    start = file.read(24)
    file.seek(0)
    for size, kind in ((348, nib.Nifti1Image), (540, nib.Nifti2Image)):  # bytes of the header
        if start[:4] in (size.to_bytes(4, "little"), size.to_bytes(4, "big")):
            return kind
    raise ValueError(f"begins with {start!r}, as NIfTI does not")


def write_labels(
    array: NDArray[np.unsignedinteger], affine: NDArray[np.float64], like: Path, path: Path
) -> None:
    """Write a label map on the grid of a scan, in the format that `path` ends with.

    Of the scan's header it takes the geometry alone: no description, extension or intent, which may name a patient.

    Args:
        array: labels (X, Y, Z), in the order of the scan's voxels.
        affine: (4, 4) of the scan, as `read` gives it.
        like: the scan, a file or a folder of DICOM.
        path: where it goes.
    """
    if not path.name.endswith(NIFTI):
        import SimpleITK as sitk

        reader = sitk.ImageFileReader()
        reader.SetImageIO(_itk_reader(like))
        reader.SetFileName(str(like))
        reader.ReadImageInformation()
        image = sitk.GetImageFromArray(array.T)  # ITK names the last axis first
        axes = np.reshape(reader.GetDirection(), (reader.GetDimension(), -1))[:3, :3]
        image.SetOrigin(reader.GetOrigin()[:3])
        image.SetSpacing(reader.GetSpacing()[:3])
        image.SetDirection(axes.ravel())
        sitk.WriteImage(image, str(path), useCompression=True)
        return
    if like.is_dir():  # DICOM: the scanner's coordinates, in mm
        nifti = nib.Nifti1Image(array, affine)
        nifti.set_sform(affine, "scanner")
        axes = affine[:3, :3] / voxel_sizes(affine)
        sheared = not np.allclose(axes.T @ axes, np.eye(3), atol=1e-4)
        # A qform cannot be sheared, and another grid beside the true one is worse than none.
        nifti.set_qform(None if sheared else affine, 0 if sheared else 1)
        nifti.header.set_xyzt_units("mm")
    else:
        with _opened(like) as file:
            kind = _nifti_class(file)
            source = kind.header_class.from_fileobj(file)
        header = kind.header_class()
        for field in GEOMETRY:
            header[field] = source[field]
        nifti = kind(array, None, header, dtype=array.dtype)
    nib.save(nifti, path)


def _check_header(path: Path) -> None:
    """Refuse an NRRD or MetaImage file for what ITK would read without a word.

    Raises:
        DataError: voxels that are not there, not beside it, or not all of them; lengths in another unit than mm; a
            negative voxel size of MetaImage.
    """
    with path.open("rb") as file:
        header = file.read(MOST_HEADER).decode("latin-1")
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    if not header.startswith("NRRD") if nrrd else "ElementDataFile" not in header:
        start = header[:24].encode("latin-1")
        raise ValueError(f"begins with {start!r}, as NRRD and MetaImage do not")
    if nrrd:  # a blank line ends it; MetaImage goes on
        header = re.split(r"\r?\n\r?\n", header, maxsplit=1)[0]
    folder = Path(os.path.normpath(path.absolute().parent))
    for found in DATA_FILE.finditer(header):
        listed = found[1].split()[:1] == ["LIST"]
        for line in header[found.end() :].splitlines() if listed else [found[1]]:
            name = line.strip()
            place = Path(os.path.normpath(folder / name))
            if not place.is_relative_to(folder):
                raise DataError(f"{path}: its voxels are in {name}; expected a file beside it")
            if name and name.upper() != "LOCAL" and "%" not in name and not place.is_file():
                raise DataError(f"{path}: its voxels are in {name}, which is not there")
    units = re.findall(r"(?m)^(?:space units:|DistanceUnits *=)\s*(.*?)\s*$", header)
    if units and set(re.findall(r"\w+", units[0])) - {"mm", "millimeter", "millimeters"}:
        raise DataError(f"{path}: lengths in {units[0]}; expected mm")
    if not SIZES.search(header):
        raise DataError(
            f"{path}: states no voxel sizes (spacings, space directions, ElementSpacing)"
        )
    if not SIDES.search(header):
        logger.warning(UNKNOWN_SIDES, path, "no anatomical space or matrix")
    if not nrrd:
        _check_metaimage(path, header)


def _check_metaimage(path: Path, header: str) -> None:
    """`DataError` for voxels that are not whole, which MetaIO fills with whatever memory held."""
    data_file = re.search(r"(?m)^\s*ElementDataFile\s*[=:][ \t]*([^\r\n]*)\r?\n?", header)
    if not data_file:
        return  # ITK says what is wrong
    pairs = re.findall(r"(?m)^\s*(\w+)\s*[=:]\s*(.*?)\s*$", header[: data_file.start()])
    stated = defaultdict(str, pairs)
    name, *numbers = data_file[1].split() or [""]
    local, compressed = name.upper() == "LOCAL", stated["CompressedData"][:1] in ("T", "t", "1")
    try:
        sizes = [int(size) for size in stated["DimSize"].split()]
        width = METAIMAGE_BYTES[stated["ElementType"].removeprefix("MET_").removesuffix("_ARRAY")]
        width *= int(stated["ElementNumberOfChannels"] or 1)
        skipped = int(stated["HeaderSize"] or 0)
        spacing = [float(size) for size in stated["ElementSpacing"].split()]
        slope, offset = (float(stated[f"ElementToIntensityFunction{k}"] or d) for k, d in SCALING)
        first, last, step = (
            (int(number) for number in (*numbers, 1)[:3]) if "%" in name else (0, 0, 1)
        )
    except (KeyError, ValueError):
        return
    if min(spacing, default=1) <= 0:
        raise DataError(f"{path}: states voxels of {stated['ElementSpacing']} mm; expected above 0")
    misread = {
        "voxels as text": stated["BinaryData"][:1] in ("F", "f", "0"),
        "a function of intensities": (slope, offset) != (1, 0),
        "a HeaderSize, and voxels in the same file": local and skipped > 0,
        "a list of files without a new line at its end": name == "LIST" and header[-1:] != "\n",
        "no CompressedDataSize": local and compressed and stated["CompressedDataSize"] in ("", "0"),
    }
    for what, there in misread.items():
        if there:
            raise DataError(f"{path}: has {what}, which ITK misreads; write it otherwise")
    files = [path if local else path.parent / data_file[1].strip()]
    if "%" in name:
        files = [path.parent / (name % k) for k in range(first, last + 1, step)]
    elif name == "LIST":
        names = filter(None, map(str.strip, header[data_file.end() :].splitlines()))
        files = [path.parent / name for name in names]
    pieces = 1 if len(files) == 1 else sizes[-1]
    expected = prod(sizes) * width // max(pieces, 1)
    if len(files) != pieces:
        raise DataError(
            f"{path}: its voxels are not whole; expected {pieces} files, found {len(files)}"
        )
    for file in files:
        found = _voxel_bytes(file, data_file.end() if local else skipped, compressed)
        if found != expected and (skipped >= 0 or found < expected):
            named = f" in {file.name}" if pieces > 1 else ""
            raise DataError(
                f"{path}: its voxels{named} are not whole; expected {expected}, found {found}"
            )


def _voxel_bytes(file: Path, skipped: int, compressed: bool) -> int:
    """Count bytes of voxels in a file, unpacked; 0 where it is no whole stream."""
    if not compressed:
        return file.stat().st_size - max(skipped, 0)
    unpack = zlib.decompressobj(47)
    with suppress(zlib.error):
        found = len(unpack.decompress(file.read_bytes()[max(skipped, 0) :]))
        return found if unpack.eof else 0
    return 0


def _from_itk(image: Any) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """Turn an image of ITK into what `_load` returns."""
    import SimpleITK as sitk

    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"expected one number a voxel, got {image.GetPixelIDTypeAsString()}")
    array = sitk.GetArrayFromImage(image).T  # (Z, Y, X) -> (X, Y, Z)
    size, spacing = image.GetDimension(), np.array(image.GetSpacing())[:3]
    affine = np.eye(4)
    if size >= 3:
        affine[:3, :3] = np.reshape(image.GetDirection(), (size, size))[:3, :3] * spacing
        affine[:3, 3] = image.GetOrigin()[:3]
    return array, LPS_TO_RAS @ affine, spacing


# --- What the network is given --------------------------------------------------------------------


def prepare(
    channels: Iterable[Scan], spacing: Sequence[float], normalisation: Sequence[Normalisation]
) -> tuple[Tensor, NDArray[np.float64]]:
    """Channels of one case, on one grid, as a network is given them: RAS, working spacing, normalised.

    Args:
        channels: one scan a modality, as `read_channels` gives them; an iterator that lets go of them saves memory.
        spacing: working voxel size, mm.
        normalisation: one a channel.

    Returns:
        Image float32 (C, X, Y, Z), and the affine (4, 4) of its grid.

    Raises:
        ValueError: as many normalisations as channels were expected; one that is not known.
    """
    import torch

    remaining, arrays = iter(channels), []
    try:
        for how in normalisation:  # `zip` would hold on to a scan
            array, affine = regrid(next(remaining), spacing)
            arrays.append(normalise(array, how)[None])
    except StopIteration:
        raise ValueError(f"{len(normalisation)} normalisations of fewer channels") from None
    if next(remaining, None) is not None:
        raise ValueError(f"{len(normalisation)} normalisations of more channels")
    image = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    return torch.from_numpy(np.ascontiguousarray(image)), affine


def regrid(scan: Scan, spacing: Sequence[float], labels: bool = False) -> Scan:
    """The scan with its axes nearest to right, anterior, superior, and voxels of `spacing` mm.

    Voxels that have this size already are only reordered. Otherwise they are interpolated linearly
    (labels: the nearest is taken); the first voxel's centre stays, and beyond the last one's the
    border is repeated. Memory: some copies of input and output, no grid of coordinates.
    """
    turn = orientation(scan.affine)
    array = orientations.apply_orientation(scan.array, turn)
    affine = scan.affine @ orientations.inv_ornt_aff(turn, scan.array.shape)
    old, new = voxel_sizes(affine), np.asarray(spacing, np.float64)
    if np.allclose(old, new, rtol=SAME_GRID):
        return Scan(array, affine)
    import SimpleITK as sitk

    shape = np.round((np.array(array.shape) - 1) * old / new).astype(int) + 1
    beyond = [(0, int(np.ceil(step))) for step in new / old / 2]
    padded = np.pad(array, beyond, mode="edge")
    del scan, array  # each as large as a CT
    image = sitk.GetImageFromArray(padded)  # ITK names the last axis first
    del padded
    image.SetSpacing(old[::-1])
    resampled = sitk.Resample(
        image,
        shape[::-1].tolist(),
        interpolator=sitk.sitkNearestNeighbor if labels else sitk.sitkLinear,
        outputSpacing=new[::-1],
    )
    affine = np.column_stack([affine[:, :3] * (new / old), affine[:, 3]])
    return Scan(sitk.GetArrayFromImage(resampled), affine)


def orientation(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find for each axis of an array the one of right, anterior, superior that it is nearest to, and its direction.

    As nibabel's `io_orientation`, but where two choices are equally near, as at 45 degrees, the choice depends on the
    directions in space alone, not on the order in which a file stores them.

    Args:
        affine: (4, 4), voxel indices to mm, RAS.

    Returns:
        nibabel's orientation array (3, 2): the axis in space, and 1 or -1.
    """
    directions = affine[:3, :3] / voxel_sizes(affine)

    def nearness(axes: tuple[int, ...]) -> tuple[float, ...]:
        """Sum of cosines; then, among equals, the directions of the reordered axes."""
        turned = np.empty((3, 3))
        for k, axis in enumerate(axes):
            turned[:, axis] = directions[:, k] * (np.sign(directions[axis, k]) or 1)
        return (round(np.trace(turned), 6), *turned.round(6).ravel())

    axes = max(itertools.permutations(range(3)), key=nearness)
    return np.array([(axis, np.sign(directions[axis, k]) or 1) for k, axis in enumerate(axes)])


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
    if low == high:  # what differs is less than 1 % of the voxels; clipped nothing would be left
        low, high = image.min(), image.max()
    values = np.array(image, np.float64)
    return _z_scores(np.clip(values, low, high, out=values)).astype(np.float32)


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
