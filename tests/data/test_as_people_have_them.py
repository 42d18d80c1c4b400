"""Scans and folders as people have them: read right, or refused in words that help. Two and more of each kind."""

import gzip
import json
import re
import struct
import unicodedata
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scan_files import write, write_nifti, write_pairs

from srlib.data import plans, scans
from srlib.files import DataError
from srlib.run import predict

VOXELS = np.random.default_rng(0).normal(100, 20, (20, 24, 12)).astype(np.float32)
LABELS = np.zeros(VOXELS.shape, np.uint8)
LABELS[5:10, 5:15, 3:8], LABELS[10:14, 5:15, 3:8] = 1, 2
AXIAL = (1, 0, 0, 0, 1, 0)


def dicom(folder: Path, places, directions=AXIAL, numbers=None, **tags) -> Path:
    """A series with a slice at each place (mm, LPS); `numbers` go into the files' names."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k, place in enumerate(places):
        image = sitk.GetImageFromArray(np.full((24, 20), 1000 + k, np.int16))
        image.SetSpacing((0.8, 0.8))
        turn = directions[k] if isinstance(directions[0], tuple) else directions
        stated = {
            "0008|0060": "MR",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",
            "0020|000e": "1.2.3",
            "0020|000d": "1.2",
            "0008|0018": f"1.2.3.{k}",
            "0020|0013": str(k),
            "0018|0050": "8",
            "0020|0032": "\\".join(map(str, place)),
            "0020|0037": "\\".join(map(str, turn)),
            **{tag.replace("_", "|"): value for tag, value in tags.items()},
        }
        for tag, value in stated.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{numbers[k] if numbers else k:03d}.dcm"))
        writer.Execute(image)
    return folder


def edit(folder: Path, tag: tuple[int, int], *values: str | bytes | None) -> Path:
    """Set an element of the slices, one value for all or one each, as no writer would; `None` takes it away."""
    for k, path in enumerate(sorted(folder.iterdir())):
        content, value = path.read_bytes(), values[k % len(values)]
        place = 144 + int.from_bytes(content[140:144], "little")  # after the meta header
        while (found := struct.unpack_from("<HHI", content, place))[:2] < tag:
            place += 8 + found[2]
        end = place + 8 + found[2] if found[:2] == tag else place
        element = b""
        if value is not None:
            value = value if isinstance(value, bytes) else value.encode()
            value += b" " * (len(value) % 2)
            element = struct.pack("<HHI", *tag, len(value)) + value
        path.write_bytes(content[:place] + element + content[end:])
    return folder


def nifti(path: Path, array=VOXELS, affine=None, **fields) -> Path:
    return write_nifti(path, array, affine, **fields)


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        scans.read(path)
    return str(caught.value)


# --- Series -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [0.73, -0.65])
def test_a_tilted_gantry_gives_a_sheared_affine(tmp_path, tilt):
    scan = scans.read(dicom(tmp_path / "ct", [(0, tilt * k, 2 * k) for k in range(10)]))
    np.testing.assert_allclose(scan.affine[:3, 2], (0, -tilt, 2), atol=1e-6)
    np.testing.assert_allclose(scan.affine[:3, 0], (-0.8, 0, 0), atol=1e-6)
    assert scan.array[0, 0].tolist() == [*range(1000, 1010)]


def test_slices_come_in_the_order_of_their_places_whatever_their_names(tmp_path):
    order = [3, 0, 4, 1, 2]
    series = dicom(tmp_path / "mr", [(0, 0, -2.5 * k) for k in order], numbers=[9, 8, 1, 5, 2])
    scan = scans.read(series)
    assert scan.array[0, 0].tolist() == [1002, 1000, 1004, 1003, 1001]
    np.testing.assert_allclose(scan.affine[:3, 2:], [[0, 0], [0, 0], [2.5, -10]], atol=1e-6)


NOT_A_VOLUME = {
    "cine": ({"places": [(-50, -60, 20)] * 12}, "lie at one place; .*dcm2niix"),
    "two echoes": ({"places": [(0, 0, k // 2) for k in range(8)]}, "lie at one place"),
    "a slice aside": (
        {"places": [(0.5 * (k == 3), 0, 2 * k) for k in range(6)]},
        "2 to 2.06 mm apart|003.dcm lies 0.5 mm off",
    ),
    "slices that drift": (
        {"places": [(0.005 * k * k, 0, 2 * k) for k in range(9)]},
        "mm off its place",
    ),
    "a missing slice": ({"places": [(0, 0, k) for k in (0, 1, 2, 4)]}, "expected equal steps"),
    "planes that turn": (
        {"places": [(0, 0, k) for k in range(2)], "directions": (AXIAL, (1, 0, 0, 0, 0, 1))},
        "differ in direction or size of voxels",
    ),
    "a mosaic": (
        {"places": [(0, 0, 0)], "0008_0008": "ORIGINAL\\PRIMARY\\M\\MOSAIC"},
        "a mosaic of slices; convert it with dcm2niix",
    ),
}


@pytest.mark.parametrize("kind", NOT_A_VOLUME)
def test_slices_that_are_no_regular_grid_are_refused(tmp_path, kind):
    settings, message = NOT_A_VOLUME[kind]
    with pytest.raises(DataError, match=message):
        scans.read(dicom(tmp_path / "series", **settings))


HEADERS = {
    "inverted voxels": ((0x0028, 0x0004), ["MONOCHROME1"], "MONOCHROME1; convert it"),
    "no place in numbers": ((0x0020, 0x0032), ["0\\0\\0", "10\\20\\ nan"], "001.dcm: its place"),
    "skewed axes": ((0x0020, 0x0037), ["1\\0\\0\\.3\\1\\0"], "two perpendicular axes of length 1"),
    "axes of length 2": ((0x0020, 0x0037), ["2\\0\\0\\0\\2\\0"], "two perpendicular axes"),
    "no size of pixels": ((0x0028, 0x0030), [""], "states no size of its pixels"),
    "a size of 0": ((0x0028, 0x0030), ["0\\0"], "states no size of its pixels"),
    "no step": ((0x0018, 0x0088), ["0"], "states 0 mm between slices"),
    "one slice twice": ((0x0020, 0x0032), ["0\\0\\5"], "lie at one place"),
    "two frames of reference": ((0x0020, 0x0052), ["1.2", "1.3"], "in frame of reference;"),
    "two patients": ((0x0010, 0x0020), ["A", "A", "B"], "002.dcm and 000.dcm differ in patient;"),
    "two patients' names": ((0x0010, 0x0010), ["A", "B"], "differ in the patient's name;"),
    "two studies": ((0x0020, 0x000D), ["1.2", "1.3"], "001.dcm and 000.dcm differ in study;"),
    "two modalities": ((0x0008, 0x0060), ["MR", "CT"], "differ in modality;"),
    "some rescaled": ((0x0028, 0x1053), ["2", None], "differ in rescaling;"),
    "a slope of 0": ((0x0028, 0x1053), ["0"], "rescaled by 0 (0028,1053)"),
    "two slopes": ((0x0028, 0x1053), ["1\\2"], "rescaled by 1\\2 (0028,1053)"),
    "a dose": ((0x3004, 0x000E), ["0.001"], "a dose, in units of (3004,000e)"),
    "a dose of unit 1": ((0x3004, 0x000E), ["1"], "a dose, in units of (3004,000e)"),
    "voxels in the highest bits": (
        (0x0028, 0x0102),
        [b"\x0e\0"],
        "16 bits in 16, bit 14 the highest",
    ),
    "12 bits in the highest": ((0x0028, 0x0101), [b"\x0c\0"], "12 bits in 16, bit 15 the highest"),
    "packed bits": ((0x0028, 0x0100), [b"\x0c\0"], "16 bits in 12, bit 15 the highest"),
    "a table": ((0x0028, 0x3000), [b"\xfe\xff\0\xe0\0\0\0\0"], "in a table (0028,3000)"),
    "frames in groups": ((0x5200, 0x9230), [b"\xfe\xff\0\xe0\0\0\0\0"], "enhanced DICOM"),
    "voxels cut": ((0x7FE0, 0x0010), [b"12" * 9], "not whole; expected 960 bytes, found 18"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_contradict_a_volume_are_refused(tmp_path, kind):
    tag, values, message = HEADERS[kind]
    series = dicom(tmp_path / "series", [(0, 0, 2 * k) for k in range(3)])
    assert message in refusal(edit(series, tag, *values))


def write_slice(path: Path, encoding: str, pixels, table: bool) -> None:
    """A slice of 20 x 24 voxels with types of elements, which SimpleITK writes of compressed ones alone."""
    order = ">" if encoding == "big-endian" else "<"

    def element(tag, kind, value, order="<"):
        if isinstance(value, int):
            value = struct.pack(f"{order}H", value)
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
        length = struct.pack(f"{order}xxI" if kind in ("OW", "SQ") else f"{order}H", len(value))
        return struct.pack(f"{order}HH", *tag) + kind.encode() + length + value

    elements = [
        ((0x0008, 0x0016), "UI", b"1.2.840.10008.5.1.4.1.1.4"), ((0x0008, 0x0018), "UI", b"1.2"),
        ((0x0018, 0x0050), "DS", b"2"), ((0x0020, 0x000E), "UI", b"1.2.3"),
        ((0x0020, 0x0032), "DS", rb"0\0\0"), ((0x0020, 0x0037), "DS", rb"1\0\0\0\1\0"),
        ((0x0028, 0x0002), "US", 1), ((0x0028, 0x0004), "CS", b"MONOCHROME2"),
        ((0x0028, 0x0010), "US", 24), ((0x0028, 0x0011), "US", 20), ((0x0028, 0x0030), "DS", rb"1\1"),
        ((0x0028, 0x0100), "US", 16), ((0x0028, 0x0101), "US", 16), ((0x0028, 0x0102), "US", 15),
        ((0x0028, 0x0103), "US", 0),
        *[((0x0028, 0x3000), "SQ", struct.pack(f"{order}HHI", 0xFFFE, 0xE000, 0))] * table,
        ((0x7FE0, 0x0010), "OW", pixels.astype(f"{order}u2").tobytes()),
    ]  # fmt: skip
    body = b"".join(element(*each, order) for each in elements)
    if encoding == "deflated":
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        body = packer.compress(body) + packer.flush()
    syntax = {"explicit": b"1", "deflated": b"1.99", "big-endian": b"2"}[encoding]
    meta = element((0x0002, 0x0010), "UI", b"1.2.840.10008.1.2." + syntax)
    length = element((0x0002, 0x0000), "UL", struct.pack("<I", len(meta)))
    path.write_bytes(bytes(128) + b"DICM" + length + meta + body)


@pytest.mark.parametrize("encoding", ["explicit", "deflated", "big-endian"])
@pytest.mark.parametrize("table", [True, False])
def test_a_table_of_voxels_is_found_in_every_encoding(tmp_path, encoding, table):
    pixels = np.arange(480)
    write_slice(tmp_path / "a.dcm", encoding, pixels, table)
    if table:
        assert "a.dcm: voxels whose meaning stands in a table" in refusal(tmp_path)
    else:
        np.testing.assert_array_equal(scans.read(tmp_path).array[..., 0].T.ravel(), pixels)


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.dcm").symlink_to("nothing")
    assert f"{tmp_path / 'a.dcm'}: no slice that can be read" in refusal(tmp_path)


def test_a_deflated_slice_is_unpacked_up_to_a_bound(tmp_path, monkeypatch):
    file = tmp_path / "a.dcm"
    write_slice(file, "deflated", np.zeros(480), table=False)
    whole = file.read_bytes()
    start = 144 + int.from_bytes(whole[140:144], "little")
    for content, message in (
        (whole[:-20], "deflated, and ends too early"),
        (whole[:start] + b"\xff" * 40, "deflated, and cannot be unpacked"),
    ):
        file.write_bytes(content)
        assert f"{file}: {message}" in refusal(tmp_path)
    file.write_bytes(whole)
    assert not scans.read(tmp_path).array.any()
    monkeypatch.setattr("srlib.data.dicom.UNPACKED", 960)  # its voxels alone
    assert f"{file}: deflated, and unpacks to more than" in refusal(tmp_path)


def test_a_fault_of_many_slices_is_one_line(tmp_path):
    series = dicom(tmp_path / "series", [(0, 0, 2 * k) for k in range(8)])
    said = refusal(edit(series, (0x0028, 0x0030), ""))
    assert said.startswith(f"{series / '000.dcm'}, 001.dcm, 002.dcm, 003.dcm, 004.dcm and 3 more: ")


def test_a_copy_of_a_slice_is_named(tmp_path):
    series = dicom(tmp_path / "series", [(0, 0, 2 * k) for k in range(3)])
    (series / "001 (1).dcm").write_bytes((series / "001.dcm").read_bytes())
    assert "001 (1).dcm and 001.dcm are the same slice; remove one" in refusal(series)


@pytest.mark.parametrize("step", [0.625, 1.25])
def test_places_that_are_rounded_to_hundredths_are_a_regular_grid(tmp_path, step):
    places = [(round(0.3 * step * k, 2), 0, round(step * k, 2)) for k in range(20)]
    scan = scans.read(dicom(tmp_path / "ct", places))
    np.testing.assert_allclose(scan.affine[:3, 2], (-0.3 * step, 0, step), atol=1e-3)


def test_a_mask_of_a_tilted_series_states_one_grid_only(tmp_path):
    series = dicom(tmp_path / "ct", [(0, 0.73 * k, 2 * k) for k in range(4)])
    scan = scans.read(series)
    labels = np.ones(scan.array.shape, np.uint8)
    predict.write_mask(predict.Mask(labels, scan.affine), series, tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-5)
    assert int(mask.header["qform_code"]) == 0  # it could hold a rotated grid only


def test_a_folder_of_dicom_and_other_scans_is_ambiguous(tmp_path):
    series = dicom(tmp_path / "mr", [(0, 0, k) for k in range(2)])
    nifti(series / "seg.nii")
    with pytest.raises(DataError, match=r"holds DICOM files beside seg\.nii"):
        predict.find_cases([series], 1)


def test_a_multi_frame_file_is_named_with_what_to_do(tmp_path):
    sitk.WriteImage(
        sitk.GetImageFromArray(VOXELS.T.astype(np.uint16)), str(tmp_path / "frames.dcm")
    )
    assert refusal(tmp_path) == (
        f"{tmp_path / 'frames.dcm'}: multi-frame DICOM; convert it with dcm2niix first"
    )


def test_every_file_of_a_series_folder_is_accounted_for(tmp_path, caplog):
    series = dicom(tmp_path / "mr", [(0, 0, k) for k in range(4)])
    (series / "notes.txt").write_text("made on a Tuesday")
    (series / ".DS_Store").touch()
    assert scans.read(series).array.shape == (20, 24, 4)
    assert "not DICOM and passed over: notes.txt" in caplog.text
    whole = (series / "000.dcm").read_bytes()
    (series / "cut").write_bytes(whole[:100])
    (series / "report.dcm").write_bytes(bytes(128) + b"DICM")
    dicom(series / "more", [(0, 0, 9)])
    said = refusal(series).splitlines()
    assert [line.partition(":")[0] for line in said] == [
        f"{series / 'cut'}, report.dcm", str(series)
    ]  # fmt: skip
    assert "in the folders more" in said[-1]


def test_slopes_that_differ_by_slice_keep_fractions(tmp_path):
    ct = {"0008_0060": "CT", "0008_0016": "1.2.840.10008.5.1.4.1.1.2"}
    folder = dicom(tmp_path / "ct", [(0, 0, k) for k in range(3)], **ct)
    edit(folder, (0x0028, 0x1053), "0.25", "0.5", "1.75")  # ITK writes whole numbers only
    assert scans.read(folder).array[0, 0].tolist() == [250, 500.5, 1753.5]


# --- NIfTI's redundant geometry and units -----------------------------------------------------------


@pytest.mark.parametrize("pixdim", [(1.3158, 1.3158, 10), (1, 1, 3)])
def test_sizes_that_contradict_each_other_are_both_named(tmp_path, pixdim):
    path = nifti(tmp_path / "a.nii", pixdim=[1, *pixdim, 0, 0, 0, 0], sform_code=1, qform_code=1)
    said = " x ".join(f"{size:g}" for size in pixdim)
    assert f"states voxels of {said} mm, but its affine (sform or qform) has 1 x 1 x 1 mm" in (
        refusal(path)
    )


ELSEWHERE = [({"vox_offset": 0}, b""), ({"dim": [3, 20, 24, 9, 1, 1, 1, 1]}, b""), ({}, b"more")]


@pytest.mark.parametrize(("fields", "more"), ELSEWHERE)
def test_voxels_elsewhere_than_the_header_says_are_refused(tmp_path, fields, more):
    path = nifti(tmp_path / "a.nii", **fields)
    path.write_bytes(path.read_bytes() + more)
    assert "its voxels are not whole; expected" in refusal(path)


MOVED = [({"qoffset_x": 20}, 20), ({"quatern_d": 1}, 59.7), ({"quatern_b": 0.001}, 0)]


@pytest.mark.parametrize(("fields", "off"), MOVED)
def test_a_qform_elsewhere_than_the_sform_is_told(tmp_path, caplog, fields, off):
    path = nifti(tmp_path / "a.nii", sform_code=1, qform_code=1, **fields)
    np.testing.assert_array_equal(scans.read(path).affine, np.eye(4))
    told = re.findall(r"qform lies up to (\S+) mm off its sform", caplog.text)
    assert told == ([f"{off:g}"] if off else [])


@pytest.mark.parametrize(("unit", "size"), [(1, 0.0011), (2, 1.1), (3, 1100), (0, 1.1)])
def test_lengths_are_in_millimetres_whatever_the_unit(tmp_path, unit, size):
    path = nifti(tmp_path / "a.nii", affine=np.diag([size] * 3 + [1]), xyzt_units=unit)
    np.testing.assert_allclose(scans.read(path).affine[:3, :3], 1.1 * np.eye(3), rtol=1e-6)
    predict.write_mask(predict.Mask(LABELS, np.eye(4)), path, tmp_path / "mask.nii.gz")
    assert nib.load(tmp_path / "mask.nii.gz").header["xyzt_units"] == unit
    np.testing.assert_allclose(scans.read(tmp_path / "mask.nii.gz").affine, scans.read(path).affine)


def test_an_unknown_unit_is_refused(tmp_path):
    assert "unknown unit of length" in refusal(nifti(tmp_path / "a.nii", xyzt_units=5))


def test_small_voxels_are_no_singular_affine(tmp_path):
    affine = np.diag([0.0005] * 3 + [1.0])
    np.testing.assert_allclose(scans.read(nifti(tmp_path / "a.nii", affine=affine)).affine, affine)


def test_an_orientation_that_is_not_stated_is_told(tmp_path, caplog):
    scans.read(nifti(tmp_path / "a.nii", qform_code=0, sform_code=0))
    assert "left and right may be exchanged" in caplog.text


def test_an_empty_sform_leaves_the_qform(tmp_path):
    affine = np.array([[0, -2.0, 0, 3], [1, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
    zeros = dict.fromkeys(("srow_x", "srow_y", "srow_z"), 0)
    image = nib.Nifti1Image(VOXELS, affine)
    image.set_qform(affine, 1)
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    header = np.frombuffer(raw, nib.nifti1.header_dtype, count=1)
    for name, value in zeros.items():
        header[name] = value
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_allclose(scans.read(tmp_path / "a.nii").affine, affine, atol=1e-5)


def test_no_voxels_are_one_line(tmp_path):
    path = nifti(tmp_path / "a.nii", dim=[3, 20, 0, 12, 1, 1, 1, 1])
    assert refusal(path) == f"{path}: holds no voxel, its shape is (20, 0, 12)"


# --- Formats and names ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["S.MHA", "S.NRRD", "S.NII", "S.Nii.Gz"])
def test_endings_in_capitals(tmp_path, name):
    affine = np.diag([1, 2, 3, 1.0])
    path = write(tmp_path / name.lower(), VOXELS, affine).rename(tmp_path / name)
    np.testing.assert_array_equal(scans.read(path).array, VOXELS)
    mask = predict.targets(tmp_path / "masks", {"s": [path]})["s"]
    mask.parent.mkdir()
    predict.write_mask(predict.Mask(LABELS, affine), path, mask)
    np.testing.assert_allclose(scans.read(mask).affine, affine)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_is_known_by_its_content(tmp_path, second, ending):
    kind = nib.Nifti2Image if second else nib.Nifti1Image
    content = kind(VOXELS[..., None], np.eye(4)).to_bytes()
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii" else content)  # the wrong way round
    np.testing.assert_array_equal(scans.read(path).array, VOXELS)
    predict.write_mask(predict.Mask(LABELS, np.eye(4)), path, tmp_path / "mask.nii.gz")
    assert type(nib.load(tmp_path / "mask.nii.gz")) is kind


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_a_header_without_its_voxels_names_them(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", VOXELS, np.eye(4))
    (voxels,) = set(tmp_path.iterdir()) - {path}
    voxels.unlink()
    assert refusal(path) == f"{path}: its voxels are in {voxels.name}, which is not there"


REPLACED = {
    "micrometres": {b"NDims": b"DistanceUnits = um\nNDims"},
    "negative size": {b"ElementSpacing = 1 1 1": b"ElementSpacing = 1 1 -1"},
    "no size": {b"ElementSpacing = 1 1 1\n": b""},
    "text": {b"BinaryData = True": b"BinaryData = False"},
    "scale": {b"DimSize": b"ElementToIntensityFunctionSlope = 2\nDimSize"},
    "something before": {b"DimSize": b"HeaderSize = 4\nDimSize"},
}


def damaged_metaimage(path: Path, kind: str) -> Path:
    write(path, VOXELS, np.eye(4))
    content = path.read_bytes()
    if kind in ("flipped bit", "cut", "no packed size"):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path), useCompression=True)
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]
        unsized = re.sub(rb"CompressedDataSize = \d+\n", b"", content)
        content = {"flipped bit": flipped, "cut": content[:middle]}.get(kind, unsized)
    elif kind == "too long":
        content += b"more"
    for old, new in REPLACED.get(kind, {}).items():
        content = content.replace(old, new, 1)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flipped bit", "its voxels are not whole"),
        ("cut", "its voxels are not whole"),
        ("too long", "its voxels are not whole; expected 23040, found 23044"),
        ("micrometres", "lengths in um; expected mm"),
        ("negative size", "states voxels of 1 1 -1 mm"),
        ("no size", "states no voxel sizes"),
        ("no packed size", "has no CompressedDataSize, which ITK misreads"),
        ("text", "has voxels as text, which ITK misreads"),
        ("scale", "has a function of intensities, which ITK misreads"),
        ("something before", "has a HeaderSize, and voxels in the same file"),
    ],
)
def test_metaimage_that_itk_would_read_without_a_word(tmp_path, kind, message):
    assert message in refusal(damaged_metaimage(tmp_path / "a.mha", kind))


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("name", ["a %d.raw", "b%d.raw"])
def test_metaimage_in_many_files_is_whole_or_names_the_one_that_is_not(tmp_path, name, cut):
    names = [name % k for k in range(12)]
    write(tmp_path / "a.mhd", VOXELS, np.eye(4))
    header, _, _ = (tmp_path / "a.mhd").read_text().partition("a.raw")
    files = f"{name} 0 11 1" if name[0] == "b" else "\n".join(["LIST", *names, ""])
    (tmp_path / "a.mhd").write_text(header + files)
    for k, file in enumerate(names):
        content = VOXELS[..., k].tobytes(order="F")
        (tmp_path / file).write_bytes(content[: len(content) - cut * (k == 7)])
    if cut:
        said = f"its voxels in {names[7]} are not whole; expected 1920, found 1918"
        assert said in refusal(tmp_path / "a.mhd")
    else:
        np.testing.assert_array_equal(scans.read(tmp_path / "a.mhd").array, VOXELS)


def test_a_list_of_metaimage_s_files_ends_with_a_new_line(tmp_path):
    """Without it ITK leaves the last file out: its voxels are whatever memory held."""
    path = write(tmp_path / "a.mhd", VOXELS, np.eye(4))
    path.write_text(path.read_text().partition("a.raw")[0] + "LIST\na.raw")
    assert "a list of files without a new line at its end" in refusal(path)


@pytest.mark.parametrize("stated", ["", "spacings: nan nan nan\n", "thicknesses: 1 1 1\n"])
def test_nrrd_without_sizes_of_voxels_is_refused(tmp_path, stated):
    bare = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\n{stated}encoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(bare.encode() + bytes(8))
    assert "states no voxel sizes" in refusal(tmp_path / "a.nrrd")


@pytest.mark.parametrize("space", ["scanner-xyz", "3D-left-handed", "3D-right-handed"])
def test_nrrd_of_a_space_without_anatomy_is_told(tmp_path, caplog, space):
    path = write(tmp_path / "a.nrrd", VOXELS, np.eye(4))
    path.write_bytes(path.read_bytes().replace(b"left-posterior-superior", space.encode(), 1))
    scans.read(path)
    assert "left and right may be exchanged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.", b"<!DOCTYPE html>", b"BZh9"])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_what_is_no_scan_is_told_by_how_it_begins(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert f"begins with {content!r}, as " in refusal(tmp_path / name)


def test_nrrd_in_micrometres_is_refused_and_one_without_space_is_told(tmp_path, caplog):
    path = write(tmp_path / "a.nrrd", VOXELS, np.eye(4))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"kinds:", b'space units: "um" "um" "um"\nkinds:', 1))
    assert 'lengths in "um" "um" "um"; expected mm' in refusal(path)
    bare = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nspacings: 1 1 1\nencoding: raw\n\n"
    path.write_bytes(bare + bytes(range(8)))
    scans.read(path)
    assert "left and right may be exchanged" in caplog.text


def test_damage_that_only_gzip_s_checksum_shows(tmp_path):
    content = bytearray(gzip.compress(nib.Nifti1Image(VOXELS, np.eye(4)).to_bytes(), 0))
    content[2000] ^= 8
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert "CRC check failed" in refusal(tmp_path / "a.nii.gz")


def test_values_beyond_float32_are_refused(tmp_path):
    array = VOXELS.astype(np.float64)
    array[0] = -1.7976931348623157e308
    assert "480 voxels are NaN or infinite".replace("480", str(24 * 12)) in refusal(
        nifti(tmp_path / "a.nii", array)
    )


def test_four_dimensions_of_which_one_is_1(tmp_path):
    image = sitk.JoinSeries([sitk.GetImageFromArray(VOXELS.T)])
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    np.testing.assert_array_equal(scans.read(tmp_path / "a.mha").array, VOXELS)
    predict.write_mask(predict.Mask(LABELS, np.eye(4)), tmp_path / "a.mha", tmp_path / "mask.mha")
    assert scans.read(tmp_path / "mask.mha").array.shape == VOXELS.shape


def test_a_mask_takes_geometry_alone_from_the_scan(tmp_path):
    image = nib.Nifti1Image(VOXELS, np.diag([1, 2, 3, 1.0]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"PatientName: NOBODY"))
    image.header["intent_code"], image.header["descrip"] = 1001, b"NOBODY"
    nib.save(image, tmp_path / "a.nii")
    predict.write_mask(
        predict.Mask(LABELS, image.affine), tmp_path / "a.nii", tmp_path / "mask.nii.gz"
    )
    content = gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())
    assert b"NOBODY" not in content
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.get_data_dtype() == np.uint8
    assert int(mask.header["intent_code"]) == 0


def test_the_working_grid_of_a_scan_at_45_degrees_does_not_depend_on_its_storage():
    c = np.sqrt(0.5)
    affine = np.eye(4)
    affine[:3, :3] = [[c, -c, 0], [c, c, 0], [0, 0, 1]]
    expected = scans.regrid(scans.Scan(VOXELS, affine), (1, 1, 1))
    for flips in range(8):
        for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
            turn = np.column_stack([order, [1 - 2 * (flips >> k & 1) for k in range(3)]])
            stored = nib.orientations.apply_orientation(VOXELS, turn)
            back = affine @ nib.orientations.inv_ornt_aff(turn, VOXELS.shape)
            found = scans.regrid(scans.Scan(stored, back), (1, 1, 1))
            np.testing.assert_array_equal(found.array, expected.array)
            np.testing.assert_allclose(found.affine, expected.affine, atol=1e-9)


def test_image_and_label_of_one_grid_are_turned_alike(tmp_path):
    """Near 45 degrees the last digits of an affine, which its qform and sform round otherwise, choose the axes."""
    affine = np.eye(4)
    c = np.sqrt(0.5)
    affine[:3, :3] = [[-c, -c, 0], [c, -c, 0], [0, 0, 1]]
    cube = np.zeros((12, 12, 12), np.float32)
    cube[1:4, 2:10, 5:7] = 10
    for off in (-1e-4, -1e-7, 1e-7, 1e-4):
        for number, (stored, name) in enumerate(((cube, "image"), (cube > 0, "label"))):
            own = affine.copy()
            own[0, 0] += off * (1 - 2 * number)
            nib.save(nib.Nifti1Image(stored.astype(np.uint8), own), tmp_path / f"{name}.nii")
        image, label = tmp_path / "image.nii", tmp_path / "label.nii"
        (scan,), mask = scans.read_case([image], label, 1)
        inside = scans.regrid(mask, (1, 1, 1), labels=True).array > 0
        assert (scans.regrid(scan, (1, 1, 1)).array[inside] == 10).all()


def test_labels_of_the_other_byte_order_are_resampled(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    stored = (VOXELS.mean() < VOXELS).astype(">i2") * 300
    nib.save(nib.Nifti1Image(stored, np.diag([2.0, 2, 2, 1]), header), tmp_path / "label.nii")
    label = scans.read(tmp_path / "label.nii", labels=True)
    assert set(np.unique(scans.regrid(label, (1, 1, 1), labels=True).array)) == {0, 300}


def test_a_small_bright_thing_in_an_empty_scan_outlives_its_normalisation():
    image = np.zeros((40, 40, 40), np.float32)
    image[3:8, 3:8, 3:8] = 7  # a fifth of a percent, which both percentiles leave out
    scaled = scans.normalise(image)
    assert scaled[5, 5, 5] - scaled[0, 0, 0] > 10


# --- Folders of cases -------------------------------------------------------------------------------


def plan_refusal(folder: Path, stated=None) -> str:
    if stated:
        (folder / "dataset.json").write_text(json.dumps(stated))
    with pytest.raises(DataError) as caught:
        plans.load(folder)
    return str(caught.value)


STATED = {
    "two names of one value": ({"background": 0, "a": 1, "b": 1}, "expected others for each class"),
    "background elsewhere": ({"background": 1, "front": 2}, "expected 0 for 'background' alone"),
    "a class of value 0": ({"front": 0, "back": 2}, "class 'front' has the value 0"),
    "a region with 0": ({"background": 0, "front": [0, 1]}, "class 'front'"),
    "a fraction": ({"background": 0, "front": 1.5}, "label value 1.5; expected a whole number"),
    "true": ({"background": 0, "front": True}, "label value True"),
}


@pytest.mark.parametrize("kind", STATED)
def test_labels_that_cannot_be_meant_are_refused_by_the_plan(tmp_path, kind):
    labels, message = STATED[kind]
    assert message in plan_refusal(write_pairs(tmp_path / "scans", cases=2), {"labels": labels})


def test_nnunet_s_list_of_cases_is_read(tmp_path):
    folder = write_pairs(tmp_path / "scans", cases=3, names=("pictures", "masks"))
    listed = {
        f"case_{k}": {"images": [f"pictures/case_{k}.nii.gz"], "label": f"masks/case_{k}.nii.gz"}
        for k in range(3)
    }
    (folder / "dataset.json").write_text(json.dumps({"dataset": listed}))
    assert plans.load(folder).entry.classes == ("label 1", "label 2")


def test_label_values_are_compared_as_whole_numbers_and_told_with_every_digit(tmp_path):
    folder = write_pairs(tmp_path / "scans", cases=2)
    near = (LABELS * np.float32(0.99999994)).astype(np.float32)
    large = LABELS.astype(np.int32) * (2**24 + 1)
    for k, array in enumerate((near, large)):
        write(folder / "images" / f"case_{k}.nii.gz", VOXELS, np.eye(4))
        write(folder / "labels" / f"case_{k}.nii.gz", array, np.eye(4))
    assert "[0.99999994, 1.9999999]" in plan_refusal(folder)
    assert scans.read(folder / "labels" / "case_1.nii.gz", labels=True).array.max() == 2**25 + 2


def test_all_faults_at_once_and_each_says_how_far_it_is_off(tmp_path):
    folder = write_pairs(tmp_path / "scans", cases=3)
    write(folder / "labels" / "case_0.nii.gz", LABELS, np.eye(4))
    write(folder / "images" / "case_0.nii.gz", VOXELS, np.diag([1, 1, 1.5, 1]))
    nifti(folder / "labels" / "case_1.nii", dim=[3, 20, 0, 12, 1, 1, 1, 1])
    (folder / "labels" / "case_1.nii.gz").unlink()
    lines = plan_refusal(folder).splitlines()
    assert lines[0].endswith("2 fault(s):")
    assert "voxels lie up to 5.5 mm apart" in lines[1]
    assert "case_1.nii: holds no voxel" in lines[2]


def test_the_file_of_a_channel_that_is_missing_is_named(tmp_path):
    folder = write_pairs(tmp_path / "scans", cases=2, channels=2, names=("imagesTr", "labelsTr"))
    (folder / "imagesTr" / "case_1_0001.nii.gz").unlink()
    stated = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1, "b": 2}}
    assert "expected 2 channels; case_1_0001 missing" in plan_refusal(folder, stated)


def test_two_spellings_of_one_name_are_both_told(tmp_path):
    folder = write_pairs(tmp_path / "scans", cases=2)
    for kind, form in (("images", "NFC"), ("labels", "NFD")):
        path = folder / kind / "case_1.nii.gz"
        path.rename(path.with_name(unicodedata.normalize(form, "é.nii.gz")))
    assert r"'\xe9' there is another spelling of 'e\u0301'" in plan_refusal(folder)


def test_the_plan_names_voxel_sizes_that_are_far_from_the_others(tmp_path):
    folder = write_pairs(tmp_path / "scans", cases=4)
    for kind, array in (("images", VOXELS), ("labels", LABELS)):
        write(folder / kind / "case_3.nii.gz", array, np.diag([10.0, 10, 20, 1]))
    said = "\n".join(plans.load(folder).summary)
    assert "voxels in the files: 1 .. 10 x 1 .. 10 x 2 .. 20 mm" in said
    assert "1 cases with voxels over 3 times larger or smaller" in said
    assert "case_3 (10 x 10 x 20)" in said
