"""Reads scans of other packages and scanners and compares voxels and places in the world with an independent reading.

    ./run_all.sh bench scans                    a line a file
    ./run_all.sh bench scans PAIRS --store      also pyradiomics' pairs; results/reference/scans.csv

| from | files | independent reader |
|---|---|---|
| pydicom | DICOM in its wheel, each as a series of its own | pydicom |
| nibabel | NIfTI in its wheel | SimpleITK |
| pyradiomics | NRRD pairs NAME_image, NAME_label in the folder PAIRS, `data` of its unpacked source archive | pynrrd |
| SimpleITK | series that it writes here, each voxel a function of its place in the world | that function |

A mask of every scan that is read is written and read again: by SimpleITK, and by nibabel or, of NRRD, by pynrrd. Of
the pairs, the table also says what a data set of them is told, and one whose mask is moved by 0.5 mm. For this
benchmark alone: `pip install pydicom pynrrd`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import SimpleITK as sitk
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from srlib import machine
from srlib.data import labels, scans
from srlib.files import REFERENCE, DataError

Reading = tuple[NDArray[Any], NDArray[np.float64]]  # voxels (X, Y, Z), affine (4, 4) in RAS
TURNS = {  # towards left, posterior and superior, a column an axis
    "axial": np.eye(3),
    "sagittal": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
    "oblique": np.linalg.qr(np.array([[9.0, 2, 1], [-2, 8, 3], [1, -3, 9]]))[0],
}
SERIES = {  # turn, voxels (mm), shear of a slice against the last (mm), type of voxels, rescaling
    "axial, signed": ("axial", (0.7, 0.9, 2.5), 0.0, np.int16, None),
    "axial, unsigned": ("axial", (0.7, 0.9, 0.625), 0.0, np.uint16, None),
    "axial, unsigned, rescaled": ("axial", (0.5, 0.5, 5.0), 0.0, np.uint16, ("3", "-1024")),
    "sagittal, signed": ("sagittal", (1.0, 1.0, 1.2), 0.0, np.int16, None),
    "oblique, signed": ("oblique", (0.8, 1.1, 3.0), 0.0, np.int16, None),
    "oblique, unsigned": ("oblique", (0.8, 1.1, 0.75), 0.0, np.uint16, None),
    "tilted, signed": ("axial", (0.7, 0.9, 2.5), 0.9, np.int16, ("2", "-1000")),
    "tilted back, unsigned": ("axial", (0.7, 0.9, 5.0), -1.6, np.uint16, None),
    "oblique and tilted": ("oblique", (0.6, 0.6, 2.0), 0.4, np.int16, None),
}


# --- Independent readings -------------------------------------------------------------------------


def by_pydicom(path: Path) -> Reading:
    """Read one slice; the step to the next is as `srlib` takes it for one alone."""
    import pydicom

    slice_ = pydicom.dcmread(path)
    slope, intercept = slice_.get("RescaleSlope", 1), slice_.get("RescaleIntercept", 0)
    array = slice_.pixel_array.astype(float).T * float(slope) + float(intercept)
    turn = np.array(slice_.ImageOrientationPatient, float).reshape(2, 3).T
    thickness = slice_.get("SpacingBetweenSlices") or slice_.get("SliceThickness") or 1
    steps = np.column_stack([turn, np.cross(*turn.T)])
    steps *= [*np.array(slice_.PixelSpacing, float)[::-1], abs(float(thickness))]
    return array[..., None], ras(steps, np.array(slice_.ImagePositionPatient, float))


def by_itk(path: Path) -> Reading:
    """Read a file as ITK does."""
    image = sitk.ReadImage(str(path))
    n = image.GetDimension()
    steps = np.reshape(image.GetDirection(), (n, n))[:3, :3] * image.GetSpacing()[:3]
    return sitk.GetArrayFromImage(image).T, ras(steps, image.GetOrigin()[:3])


def by_nibabel(path: Path) -> Reading:
    """Read a NIfTI file as nibabel does."""
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def by_pynrrd(path: Path) -> Reading:
    """Read an NRRD file without ITK."""
    import nrrd

    array, header = nrrd.read(str(path))
    assert header["space"] == "left-posterior-superior"
    return array, ras(header["space directions"].T, header["space origin"])


def ras(steps: NDArray[np.float64], origin: Any) -> NDArray[np.float64]:
    """Affine from steps (3, 3) and origin in DICOM's coordinates, left, posterior and superior."""
    affine = np.eye(4)
    affine[:3] = np.column_stack([steps, origin])
    return np.diag([-1.0, -1, 1, 1]) @ affine


# --- Series whose voxels say where they are -------------------------------------------------------


def write_series(
    folder: Path, turn: str, size: Any, shear: float, kind: Any, rescaling: Any
) -> Reading:
    """Write a series slice by slice; its voxels are a function of their places, to which they are rounded."""
    steps = TURNS[turn] * size
    steps[:, 2] += shear * TURNS[turn][:, 1]
    affine, shape = ras(steps, (-31.5, 12.25, 40.0)), (24, 20, 9)
    places = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    slope, intercept = map(int, rescaling or (1, 0))  # ITK writes what gives these voxels
    array = np.round((2000 + places @ [7.0, 11.0, 13.0]) / slope) * slope + intercept % slope
    if np.issubdtype(kind, np.signedinteger):
        array -= 3000 // slope * slope
    array = array.astype(kind)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(shape[2]):
        image = sitk.GetImageFromArray(array[..., k].T)
        image.SetSpacing(size[:2])
        place = np.diag([-1, -1, 1]) @ apply_affine(affine, (0, 0, k))
        tags = {"0008|0060": "CT", "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0020|000d": "1.2"}
        tags |= {"0020|000e": "1.2.3", "0008|0018": f"1.2.3.{k}", "0018|0050": str(size[2])}
        tags["0020|0032"] = "\\".join(f"{x:.6f}" for x in place)
        tags["0020|0037"] = "\\".join(f"{x:.9f}" for x in TURNS[turn][:, :2].T.ravel())
        if rescaling:
            tags |= dict(zip(("0028|1053", "0028|1052"), rescaling, strict=True))
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{shape[2] - k}.dcm"))
        writer.Execute(image)
    return array, affine


# --- Verdicts -------------------------------------------------------------------------------------


def verdict(path: Path, dimensions: int, independent: Callable[[], Reading]) -> dict[str, Any]:
    """State whether a scan is read, how far from the independent reading, and how far masks of it lie off."""
    try:
        scan = scans.read(path, dimensions)
    except DataError as error:
        return {"read": False, "said": str(error).splitlines()[0].rpartition("/")[2]}
    found = {"read": True, "masks_apart_mm": masks_apart(path, scan)}
    try:
        array, affine = independent()
    except Exception as error:  # readers know many kinds of file that they cannot read
        return {**found, "said": f"the other reader: {type(error).__name__}"}
    same = np.allclose(array.reshape(scan.array.shape), scan.array, rtol=1e-5)
    return {
        **found,
        "same_voxels": same,
        "apart_mm": round(scans.apart(scan.array.shape, scan.affine, affine), 4),
    }


def masks_apart(path: Path, scan: scans.Scan) -> float:
    """Write a mask of a scan; the greatest distance (mm) of its voxels from the scan's, for other readers."""
    mask = (np.indices(scan.array.shape[:3]).sum(axis=0) % 3).astype(np.uint8)
    mask[0] = 3
    distances = []
    with tempfile.TemporaryDirectory() as folder:
        nrrd = path.suffix == ".nrrd"
        file = Path(folder) / ("mask.nrrd" if nrrd else "mask.nii.gz")
        scans.write_labels(mask, scan.affine, path, file)
        for reader in (by_itk, by_pynrrd if nrrd else by_nibabel):
            try:
                array, affine = reader(file)
            except RuntimeError:  # ITK refuses a sheared grid in NIfTI
                continue
            assert np.array_equal(array, mask), f"{path}: its mask is read otherwise by {reader}"
            distances.append(scans.apart(mask.shape, scan.affine, affine))
    return round(max(distances), 4)


def pair(image: Path, label: Path) -> dict[str, Any]:
    """State what a data set of this pair is told."""
    try:
        _, found = scans.read_case([image], label, 1)
        values = labels.values_in(label, found)
    except DataError as error:
        said = str(error)
        for path in (image, label):
            said = said.replace(str(path), path.name)
        return {"read": False, "said": said.replace("\n", "; ")}
    return {"read": True, "said": f"a case with the labels {values}"}


def rows(pairs: Path | None) -> Iterator[dict[str, Any]]:
    """A row a file."""
    import pydicom

    for path in sorted(Path(pydicom.__file__).parent.glob("data/test_files/*.dcm")):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(path, folder)
            found = verdict(Path(folder), 3, lambda path=path: by_pydicom(path))
        yield {"from": "pydicom", "file": path.name, **found}
    for path in sorted(Path(nib.__file__).parent.glob("tests/data/*.nii*")):
        dimensions = 4 if len(nib.load(path).shape) == 4 else 3
        found = verdict(path, dimensions, lambda path=path: by_itk(path))
        yield {"from": "nibabel", "file": path.name, **found}
    for name, settings in SERIES.items():
        with tempfile.TemporaryDirectory() as folder:
            written = write_series(Path(folder), *settings)
            found = verdict(Path(folder), 3, lambda written=written: written)
        yield {"from": "SimpleITK", "file": name, **found}
    for label in sorted(pairs.glob("*_label.nrrd")) if pairs else []:
        image = label.with_name(label.name.replace("_label", "_image"))
        for path in (image, label):
            found = verdict(path, 3, lambda path=path: by_pynrrd(path))
            yield {"from": "pyradiomics", "file": path.name, **found}
        yield {"from": "pyradiomics", "file": f"{image.name}, {label.name}", **pair(image, label)}
        with tempfile.TemporaryDirectory() as folder:
            moved = sitk.ReadImage(str(label))
            moved.SetOrigin(np.add(moved.GetOrigin(), (0.3, 0, 0.4)))
            sitk.WriteImage(moved, str(other := Path(folder) / "moved_label.nrrd"))
            yield {
                "from": "pyradiomics",
                "file": f"{image.name}, its mask moved",
                **pair(image, other),
            }


def main() -> None:
    """Print and perhaps store the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", nargs="?", type=Path, help="folder of pyradiomics' NRRD pairs")
    parser.add_argument("--store", action="store_true", help="write results/reference/scans.csv")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="pydicom")
    table = pd.DataFrame(rows(options.pairs))
    print(table.to_string(index=False, na_rep=""))
    compared = table.dropna(subset="same_voxels")
    print(
        f"{len(table)} rows, {table['read'].sum()} read, {len(compared)} compared,"
        f" {compared['same_voxels'].sum()} of them with the same voxels, at most {compared['apart_mm'].max()} mm apart;"
        f" {table['masks_apart_mm'].count()} masks, at most {table['masks_apart_mm'].max()} mm apart"
    )
    if options.store:
        machine.write_table(table, REFERENCE / "scans.csv")


if __name__ == "__main__":
    main()
