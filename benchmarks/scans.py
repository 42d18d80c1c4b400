"""Reads test files of pydicom and nibabel and compares voxels and places in the world with an independent reading.

    ./run_all.sh bench scans           a line a file
    ./run_all.sh bench scans --store   also results/reference/scans.csv

pydicom, for this benchmark alone, is `pip install pydicom`: its wheel holds the files and is the independent reader of
DICOM; SimpleITK is that of nibabel's NIfTI files. Each DICOM file is read as a series of its own.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import SimpleITK as sitk
from numpy.typing import NDArray

from srlib import machine
from srlib.data import scans
from srlib.files import REFERENCE, DataError

Reading = tuple[NDArray[Any], NDArray[np.float64]]  # voxels (X, Y, Z), affine (4, columns) in RAS


def by_pydicom(path: Path) -> Reading:
    """Read one slice; the affine lacks the column between slices."""
    import pydicom

    slice_ = pydicom.dcmread(path)
    slope, intercept = slice_.get("RescaleSlope", 1), slice_.get("RescaleIntercept", 0)
    array = slice_.pixel_array.astype(float).T * float(slope) + float(intercept)
    turn = np.array(slice_.ImageOrientationPatient, float).reshape(2, 3).T
    steps = turn * np.array(slice_.PixelSpacing, float)[::-1]
    affine = np.column_stack([steps, np.array(slice_.ImagePositionPatient, float)])
    return array[..., None], np.diag([-1, -1, 1]) @ affine


def by_itk(path: Path) -> Reading:
    """Read a NIfTI file as ITK does."""
    image = sitk.ReadImage(str(path))
    n, affine = image.GetDimension(), np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (n, n))[:3, :3] * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return sitk.GetArrayFromImage(image).T, (np.diag([-1, -1, 1, 1]) @ affine)[:3]


def verdict(path: Path, dimensions: int, independent: Callable[[], Reading]) -> dict[str, Any]:
    """State whether a file is read and, if so, whether the independent reader finds the same."""
    try:
        scan = scans.read(path, dimensions)
    except DataError as error:
        return {"read": False, "said": str(error).splitlines()[0].rpartition("/")[2]}
    try:
        array, affine = independent()
    except Exception as error:  # readers know many kinds of file that they cannot read
        return {"read": True, "said": f"the other reader: {type(error).__name__}"}
    columns = [0, 1, 3] if affine.shape[1] == 3 else [0, 1, 2, 3]
    return {
        "read": True,
        "same_voxels": np.allclose(array.reshape(scan.array.shape), scan.array, rtol=1e-5),
        "same_places": np.allclose(affine, scan.affine[:3, columns], atol=1e-3),
    }


def main() -> None:
    """Print and perhaps store the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", action="store_true", help="write results/reference/scans.csv")
    options = parser.parse_args()
    import pydicom

    warnings.filterwarnings("ignore", module="pydicom")
    rows = []
    for path in sorted(Path(pydicom.__file__).parent.glob("data/test_files/*.dcm")):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(path, folder)
            found = verdict(Path(folder), 3, lambda path=path: by_pydicom(path))
        rows.append({"from": "pydicom", "file": path.name, **found})
    for path in sorted(Path(nib.__file__).parent.glob("tests/data/*.nii*")):
        dimensions = 4 if len(nib.load(path).shape) == 4 else 3
        found = verdict(path, dimensions, lambda path=path: by_itk(path))
        rows.append({"from": "nibabel", "file": path.name, **found})
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, na_rep=""))
    compared = table.dropna(subset="same_voxels")
    print(
        f"{len(table)} files, {table['read'].sum()} read, {len(compared)} compared,"
        f" {(compared['same_voxels'] & compared['same_places']).sum()} of them equal"
    )
    if options.store:
        machine.write_table(table, REFERENCE / "scans.csv")


if __name__ == "__main__":
    main()
