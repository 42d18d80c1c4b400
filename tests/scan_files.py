"""Scans of every format, and tiny folders of them in the layouts of others, for tests."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from srlib.data import scans

SHAPE = (15, 22, 18)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def itk_image(array, affine) -> sitk.Image:
    """The same scan as ITK describes it: LPS, the last axis first."""
    lps = scans.LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing(spacing)
    image.SetOrigin(lps[:3, 3])
    image.SetDirection((lps[:3, :3] / spacing).ravel())
    return image


def write(path: Path, array, affine) -> Path:
    """Write a scan as the file's ending says; without one, as a DICOM series, a file a slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(array, affine), path)
    elif path.suffix:
        sitk.WriteImage(itk_image(array, affine), str(path))
    else:
        write_dicom(path, itk_image(array, affine))
    return path


def write_nifti(path: Path, array, affine=None, **fields) -> Path:
    """A NIfTI file with these fields of the header set byte by byte, as no writer would."""
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    raw = bytearray(path.read_bytes())
    header = np.frombuffer(raw, nib.nifti1.header_dtype, count=1)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(raw)
    return path


def write_dicom(folder: Path, image: sitk.Image, series: str = "1.2.3", places=None) -> None:
    folder.mkdir(exist_ok=True)
    direction = np.reshape(image.GetDirection(), (3, 3))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.GetDepth()):
        slice_, place = image[:, :, k], image.TransformIndexToPhysicalPoint((0, 0, k))
        if places:
            place = (0, 0, places[k])
        tags = {
            "0008|0060": "CT",
            "0020|000e": series,
            "0020|000d": "1.2",
            "0008|0018": f"{series}.{k}",
            "0020|0013": str(k),
            "0020|0032": "\\".join(map(str, place)),
            "0020|0037": "\\".join(map(str, direction[:, :2].T.ravel())),
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{image.GetDepth() - k}.dcm"))
        writer.Execute(slice_)


def scan(number: int, values=(1, 2), shape=SHAPE):
    """Image and label of a case: a box on noise, its parts the label values."""
    random = np.random.default_rng(number)
    label = np.zeros(shape, np.uint8)
    for part, value in zip(np.array_split(np.arange(4, 12), len(values)), values, strict=True):
        label[part[0] : part[-1] + 1, 5:16, 6:12] = value
    image = 100.0 * (label > 0) + random.normal(50, 5, shape)
    return image.astype(np.float32), label


def write_pairs(
    folder: Path,
    cases: int = 5,
    channels: int = 1,
    values=(1, 2),
    names=("images", "labels"),
    ending: str = ".nii.gz",
    numbered: bool | None = None,
    affine=AFFINE,
) -> Path:
    """Images and labels by name, channels numbered as nnU-Net does."""
    for number in range(cases):
        image, label = scan(number, values)
        write(folder / names[1] / f"case_{number}{ending}", label, affine)
        for channel in range(channels):
            end = f"_{channel:04d}" if (channels > 1 if numbered is None else numbered) else ""
            write(folder / names[0] / f"case_{number}{end}{ending}", (channel + 1) * image, affine)
    return folder


def write_nnunet(folder: Path, channels=("CT",), labels=None, ending=".nii.gz", **options) -> Path:
    """nnU-Net's raw layout with its second version's dataset.json."""
    names = ("imagesTr", "labelsTr")
    options = {"numbered": True, "names": names, "channels": len(channels), **options}
    write_pairs(folder, ending=ending, **options)
    index = {
        "channel_names": {str(k): name for k, name in enumerate(channels)},
        "labels": labels or {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 5,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def write_decathlon(folder: Path, channels=("MRI",), cases: int = 5, values=(1, 2)) -> Path:
    """The Decathlon's layout; several channels are one 4D file a case."""
    training = []
    for number in range(cases):
        image, label = scan(number, values)
        if len(channels) > 1:
            image = np.stack([image * (k + 1) for k in range(len(channels))], axis=-1)
        item = {kind: f"./{kind}sTr/case_{number}.nii.gz" for kind in ("image", "label")}
        write(folder / item["image"], image, AFFINE)
        write(folder / item["label"], label, AFFINE)
        training.append(item)
    index = {
        "modality": {str(k): name for k, name in enumerate(channels)},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def write_brats(folder: Path, cases: int = 3) -> Path:
    """BraTS 2021 as it is distributed."""
    for number in range(cases):
        name = f"BraTS2021_{number:05d}"
        image, label = scan(number, values=(1, 2, 4))
        image[:3] = 0  # as outside of the skull
        for factor, kind in enumerate(("flair", "t1", "t1ce", "t2"), start=1):
            write(folder / name / f"{name}_{kind}.nii.gz", factor * image, np.eye(4))
        write(folder / name / f"{name}_seg.nii.gz", label, np.eye(4))
    return folder


def write_btcv(folder: Path, cases: int = 3) -> Path:
    """BTCV's RawData.zip, unpacked."""
    training = folder / "RawData" / "Training"
    for number in range(1, cases + 1):
        image, _ = scan(number)
        label = np.zeros(SHAPE, np.uint8)
        label[1:14, 5:16, 6:12] = np.arange(1, 14)[:, None, None]
        affine = np.diag([-1.5, 1.5, 2.0, 1.0])
        write(training / "img" / f"img{number:04d}.nii.gz", 5 * image - 300, affine)
        write(training / "label" / f"label{number:04d}.nii.gz", label, affine)
    return folder
