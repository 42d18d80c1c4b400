"""DICOM series: every file of the folder accounted for, and every slice where the affine says that it is.

GDCM, within SimpleITK, decodes the slices one by one, so that each keeps its own rescale slope. Its series reader is
not used: that takes places from the first two slices and leaves out what it cannot read. Multi-frame files and
mosaics are refused with a word on dcm2niix, which converts both.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import prod
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
# Slices of one volume have these alike; where they do not, no value is told, which may name a patient.
ALIKE = {
    "patient": "0010|0020",
    "the patient's name": "0010|0010",
    "study": "0020|000d",
    "modality": "0008|0060",
    "frame of reference": "0020|0052",
}
TABLE, GROUPS, PIXELS = (0x0028, 0x3000), ((0x5200, 0x9229), (0x5200, 0x9230)), (0x7FE0, 0x0010)
UNDEFINED = 0xFFFFFFFF  # length of what is compressed
DEFLATED = b"\2\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99"  # the element of the meta header
UNPACKED = 1 << 28  # bytes of a deflated slice; 8192 x 8192 voxels of 32 bits
CONVERT = "; convert it with dcm2niix first"
logger = logging.getLogger("srlib")


class Slice(NamedTuple):
    """Header of a slice; lengths in mm, towards left, posterior and superior."""

    file: Path
    series: str
    place: NDArray[np.float64]  # (3,), of the first voxel
    steps: NDArray[np.float64]  # (3, 2), from a voxel to the next along a row and along a column
    thickness: float
    alike: dict[str, Any]  # what slices of one volume have in common
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
    for one in slices:
        differing = [name for name in first.alike if one.alike[name] != first.alike[name]]
        if not np.allclose(one.steps, first.steps, atol=1e-4):
            differing.append("direction or size of voxels")
        if differing:
            raise DataError(
                f"{folder}: {one.file.name} and {first.file.name} differ in {', '.join(differing)};"
                " expected parallel slices of one scan"
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
    """Headers of all files; `DataError` with a line for each kind of fault, a warning for what is no DICOM."""
    slices, others, nested = [], [], []
    faults: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
            continue
        if path.is_dir():
            nested += [path] * any(is_dicom(inner) for inner in path.iterdir() if inner.is_file())
            continue
        try:
            slices.append(_slice(path))
        except DataError as error:
            faults[str(error).removeprefix(f"{path}: ")].append(path)
        except (RuntimeError, ValueError, OSError):
            if path.suffix.lower() in OTHERS and not is_dicom(path):
                others.append(path.name)
                continue
            faults[
                "no slice that can be read: damaged, packed, or none of a scan, as a report or a plan;"
                " mend it or move it away"
            ].append(path)
    lines = []
    for fault, paths in faults.items():
        names = ", ".join([str(paths[0]), *(path.name for path in paths[1:5])])
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        lines.append(f"{names}{more}: {fault}")
    if nested:
        names = ", ".join(path.name for path in nested[:5])
        lines.append(
            f"{folder}: DICOM files in the folders {names}; expected one series in one folder"
        )
    if lines:
        raise DataError("\n".join(lines))
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
    unpacked = _inflated(path)  # before GDCM does so, which has no bound
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    about: dict[str, str] = defaultdict(str)
    about |= {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
    if "3004|000e" in about:
        raise DataError(f"{path}: a dose, in units of (3004,000e); expected slices of a scan")
    if reader.GetDimension() > 2 and reader.GetSize()[2:] != (1,):
        raise DataError(f"{path}: multi-frame DICOM{CONVERT}")
    size = [int(about[tag]) for tag in ("0028|0010", "0028|0011", "0028|0002", "0028|0100")]
    expected = prod(size) // 8
    header, found = _header(unpacked or path.read_bytes(), expected)
    if any(_holds(header, tag) for tag in GROUPS):
        raise DataError(f"{path}: enhanced DICOM{CONVERT}")
    if "MOSAIC" in about["0008|0008"].upper():
        raise DataError(f"{path}: a mosaic of slices{CONVERT}")
    _check_voxels(path, about, header)
    if found < expected:
        raise DataError(
            f"{path}: its voxels are not whole; expected {expected} bytes, found {found}"
        )
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
        raise DataError(f"{path}: states no size of its pixels (0028,0030), correct it")
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    between = _numbers(about["0018|0088"])
    if len(between) and not between[0]:
        raise DataError(f"{path}: states 0 mm between slices (0018,0088), correct it{CONVERT}")
    thickness = [*between, *_numbers(about["0018|0050"]), 0.0][0]
    steps = axes.T * pixel[::-1]  # the space between rows comes first
    alike: dict[str, Any] = {name: about[tag] for name, tag in ALIKE.items()}
    alike |= {"size": reader.GetSize()[:2], "rescaling": bool(about["0028|1053"])}
    series, uid = about["0020|000e"], about["0008|0018"]
    return Slice(path, series, place, steps, abs(thickness), alike, uid)


def _check_voxels(path: Path, about: dict[str, str], header: bytes) -> None:
    """`DataError` for voxels that GDCM would read as others."""
    if about["0028|0004"] == "MONOCHROME1":  # how to show them; GDCM inverts the voxels themselves
        raise DataError(f"{path}: voxels that are shown inverted, MONOCHROME1{CONVERT}")
    if _holds(header, TABLE):
        raise DataError(
            f"{path}: voxels whose meaning stands in a table (0028,3000); apply it first"
        )
    slopes = _numbers(about["0028|1053"])
    if len(slopes) > 1 or not slopes.all():
        raise DataError(
            f"{path}: rescaled by {about['0028|1053']} (0028,1053); expected one number, not 0"
        )
    allocated, stored, highest = (int(about[f"0028|010{k}"]) for k in range(3))
    if allocated not in (8, 16, 32) or stored > allocated or highest != stored - 1:
        raise DataError(
            f"{path}: voxels of {stored} bits in {allocated}, bit {highest} the highest (0028,0100 to 0102);"
            " expected 8, 16 or 32, and the lowest of them"
        )
    if about["0028|0002"] != "1":
        raise DataError(f"{path}: expected one number a voxel, got {about['0028|0002']}")


def _inflated(path: Path) -> bytes:
    """What a deflated file holds after its meta header, empty for another file; `DataError` above `UNPACKED`."""
    with path.open("rb") as file:
        meta = file.read(1 << 16)
        if DEFLATED not in meta:
            return b""
        file.seek(144 + int.from_bytes(meta[140:144], "little"))
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = unpacker.decompress(file.read(UNPACKED), UNPACKED)
        except zlib.error as error:
            raise DataError(f"{path}: deflated, and cannot be unpacked; damaged") from error
    if unpacker.eof:
        return content
    if len(content) < UNPACKED:
        raise DataError(f"{path}: deflated, and ends too early; damaged")
    most = f"{UNPACKED / 2**20:g} MiB"
    raise DataError(f"{path}: deflated, and unpacks to more than {most}; expected one slice")


def _header(content: bytes, expected: int) -> tuple[bytes, int]:
    """Bytes of a file's `content` without its voxels, which are kept where they are compressed, and how many those are.

    GDCM fills voxels that end before they are the `expected` bytes with whatever memory held; of compressed ones it
    tells most damage itself.
    """
    found = 0
    for _, length, start in _elements(content, PIXELS):
        if length == UNDEFINED:
            return content, expected
        if expected <= length <= len(content) - start:
            return content[:start], length
        found = max(found, length * (length <= len(content) - start))
    return content, found


def _elements(content: bytes, tag: tuple[int, int]) -> Iterator[tuple[str, int, int]]:
    """Byte order, length and start of what may be an element's value: its tag, in any encoding.

    SimpleITK hands on neither sequences nor the length of the voxels; chance makes some tags among voxels.
    """
    for order in "<>":
        sought = struct.pack(f"{order}HH", *tag)
        place = content.find(sought)
        while 0 <= place <= len(content) - 16:
            explicit = content[place + 4 : place + 6] in (b"SQ", b"OB", b"OW", b"UN")
            start = place + (12 if explicit else 8)
            yield order, struct.unpack_from(f"{order}I", content, start - 4)[0], start
            place = content.find(sought, place + 1)


def _holds(content: bytes, tag: tuple[int, int]) -> bool:
    """Tell a sequence that has an item."""
    return any(
        content[start : start + 4] == struct.pack(f"{order}HH", 0xFFFE, 0xE000)
        for order, _, start in _elements(content, tag)
    )


def _numbers(text: str) -> NDArray[np.float64]:
    return np.array([float(part) for part in text.split("\\") if part.strip()])


def _voxels(path: Path) -> NDArray[np.float32]:
    """Voxels (X, Y) of a slice."""
    try:
        image: Any = sitk.ReadImage(str(path), imageIO="GDCMImageIO")
    except RuntimeError as error:
        raise DataError(f"{path}: its voxels cannot be unpacked, damaged or too short") from error
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise DataError(
            f"{path}: expected one number a voxel, got {image.GetPixelIDTypeAsString()}"
        )
    return np.squeeze(array).T.astype(np.float32) if array.ndim > 2 else array.T.astype(np.float32)
